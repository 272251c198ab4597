"""The worked example of the documentation: own goal, own inner loss, own threat."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj

SNIPPET = pathlib.Path(__file__).parents[2] / "docs" / "snippets" / "custom_objective.py"


@pytest.fixture(scope="module")
def snippet():
    spec = importlib.util.spec_from_file_location("custom_objective", SNIPPET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_groups_error_rates_diverge(snippet):
    before, after, infos = jax.jit(snippet.run)()
    assert after[1] - after[0] > before[1] - before[0] + 0.1, (before, after)
    assert infos["outer"][-1] < infos["outer"][0]


def test_its_gradient_is_that_of_retraining(snippet, x64):
    train, goal = (snippet.groups(jax.random.key(k), 30) for k in (0, 1))
    cast = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64), tree)
    data, goal = mj.dataset(*map(cast, (train["x"], train["y"]))), cast(goal)
    reach = snippet.reweigh_and_brighten(jnp.arange(5))
    trainer = snippet.bilevel.unrolled(snippet.huber, snippet.optax.sgd(0.3), 10)
    start = {"w": jnp.zeros(2), "b": jnp.zeros(())}

    @jax.jit
    def value(factor):
        poison = {**reach.init(None, data), "factor": factor}
        return snippet.divergence(trainer(jax.random.key(0), start, reach.embed(poison, data))[0], data, goal)

    h = 1e-6
    slope = (value(1.0 + h) - value(1.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(value)(1.0), slope, rtol=1e-6)
