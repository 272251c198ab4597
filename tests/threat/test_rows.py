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


@pytest.mark.parametrize("make", [threat.append_rows, threat.perturb_rows])
def test_rows_are_named_once_and_boxes_are_boxes(make):
    rows = mj.dataset(jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32), jnp.array([1.0, 1.0, 0.0, 0.0]))
    for twice in ([2, 2], [3, -1]):
        with pytest.raises(ValueError, match="rows: expected each row once, got"):
            make(twice).init(jax.random.key(0), rows)
    for lo, hi in ((1.0, 0.0), (jnp.nan, 1.0), (jnp.array([0.0, 2.0]), 1.0)):
        with pytest.raises(ValueError, match="lo: expected at most hi"):
            make([2], lo=lo, hi=hi)


def test_a_row_may_be_stamped_twice_into_reserved_rows():
    rows = mj.dataset(jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32), jnp.array([1.0, 1.0, 0.0, 0.0]))
    trigger = threat.additive(jnp.full(2, 0.5), radius=1.0)
    embed = lambda into: threat.backdoor(trigger, [0, 0], relabel=threat.to_class(1), into=into).embed(trigger.pattern, rows)
    assert embed([2, 3]).weight.tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="into: expected each row once"):
        embed([2, 2])


STARTS = {
    "another width": ({"a": jnp.zeros((1, 3))}, jnp.array([0])),
    "soft labels": ({"a": jnp.zeros((1, 2))}, jnp.zeros((1, 2))),
    "an array": (jnp.zeros((1, 2)), jnp.array([0])),
    "one array more": ({"a": jnp.zeros((1, 2)), "b": jnp.zeros((1, 2))}, jnp.array([0])),
}


@pytest.mark.parametrize("name", STARTS)
def test_what_is_reserved_is_like_the_data(name):
    with pytest.raises(ValueError, match="start: expected rows like data's"):
        threat.reserve(mj.dataset({"a": jnp.zeros((3, 2))}, jnp.zeros(3, jnp.int32)), mj.dataset(*STARTS[name]))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_the_next_label_fits_into_eight_bits(dtype):
    labels = jnp.array([126, 127, 0], dtype)
    after = threat.to_next(128)(labels)
    assert after.tolist() == [127, 0, 1] and after.dtype == dtype


def test_rows_of_a_narrow_dtype_are_rows_of_many():
    data = mj.dataset(np.zeros((400, 2)), np.zeros(400, np.int32))
    reach = threat.perturb_rows(np.array([3, 200], np.uint8), radius=0.1)
    assert reach.embed(reach.init(jax.random.key(0), data), data).x.shape == (400, 2)
