"""Channels of a layer in the parameters of every network library: switched off, shifted, ranked."""

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mlsec_jax as mj
from mlsec_jax import channels, models
from mlsec_jax.models import adapt

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
KEEP = jnp.array([True, False, True, True, False])


def equinox_conv(params, x):
    return jnp.moveaxis(jax.vmap(params["conv"])(jnp.moveaxis(x, 3, 1)), 1, 3)


def maker(name):
    """`(apply_fn [n, h, w, 5], params, name of the layer, axis)` of one convolution."""
    if name == "equinox":
        return equinox_conv, {"conv": eqx.nn.Conv2d(2, 5, 3, key=KEY), "step": jnp.zeros((), jnp.int32)}, "conv", 0
    model, layer = {
        "linen": lambda: (adapt.linen(linen.Conv(5, (3, 3))), "params"),
        "nnx": lambda: (adapt.nnx(lambda rngs: nnx.Conv(2, 5, (3, 3), rngs=rngs)), ""),
        "haiku": lambda: (adapt.haiku(lambda x: hk.Conv2D(5, 3, name="conv")(x)), "params/conv"),
    }[name]()
    params = model.init(KEY, IMAGES)
    return model.apply, params, layer, -1


@pytest.mark.parametrize("name", ["linen", "nnx", "haiku", "equinox"])
def test_a_channel_is_switched_off_and_shifted_in_every_library(name):
    apply_fn, params, layer, axis = maker(name)
    before = np.asarray(apply_fn(params, IMAGES))
    after = np.asarray(apply_fn(channels.prune_channels(layer, axis=axis)(params, KEEP), IMAGES))
    assert (after[..., ~np.asarray(KEEP)] == 0).all()
    np.testing.assert_array_equal(after[..., np.asarray(KEEP)], before[..., np.asarray(KEEP)])
    by = jnp.arange(5.0)
    lowered = np.asarray(apply_fn(channels.shift_bias(layer, axis=axis)(params, by), IMAGES))
    np.testing.assert_allclose(lowered, before - np.arange(5), atol=1e-6)


def test_a_normalised_channel_goes_without_moving_those_that_share_its_statistics():
    model = models.convnet(width=4, sizes=(1, 2), pooled=(0, 1), groups=2)
    params = jax.jit(lambda key: model.init(key, (8, 8, 1)))(KEY)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), params)
    x = jax.random.normal(KEY, (3, 8, 8, 1))
    keep = jnp.arange(8) != 3
    pruned = channels.prune_channels("conv1")(params, keep)
    before, after = (np.asarray(jax.jit(model.layers)(p, x)[1]) for p in (params, pruned))
    assert (after[..., 3] == 0).all()
    np.testing.assert_array_equal(after[..., np.asarray(keep)], before[..., np.asarray(keep)])


def test_the_mean_activation_is_numpys_and_absent_rows_are_absent():
    layer = channels.layer("", lambda params, x: x * params["b"][None, None, None])
    params = {"b": jnp.array([1.0, 3.0])}
    x = np.random.default_rng(0).normal(size=(5, 3, 3, 2)).astype(np.float32)
    weight = np.array([1, 2, 0, 0.5, 0], np.float32)
    expected = np.average(x.mean(axis=(1, 2)) * [1, 3], axis=0, weights=weight)
    x[weight == 0] = np.nan
    ours = channels.mean_activation(layer, params, mj.dataset(x, jnp.zeros(5, jnp.int32), weight))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_along_a_path_channels_go_one_by_one():
    order = jnp.array([2, 0, 1])
    kept = channels.along(channels.prune_channels(""), {"b": jnp.ones(3)}, order, lambda params: params["b"])
    assert kept.tolist() == [[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert channels.ranks(order).tolist() == [1, 2, 0]


def test_bad_input_is_named():
    params = {"conv": {"w": jnp.ones((2, 3))}, "head": {"w": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match="name: expected a layer of parameters called conv/w, head/w, got 'conv1'"):
        channels.prune_channels("conv1")(params, jnp.ones(3))
    with pytest.raises(ValueError, match="axis: expected 2 channels on axis -1 of conv/w"):
        channels.prune_channels("conv")(params, jnp.ones(2))
    with pytest.raises(ValueError, match="expected a layer with a bias"):
        channels.shift_bias("conv")(params, jnp.ones(3))
    with pytest.raises(ValueError, match=r"activations_fn: expected \[n, ..., channels\]"):
        flat = channels.layer("conv", lambda params, x: x[:, 0])
        channels.mean_activation(flat, params, mj.dataset(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32)))
