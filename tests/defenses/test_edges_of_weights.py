"""Numbers among parameters."""

import jax
import jax.numpy as jnp

import mlsec_jax as mj
from mlsec_jax import defenses


def test_python_numbers_are_clipped_and_blurred():
    params = {"w": jnp.ones(3), "b": 2.0}
    assert defenses.clip_weights(1.0)(jax.random.key(0), params, mj.Known())[0]["b"] == 1
    assert defenses.noise_weights(0.1)(jax.random.key(0), params, mj.Known())[0]["b"] != 2
