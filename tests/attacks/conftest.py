"""Problems that the attack tests share: scikit-learn's digits (real, embedded) and linear models of them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import mlsec_jax as mj


@pytest.fixture(scope="session")
def digits():
    """`(x [1797, 64], y)` in [0, 1], shuffled once."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return (x[order] / 16).astype(np.float32), y[order].astype(np.int32)


@pytest.fixture(scope="session")
def pair(digits):
    """Two digits as 0 and 1, `(train, holdout, test)`: `pair(3, 8, 60, 100)`."""

    def make(first, second, num_train, num_holdout, dtype=np.float32):
        x, y = digits
        rows = np.isin(y, (first, second))
        x, y = x[rows].astype(dtype), (y[rows] == second).astype(np.int32)
        cuts = (0, num_train, num_train + num_holdout, len(y))
        return tuple(mj.dataset(jnp.asarray(x[a:b]), jnp.asarray(y[a:b])) for a, b in itertools.pairwise(cuts))

    return make
