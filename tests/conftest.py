"""Strictness for every test: no implicit promotion of dtypes or ranks, warnings are errors, x64 where asked for."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("filterwarnings", "ignore:JAXopt is no longer maintained:DeprecationWarning")


@pytest.fixture
def x64():
    """Float64 for the length of a test: for oracles (closed forms, central differences with retraining)."""
    with jax.enable_x64(True):
        yield
