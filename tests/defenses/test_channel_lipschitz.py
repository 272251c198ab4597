"""Channel-Lipschitz pruning against NumPy's singular values."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import combine, defenses, models
from tests import oracles

KEY = jax.random.key(0)


def numpys(kernel, scale, u):
    """Bounds and who stays, kernel `[h, w, in, out]`."""
    kernel = np.asarray(kernel, np.float64)
    matrices = [kernel[..., k].reshape(-1, kernel.shape[2]) for k in range(kernel.shape[3])]
    bound = np.array([np.linalg.svd(matrix, compute_uv=False)[0] for matrix in matrices])
    bound = bound if scale is None else bound * abs(np.asarray(scale))
    return bound, bound <= bound.mean() + u * bound.std()


def loud(params, layer, channel, factor=8.0):
    """The same parameters with one channel's kernel made larger."""
    w = params[layer]["w"]
    return {**params, layer: {**params[layer], "w": w.at[..., channel].multiply(factor)}}


@pytest.mark.parametrize("name", ["lenet", "convnet"])
def test_bounds_are_numpys_and_what_stands_out_goes(name):
    model = {
        "lenet": models.lenet(channels=(12, 16), widths=(6,), kernel=3),
        "convnet": models.convnet(width=12, sizes=(1, 2), pooled=(0, 1)),
    }[name]
    params = loud(loud(jax.jit(lambda key: model.init(key, (8, 8, 1)))(KEY), "conv0", 3), "conv1", 5)
    params = jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(KEY, leaf.shape), params)
    changed, info = jax.jit(defenses.channel_lipschitz(u=3.0))(KEY, params, mj.Known())
    assert set(info) == {"conv0/w", "conv1/w"}
    for layer, channel in (("conv0", 3), ("conv1", 5)):
        bound, keep = numpys(params[layer]["w"], params[layer].get("scale"), 3.0)
        np.testing.assert_allclose(info[f"{layer}/w"]["bound"], bound, rtol=1e-5)
        assert info[f"{layer}/w"]["keep"].tolist() == keep.tolist() == [k != channel for k in range(len(keep))]
    x = jax.random.normal(KEY, (2, 8, 8, 1))
    first, second = jax.jit(model.layers)(changed, x)[:2]
    assert (first[..., 3] == 0).all() and (second[..., 5] == 0).all() and (second != 0).any()
    rest = [k for k in params if not k.startswith("conv")]
    assert oracles.trees_equal({k: changed[k] for k in rest}, {k: params[k] for k in rest})


def test_it_composes_and_an_infinite_threshold_changes_nothing():
    model = models.lenet(channels=(12, 16), widths=(6,), kernel=3)
    params = loud(loud(jax.jit(lambda key: model.init(key, (8, 8, 1)))(KEY), "conv0", 3), "conv1", 5)
    repair = defenses.channel_lipschitz()
    one = combine.masked(repair, lambda path, leaf: path.startswith("conv1"))(KEY, params, mj.Known())[0]
    assert oracles.trees_equal(one["conv0"], params["conv0"]) and (one["conv1"]["w"][..., 5] == 0).all()
    twice, infos = combine.chain(repair, repair)(KEY, params, mj.Known())
    assert len(infos) == 2 and (twice["conv0"]["w"][..., 3] == 0).all()
    assert oracles.trees_equal(defenses.channel_lipschitz(u=jnp.inf)(KEY, params, mj.Known())[0], params)


def test_dense_layers_are_norms_and_equinox_has_its_channels_in_front():
    params = {"dense": {"w": jax.random.normal(KEY, (4, 6)), "b": jnp.ones(6)}}
    dense = defenses.channel_lipschitz(u=1.0, weights=lambda path, leaf: leaf.ndim == 2)
    _, info = dense(KEY, params, mj.Known())
    np.testing.assert_allclose(info["dense/w"]["bound"], np.linalg.norm(params["dense"]["w"], axis=0), rtol=1e-5)
    layer = eqx.nn.Conv2d(2, 12, 3, key=KEY)
    layer = eqx.tree_at(lambda c: c.weight, layer, layer.weight.at[7].multiply(9.0))
    params = {"conv": eqx.filter(layer, eqx.is_array)}
    changed, info = defenses.channel_lipschitz(axis=0)(KEY, params, mj.Known())
    bound, keep = numpys(np.moveaxis(layer.weight, (0, 1), (3, 2)), None, 3.0)
    np.testing.assert_allclose(info["conv/weight"]["bound"], bound, rtol=1e-5)
    assert not keep[7] and (changed["conv"].weight[7] == 0).all() and (changed["conv"].bias[7] == 0).all()


def test_a_layer_of_equals_stays_and_a_small_one_is_out_of_reach():
    equal = {"w": jnp.ones((3, 3, 2, 6)), "b": jnp.ones(6)}
    assert oracles.trees_equal(defenses.channel_lipschitz(u=0.5)(KEY, equal, mj.Known())[0], equal)
    nine = {"w": jnp.ones((3, 3, 2, 9)).at[..., 0].set(1e6), "b": jnp.ones(9)}
    assert oracles.trees_equal(defenses.channel_lipschitz()(KEY, nine, mj.Known())[0], nine)
    assert not oracles.trees_equal(defenses.channel_lipschitz(u=2.8)(KEY, nine, mj.Known())[0], nine)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="u: expected at least 0"):
        defenses.channel_lipschitz(u=-1.0)
    with pytest.raises(ValueError, match="axis: expected one of -1, 0"):
        defenses.channel_lipschitz(axis=1)
    with pytest.raises(ValueError, match="weights: expected at least one kernel among b, w, got none"):
        defenses.channel_lipschitz()(KEY, {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, mj.Known())
    with pytest.raises(ValueError, match="weights: expected kernels of at least two axes"):
        defenses.channel_lipschitz(weights=lambda path, leaf: path == "b")(KEY, {"b": jnp.ones(3)}, mj.Known())
