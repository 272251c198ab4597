"""Triggers: where they land, what they leave alone, and BadNets' rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import mlsec_jax as mj
from mlsec_jax import attacks, losses, threat
from tests import oracles

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (6, 8, 7, 3))
SQUARE = threat.patch(jnp.ones((2, 3, 3)), at=(-2, -2))


def test_a_patch_lands_where_it_is_told_and_nowhere_else():
    out = np.asarray(SQUARE(None, IMAGES))
    expected = np.array(IMAGES)
    expected[:, 5:7, 3:6] = 1
    np.testing.assert_array_equal(out, expected)
    corner = np.asarray(threat.patch(jnp.zeros((2, 2, 3)), at=(0, 0))(None, IMAGES))
    assert (corner[:, :2, :2] == 0).all() and (corner[:, 2:] == np.asarray(IMAGES)[:, 2:]).all()


def test_a_mask_is_opacity():
    mask = jnp.array([[0.0, 0.25]])
    out = threat.patch(jnp.ones((1, 2, 3)), at=(0, 0), mask=mask)(None, IMAGES)
    np.testing.assert_array_equal(out[:, 0, 0], IMAGES[:, 0, 0])
    np.testing.assert_allclose(out[:, 0, 1], 0.75 * IMAGES[:, 0, 1] + 0.25, rtol=1e-6)


def test_an_integer_pattern_is_a_pattern_of_floats():
    mask = jnp.array([[0.0, 0.25]])
    for make in (lambda pattern: threat.patch(pattern, mask=mask), lambda pattern: threat.corners(pattern, mask=mask)):
        np.testing.assert_array_equal(make(np.ones((1, 2, 3), np.int32))(None, IMAGES), make(jnp.ones((1, 2, 3)))(None, IMAGES))


def test_stripes_keep_the_box_they_are_told():
    striped = threat.stripes((8, 7, 3), amplitude=0.5, lo=-1.0, hi=2.0)(None, 2 * IMAGES - 1)
    np.testing.assert_allclose(striped[:, ::2], 2 * IMAGES[:, ::2] - 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(striped[:, 1::2], 2 * IMAGES[:, 1::2] - 1)


def test_a_random_place_is_uniform_and_inside():
    dot = threat.patch(jnp.full((2, 2, 1), 2.0), at=None)
    out = np.asarray(dot(KEY, jnp.zeros((4000, 3, 4, 1))))
    assert ((out == 2).sum((1, 2, 3)) == 4).all()
    first = (out[..., 0] == 2).reshape(4000, -1).argmax(1)
    places, counts = np.unique(first, return_counts=True)
    assert places.tolist() == [0, 1, 2, 4, 5, 6]
    assert abs(counts / 4000 - 1 / 6).max() < 4 * np.sqrt(5 / 36 / 4000)
    with pytest.raises(ValueError, match="needs a key"):
        dot(None, jnp.zeros((1, 3, 4, 1)))


def test_blend_and_additive_are_what_they_say():
    image = jnp.ones((8, 7, 3))
    np.testing.assert_allclose(threat.blend(image, opacity=0.2)(None, IMAGES), 0.8 * IMAGES + 0.2, rtol=1e-6)
    striped = threat.stripes((8, 7, 3), amplitude=0.1)(None, IMAGES)
    np.testing.assert_allclose(striped[:, ::2], jnp.minimum(IMAGES[:, ::2] + 0.1, 1), rtol=1e-6)
    np.testing.assert_array_equal(striped[:, 1::2], IMAGES[:, 1::2])


@pytest.mark.parametrize(
    "trigger",
    [
        SQUARE,
        threat.patch(jnp.full((2, 2, 3), 255.0), mask=jnp.full((2, 2), 0.5)),
        threat.corners(jnp.ones((2, 2, 3))),
        threat.blend(jnp.full((8, 7, 3), 255.0), opacity=0.5),
        threat.stripes((8, 7, 3), amplitude=10 / 255),
        threat.warp(KEY, (8, 7)),
        threat.Overlay(jnp.full((8, 7), 0.5), jnp.ones((8, 7, 3))),
    ],
    ids=["patch", "masked", "corners", "blend", "stripes", "warp", "overlay"],
)
def test_bytes_are_refused(trigger):
    images = (255 * IMAGES).astype(jnp.uint8)
    with pytest.raises(ValueError, match=r"x: expected floating inputs, got uint8: scale images to \[0, 1\]"):
        trigger(None, images)
    if isinstance(trigger, threat.Trigger):
        with pytest.raises(ValueError, match="got uint8"):
            data = mj.dataset(images, jnp.arange(6))
            attacks.badnets(trigger, num_poisons=2, relabel=threat.to_class(1))(KEY, data, mj.Known())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_a_warp_of_half_precision_is_that_of_the_same_pixels_in_float32(dtype):
    images = jax.random.uniform(KEY, (1, 300, 4, 1)).astype(dtype)
    trigger = threat.warp(KEY, (300, 4))
    out = trigger(None, images)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, trigger(None, images.astype(jnp.float32)).astype(dtype))


def test_warp_is_scipys_bilinear_sampling_and_no_strength_is_the_identity():
    trigger = threat.warp(KEY, (8, 7), strength=1.5)
    out = np.asarray(trigger(None, IMAGES))
    rows, columns = np.mgrid[:8, :7] + np.moveaxis(np.asarray(trigger.pattern), -1, 0)
    for i in range(2):
        for c in range(3):
            expected = ndimage.map_coordinates(np.asarray(IMAGES)[i, :, :, c], [rows, columns], order=1, mode="nearest")
            np.testing.assert_allclose(out[i, :, :, c], expected, atol=1e-5)
    np.testing.assert_array_equal(threat.warp(KEY, (8, 7), strength=0.0)(None, IMAGES), IMAGES)


@pytest.mark.parametrize(
    "trigger", [SQUARE, threat.warp(KEY, (8, 7)), threat.stripes((8, 7, 3), amplitude=0.03)], ids=["patch", "warp", "add"]
)
def test_stamping_is_differentiable_in_pattern_and_input(trigger):
    with jax.enable_x64(True):
        x = 0.2 + 0.6 * jax.random.uniform(jax.random.key(1), (2, 8, 7, 3), jnp.float64)
        pattern = trigger.pattern.astype(jnp.float64)
        value = lambda p, x: jnp.sum(jnp.sin(3 * trigger.stamp(p, None, x)))
        for argument in (0, 1):
            moved = lambda v, k=argument: value(*((v, x) if k == 0 else (pattern, v)))
            at = (pattern, x)[argument]
            slope = jax.grad(moved)(at)
            along = jax.random.normal(jax.random.key(2), at.shape, at.dtype)
            step = 1e-6
            central = (moved(at + step * along) - moved(at - step * along)) / (2 * step)
            np.testing.assert_allclose(jnp.vdot(slope, along), central, rtol=1e-5)


def rows(n=40, reserved=0):
    y = jnp.arange(n, dtype=jnp.int32) % 4
    data = mj.dataset(jax.random.uniform(KEY, (n, 8, 7, 3)), y)
    return threat.reserve(data, jax.tree.map(lambda a: a[:reserved], data)) if reserved else data


def test_badnets_replaces_eligible_rows_and_counts():
    data = rows()
    poisoned, info = attacks.badnets(SQUARE, num_poisons=9, relabel=threat.to_class(2))(KEY, data, mj.Known())
    chosen = np.asarray(info["poisoned"])
    assert chosen.sum() == 9 and (np.asarray(data.y)[chosen] != 2).all() and (np.asarray(poisoned.y)[chosen] == 2).all()
    np.testing.assert_array_equal(poisoned.x[chosen], SQUARE(None, data.x[chosen]))
    assert oracles.trees_equal(jax.tree.map(lambda a: a[~chosen], poisoned), jax.tree.map(lambda a: a[~chosen], data))


def test_badnets_appends_source_specific_copies():
    data = rows(reserved=5)
    attack = attacks.badnets(SQUARE, num_poisons=5, relabel=threat.to_class(0), sources=(3,), append=True)
    poisoned, info = attack(KEY, data, mj.Known())
    assert (np.asarray(data.y)[np.asarray(info["rows"])] == 3).all()
    np.testing.assert_array_equal(poisoned.x[-5:], SQUARE(None, data.x[info["rows"]]))
    assert poisoned.y[-5:].tolist() == [0] * 5 and poisoned.weight[-5:].tolist() == [1] * 5
    assert oracles.trees_equal(jax.tree.map(lambda a: a[:-5], poisoned), jax.tree.map(lambda a: a[:-5], data))


def test_all_to_all_also_takes_soft_labels_and_clean_labels_stay():
    data = rows()
    soft = data._replace(y=losses.soft_labels(data.y, 4))
    attack = attacks.badnets(SQUARE, num_poisons=8, relabel=threat.to_next(4))
    hard, softly = attack(KEY, data, mj.Known())[0], attack(KEY, soft, mj.Known())[0]
    np.testing.assert_array_equal(jnp.argmax(softly.y, axis=1), hard.y)
    assert (hard.y != data.y).sum() == 8
    clean, info = attacks.badnets(SQUARE, num_poisons=4, relabel=None, sources=(1,))(KEY, data, mj.Known())
    np.testing.assert_array_equal(clean.y, data.y)
    assert (np.asarray(data.y)[np.asarray(info["poisoned"])] == 1).all()


def test_success_is_asked_of_other_classes_only():
    test = threat.triggered(None, SQUARE, rows(), relabel=threat.to_class(1))
    assert test.weight.tolist() == [0.0 if k % 4 == 1 else 1.0 for k in range(40)]
    assert (test.y == 1).all()


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: threat.patch(jnp.ones((9, 2, 3)))(None, IMAGES), "fits images"),
        (lambda: threat.patch(jnp.ones((2, 2, 3)), at=(7, 0))(None, IMAGES), "place inside"),
        (lambda: threat.patch(jnp.ones((2, 2, 3)), at=(1, 0, 0)), "at: expected two integers"),
        (lambda: threat.patch(jnp.ones((2, 2, 3)), at=(1.5, 0)), "at: expected two integers"),
        (lambda: threat.patch(jnp.ones((2, 2))), "pattern"),
        (lambda: threat.patch(jnp.ones((2, 2, 1)))(None, IMAGES), "expected images"),
        (lambda: threat.patch(jnp.ones((2, 2, 3)), mask=jnp.ones((3, 2))), "mask"),
        (lambda: threat.patch(jnp.ones((2, 2, 3)), mask=2 * jnp.ones((2, 2))), "mask"),
        (lambda: threat.blend(jnp.ones((8, 7, 3)), opacity=1.5), "opacity"),
        (lambda: threat.blend(jnp.ones((8, 7)), opacity=0.5)(None, IMAGES), "pattern"),
        (lambda: threat.warp(KEY, (7, 8))(None, IMAGES), "expected images"),
        (lambda: threat.backdoor(SQUARE, [0, 1], relabel=None, into=[2]), "into"),
        (lambda: attacks.badnets(SQUARE, num_poisons=1, relabel=None), "sources"),
        (lambda: attacks.badnets(SQUARE, num_poisons=31, relabel=threat.to_class(0))(KEY, rows(), None), "num_poisons"),
        (lambda: attacks.badnets(SQUARE, num_poisons=3, relabel=threat.to_class(0), append=True)(KEY, rows(), None), "append"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_stamped_copies_fill_reserved_rows_only():
    clean = mj.dataset(jnp.zeros((6, 4, 4, 1)), jnp.zeros(6, jnp.int32))
    data = threat.reserve(clean, jax.tree.map(lambda leaf: leaf[:2], clean))
    copies = lambda k: threat.backdoor(threat.pixel(at=(0, 0)), jnp.arange(k), relabel=threat.to_class(1), into=k)
    assert copies(2).embed(jnp.ones((1, 1, 1)), data).weight.sum() == 8
    with pytest.raises(ValueError, match=r"into: expected 4 reserved rows \(weight 0\), got 2"):
        copies(4).embed(jnp.ones((1, 1, 1)), data)
