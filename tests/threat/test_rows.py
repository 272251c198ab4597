"""Budgets on rows that are pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import threat


def test_an_l2_ball_is_of_the_whole_row():
    data = mj.dataset({"a": jnp.full((2, 3), 0.5), "b": jnp.full((2, 2, 2), 0.5)}, jnp.zeros(2, jnp.int32))
    reach = threat.perturb_rows([0, 1], radius=0.5, norm="l2")
    shift = {"a": jnp.array([[0.3] * 3, [0.01] * 3]), "b": jnp.array([[[0.3] * 2] * 2, [[0.01] * 2] * 2])}
    poison = reach.project(jax.tree.map(jnp.add, data.x, shift), data)
    apart = jax.tree.map(lambda p, base: (p - base).reshape(2, -1), poison, data.x)
    length = np.linalg.norm(np.concatenate([apart["a"], apart["b"]], axis=1), axis=1)
    np.testing.assert_allclose(length, [0.5, 0.01 * np.sqrt(7)], rtol=1e-5)
    np.testing.assert_array_equal(poison["a"][1], data.x["a"][1] + shift["a"][1])
    jax.tree.map(np.testing.assert_array_equal, threat.perturb_rows([0, 1], radius=0.0, norm="l2").project(poison, data), data.x)


def test_an_l2_radius_may_be_each_rows_own():
    data = mj.dataset(jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32))
    reach = lambda radius: threat.perturb_rows(jnp.arange(2), radius=radius, norm="l2", lo=-9, hi=9)
    for radius in (jnp.array([[0.1], [0.2]]), jnp.array([0.1, 0.2])):
        moved = reach(radius).project(data.x + 1, data)
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), [0.1, 0.2], rtol=1e-6)
    with pytest.raises(ValueError, match="radius: expected a number, or one a row"):
        reach(jnp.ones((2, 4))).project(data.x, data)


def test_a_box_has_an_inside_and_reserved_rows_keep_their_numbers():
    with pytest.raises(ValueError, match="lo: expected at most hi, got 1 and 0"):
        threat.append_rows(1, lo=1, hi=0)
    images = mj.dataset(jnp.zeros((2, 3), jnp.uint8), jnp.zeros(2, jnp.int32))
    for start in (mj.dataset(jnp.full((1, 3), 0.7), jnp.zeros(1, jnp.int32)), mj.dataset(images.x[:1], jnp.array([1.7]))):
        with pytest.raises(ValueError, match="start: expected numbers that"):
            threat.reserve(images, start)
    assert threat.reserve(images, mj.dataset(jnp.full((1, 3), 7.0), jnp.array([1.0]))).x[2, 0] == 7
