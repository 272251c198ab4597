"""Clipping and noise: closed forms, chosen leaves, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import combine, defenses

KEY = jax.random.key(0)
PARAMS = {"head": jnp.linspace(-2, 2, 9), "body": jnp.full((50, 40), 3.0), "steps": jnp.array(7)}


def test_clipping_is_numpys_and_leaves_counters_alone():
    clipped, info = defenses.clip_weights(1.5)(KEY, PARAMS, mj.Known())
    np.testing.assert_array_equal(clipped["head"], np.clip(np.linspace(-2, 2, 9, dtype=np.float32), -1.5, 1.5))
    assert (clipped["body"] == 1.5).all() and clipped["steps"] == 7
    np.testing.assert_allclose(info["clipped"], (2 + 2000) / 2009)


def test_noise_has_the_scale_it_is_told():
    noisy, info = defenses.noise_weights(0.1)(KEY, PARAMS, mj.Known())
    assert abs(np.std(noisy["body"] - 3) - 0.3) < 4 * 0.3 / np.sqrt(4000)
    norm = np.sqrt(sum(np.sum(np.square(noisy[k] - PARAMS[k])) for k in ("head", "body")))
    np.testing.assert_allclose(info["distance"], norm, rtol=1e-4)
    assert noisy["steps"] == 7


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_a_leaf_of_zeros_has_a_derivative(scale):
    params = {"zero": jnp.zeros(3), "one": jnp.ones(3)}
    total = lambda params, scale: jax.tree.reduce(lambda a, b: a + jnp.sum(b), noisy(params, scale), 0.0)
    noisy = lambda params, scale: defenses.noise_weights(scale)(KEY, params, mj.Known())
    slope = jax.grad(total, argnums=(0, 1))(params, scale)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    assert (slope[0]["zero"] == 1).all()


def test_masked_chooses_leaves():
    repair = combine.masked(defenses.clip_weights(0.0), lambda path, leaf: path == "head")
    changed, _ = repair(KEY, PARAMS, mj.Known())
    assert (changed["head"] == 0).all() and (changed["body"] == 3).all()


@pytest.mark.parametrize("make", [defenses.clip_weights, defenses.noise_weights])
def test_bad_input_is_named(make):
    with pytest.raises(ValueError, match=r"radius|scale"):
        make(-1.0)


def test_python_numbers_are_clipped_and_blurred():
    params = {"w": jnp.ones(3), "b": 2.0}
    assert defenses.clip_weights(1.0)(jax.random.key(0), params, mj.Known())[0]["b"] == 1
    assert defenses.noise_weights(0.1)(jax.random.key(0), params, mj.Known())[0]["b"] != 2
