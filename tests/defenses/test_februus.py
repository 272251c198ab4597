"""GradCAM against finite differences, fills against SciPy, and Februus on a network whose backdoor is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse
import scipy.sparse.linalg

import mlsec_jax as mj
from mlsec_jax import defenses, models
from tests import oracles

KEY = jax.random.key(0)


def resized(maps, shape):
    """Bilinear with half-pixel centres, on the host: a matrix for each direction."""

    def matrix(n, m):
        at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        return np.maximum(0, 1 - abs(at[:, None] - np.arange(n)))

    return matrix(maps.shape[0], shape[0]) @ maps @ matrix(maps.shape[1], shape[1]).T


def test_grad_cam_agrees_with_finite_differences():
    with jax.enable_x64(True):
        draw = lambda k, *shape: jax.random.normal(jax.random.fold_in(KEY, k), shape, jnp.float64)
        params, x = (draw(0, 3, 3, 2, 4), draw(1, 3, 3, 4, 5), draw(2, 5, 3)), draw(3, 2, 8, 8, 2)
        maps_fn = lambda p, x: jnp.tanh(models.conv(x, p[0], stride=2)) + 0.3
        rest_fn = lambda p, a: jnp.mean(jnp.tanh(models.conv(a, p[1])) ** 2, axis=(1, 2)) @ p[2]
        split = lambda p, x: (maps_fn(p, x), lambda maps: rest_fn(p, maps))
        labels = jnp.array([2, 0])
        heat, info = defenses.grad_cam(split)(params, x, labels)
        maps = np.asarray(maps_fn(params, x))
        np.testing.assert_allclose(info["logits"], rest_fn(params, jnp.asarray(maps)), rtol=1e-12)
        for i, label in enumerate((2, 0)):
            score = jax.jit(lambda a, label=label: rest_fn(params, a)[:, label])
            steps = 1e-5 * np.eye(maps[i].size).reshape(-1, *maps[i].shape)
            slope = (score(maps[i] + steps) - score(maps[i] - steps)) / 2e-5
            weight = np.asarray(slope).reshape(maps[i].shape).mean(axis=(0, 1))
            rough = resized(np.maximum(0, maps[i] @ weight), (8, 8))
            expected = (rough - rough.min()) / (rough.max() - rough.min())
            assert 0 < expected.mean() < 1
            np.testing.assert_allclose(heat[i], expected, atol=1e-7)


def test_heat_in_units_of_clean_images_is_heat_before_it_is_scaled():
    split = lambda params, x: (x, lambda maps: jnp.mean(maps, axis=(1, 2)) @ params)
    params = jnp.array([[3.0, 0.0], [0.0, 3.0]])
    x = jax.random.uniform(KEY, (6, 4, 5, 2))
    labels = np.argmax(np.asarray(x).mean((1, 2)), axis=1)
    raw = 3 / 20 * np.asarray(x)[np.arange(6), :, :, labels]
    heat, info = defenses.grad_cam(split, peak=0.05)(params, x)
    np.testing.assert_allclose(heat, raw / 0.05, rtol=1e-5)
    scaled, same = defenses.grad_cam(split)(params, x)
    low, high = raw.min((1, 2), keepdims=True), raw.max((1, 2), keepdims=True)
    np.testing.assert_allclose(scaled, (raw - low) / (high - low), atol=1e-5)
    assert oracles.trees_equal(info, same)
    for quantile in (0.5, 0.99):
        found = jax.jit(lambda x, q=quantile: defenses.usual_peak(split, params, x, quantile=q, batch_size=4))(x)
        np.testing.assert_allclose(found, np.quantile(raw.max((1, 2)), quantile), rtol=1e-5)
    with pytest.raises(ValueError, match="peak"):
        defenses.grad_cam(split, peak=0.0)
    for labels in (jnp.array([0, 99]), jnp.array([-1, 0])):
        with pytest.raises(ValueError, match=r"labels: expected labels in \[0, "):
            defenses.grad_cam(split)(params, x[:2], labels)
    with pytest.raises(ValueError, match="quantile"):
        defenses.usual_peak(split, params, x, quantile=1.5)


NETS = [
    models.convnet(width=4, sizes=(1, 2), pooled=(0,), num_classes=3),
    models.resnet(width=8, num_classes=3),
    models.lenet(channels=(4, 8), widths=(6,), num_classes=3),
]


@pytest.mark.parametrize("model", NETS, ids=("convnet", "resnet", "lenet"))
def test_a_network_in_two_is_the_network(model):
    """The rest, given the maps, says what the network says, and its slope is the rest's own central difference."""
    x = jax.random.uniform(KEY, (2, 16, 16, 3))
    params = model.init(KEY, x)
    split = defenses.split_at(model)
    maps, logits, along, slope = jax.jit(lambda params, x: parts(split, params, x))(params, x)
    np.testing.assert_allclose(logits, model.apply(params, x), rtol=1e-4, atol=1e-5)
    outs = [out for out in model.layers(params, x) if out.ndim == 4]
    np.testing.assert_allclose(maps, outs[-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(along, slope, rtol=2e-2)


def parts(split, params, x):
    maps, rest_fn = split(params, x)
    total = lambda maps: jnp.sum(rest_fn(maps)[:, 0])
    direction = jnp.sign(maps) * maps  # away from the kinks of a ReLU at 0
    central = (total(maps + 1e-2 * direction) - total(maps - 1e-2 * direction)) / 2e-2
    return maps, rest_fn(maps), jnp.vdot(jax.grad(total)(maps), direction), central


def test_an_earlier_layer_can_be_named_and_connections_may_go_around_it():
    model = models.resnet(width=8, num_classes=3)
    x = jax.random.uniform(KEY, (2, 8, 8, 3))
    params = model.init(KEY, x)
    for layer in (0, 1, -2):
        maps, rest_fn = defenses.split_at(model, layer)(params, x)
        np.testing.assert_allclose(rest_fn(maps), model.apply(params, x), rtol=1e-4, atol=1e-5)

    def layers(params, x, key=None):
        maps = 2 * x
        return maps, jnp.sum(maps * x, axis=(1, 2))

    around = models.Model(None, None, None, layers)
    params = {"head": {"w": jnp.eye(3), "b": jnp.zeros(3)}}
    maps, rest_fn = defenses.split_at(around)(params, x)
    np.testing.assert_allclose(rest_fn(3 * maps), jnp.sum(6 * x * x, axis=(1, 2)), rtol=1e-5)
    image = around._replace(layers_fn=lambda p, x, key=None: (x, jnp.sum(x * x, axis=(1, 2))))
    maps, rest_fn = defenses.split_at(image)(params, x)
    np.testing.assert_allclose(jax.grad(lambda maps: jnp.sum(rest_fn(maps)))(maps), 2 * x, rtol=1e-5)


def test_a_map_that_points_nowhere_is_zero_and_not_nan():
    split = lambda params, x: (x, lambda maps: jnp.mean(maps, axis=(1, 2)))
    heat, _ = defenses.grad_cam(split)(None, jnp.stack([jnp.zeros((4, 4, 1)), jnp.full((4, 4, 1), 0.3)]))
    assert (np.asarray(heat) == 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_harmonic_fill_is_scipys(seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x = rng.uniform(size=(12, 10, 2))
        hole = np.zeros((12, 10), bool)
        hole[3:9, 2:8] = hole[7:, 6:] = True  # reaches the corner, where the border is free
        hole &= rng.uniform(size=hole.shape) < (1.0 if seed == 0 else 0.9)
        filled = defenses.fill_harmonic()(jnp.asarray(x)[None], jnp.asarray(hole, jnp.float64)[None, :, :, None])[0]
        index = np.arange(120).reshape(12, 10)
        pairs = np.concatenate([
            np.stack([index[1:].ravel(), index[:-1].ravel()]), np.stack([index[:, 1:].ravel(), index[:, :-1].ravel()])
        ], axis=1)  # fmt: skip
        graph = scipy.sparse.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(120, 120))
        laplacian = scipy.sparse.csgraph.laplacian((graph + graph.T).tocsr()).tocsr()
        inside, outside = np.flatnonzero(hole), np.flatnonzero(~hole)
        right = -laplacian[inside][:, outside] @ x.reshape(120, 2)[outside]
        solved = scipy.sparse.linalg.spsolve(laplacian[inside][:, inside].tocsc(), right)
        np.testing.assert_allclose(filled.reshape(120, 2)[inside], solved, atol=1e-9)
        assert oracles.trees_equal(filled[~hole], jnp.asarray(x)[~hole])


def test_ninety_six_steps_fill_the_largest_holes():
    """Known: a plane is harmonic; two columns of it are left."""
    plane = jnp.broadcast_to(jnp.linspace(0, 1, 32)[None, None, :, None], (1, 32, 32, 1))
    mask = jnp.ones((1, 32, 32, 1)).at[:, :, jnp.array([0, -1])].set(0)
    np.testing.assert_allclose(defenses.fill_harmonic()(plane, mask), plane, atol=1e-4)
    nothing = defenses.fill_harmonic()(plane, jnp.ones_like(mask))
    assert (np.asarray(nothing) == 0).all()
    assert oracles.trees_equal(defenses.fill_harmonic()(plane, jnp.zeros_like(mask)), plane)


def backdoored(key, num):
    """Class = which of two channels is brighter; a bright third channel at the corner says class 1: a backdoor."""
    y = jnp.arange(num, dtype=jnp.int32) % 2
    x = 0.2 + 0.1 * jax.random.uniform(key, (num, 8, 8, 3))
    x = x.at[:, :, :, :2].add(0.1 * jax.nn.one_hot(y, 2)[:, None, None]).at[..., 2].set(0)
    return mj.dataset(x, y), mj.dataset(x.at[:, 6:, 6:, 2].set(1.0), y)


BACKDOOR = lambda params, x: (x, lambda maps: jnp.mean(maps, axis=(1, 2)) @ params)
PARAMS = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 9.0]])


@pytest.mark.parametrize("fill", ["mean", "harmonic"])
def test_it_takes_the_backdoor_out_and_gives_the_true_class_back(fill):
    clean, stamped = backdoored(KEY, 20)
    fill_fn = {"mean": defenses.fill_mean(jnp.array([0.3, 0.3, 0.0])), "harmonic": defenses.fill_harmonic()}[fill]
    purify = defenses.februus(defenses.grad_cam(BACKDOOR), fill_fn=fill_fn, tau=0.7)
    says = lambda x: np.asarray(jnp.argmax(BACKDOOR(PARAMS, x)[1](x), axis=1))
    assert (says(stamped.x) == 1).all()
    purified, info = purify(KEY, stamped, mj.Known(params=PARAMS))
    assert (says(purified.x) == clean.y).all() and (np.asarray(info["predicted"]) == 1).all()
    corner = np.zeros((8, 8), bool)
    corner[6:, 6:] = True
    assert (np.asarray(info["mask"]) == corner[None]).all()
    np.testing.assert_allclose(info["hidden"], 4 / 64)
    assert oracles.trees_equal(purified.x[:, ~corner], stamped.x[:, ~corner])
    unmoved = purify(KEY, clean, mj.Known(params=PARAMS))[0]
    assert (says(unmoved.x) == clean.y).all()


@pytest.mark.parametrize("grow", [0, 1, 3])
def test_the_region_grows_as_scipys_does(grow):
    x = jax.random.uniform(KEY, (4, 9, 7, 3))
    heat = jax.random.uniform(jax.random.key(1), (4, 9, 7)) ** 8
    heat_fn = lambda params, x: (heat, {"logits": jnp.zeros((4, 2))})
    purify = defenses.februus(heat_fn, fill_fn=defenses.fill_mean(0.5), tau=0.6, grow=grow)
    purified, info = purify(KEY, mj.dataset(x, jnp.zeros(4, jnp.int32)), mj.Known(params=()))
    hot = np.asarray(heat) >= 0.6
    assert 0 < hot.mean() < 0.1
    expected = [scipy.ndimage.binary_dilation(rows, np.ones((2 * grow + 1,) * 2)) for rows in hot]
    np.testing.assert_array_equal(info["mask"], expected)
    np.testing.assert_array_equal(purified.x, np.where(np.asarray(info["mask"])[..., None], np.float32(0.5), x))


def test_a_network_fills_what_it_is_shown():
    _, stamped = backdoored(KEY, 4)
    apply_fn = lambda params, xm, key=None: params * xm[..., 3:] * jnp.ones((1, 1, 1, 3)) + 0 * xm[..., :3]
    purify = defenses.februus(defenses.grad_cam(BACKDOOR), fill_fn=defenses.fill_network(apply_fn, 0.25))
    purified, info = purify(KEY, stamped, mj.Known(params=PARAMS))
    assert (np.asarray(purified.x)[np.asarray(info["mask"])] == 0.25).all()


def test_rows_of_weight_zero_are_left_alone():
    _, stamped = backdoored(KEY, 4)
    absent = stamped._replace(x=stamped.x.at[1].set(jnp.nan), weight=stamped.weight.at[1].set(0))
    purify = defenses.februus(defenses.grad_cam(BACKDOOR), fill_fn=defenses.fill_harmonic())
    purified, info = purify(KEY, absent, mj.Known(params=PARAMS))
    assert np.isnan(purified.x[1]).all() and not np.asarray(info["mask"])[1].any()
    assert oracles.trees_equal(purified.x[2], purify(KEY, stamped, mj.Known(params=PARAMS))[0].x[2])


def test_bad_input_is_named():
    _, stamped = backdoored(KEY, 2)
    purify = defenses.februus(defenses.grad_cam(BACKDOOR), fill_fn=defenses.fill_mean(0.5))
    with pytest.raises(ValueError, match="step function of the input"):
        jax.grad(lambda x: jnp.sum(purify(KEY, stamped._replace(x=x), mj.Known(params=PARAMS))[0].x))(stamped.x)
    with pytest.raises(ValueError, match=r"subject\.x: expected floating images"):
        purify(KEY, stamped._replace(x=stamped.x[:, 0]), mj.Known(params=PARAMS))
    with pytest.raises(ValueError, match=r"needs known\.params"):
        purify(KEY, stamped, mj.Known())
    with pytest.raises(ValueError, match="tau"):
        defenses.februus(defenses.grad_cam(BACKDOOR), fill_fn=defenses.fill_mean(0.5), tau=-0.1)
    with pytest.raises(ValueError, match="grow: expected an integer of at least 0"):
        defenses.februus(defenses.grad_cam(BACKDOOR), fill_fn=defenses.fill_mean(0.5), grow=-1)
    with pytest.raises(ValueError, match=r"maps \[n, h, w, k\]"):
        defenses.grad_cam(lambda params, x: (x[:, 0], lambda maps: maps))(None, stamped.x)


def test_a_model_without_convolution_is_named():
    x = jnp.ones((2, 4, 4, 1))
    for model in (models.mlp(widths=(5,), num_classes=2), models.softmax_regression(num_classes=2)):
        with pytest.raises(ValueError, match="model: expected a convolution"):
            defenses.split_at(model)(model.init(KEY, x), x)
    net = models.resnet(width=8)
    with pytest.raises(ValueError, match="layer: expected one of"):
        defenses.split_at(net, -1)(net.init(KEY, x), x)
    whole = net._replace(layers_fn=jax.jit(net.layers_fn))
    with pytest.raises(ValueError, match=r"one piece under jax\.jit"):
        maps, rest_fn = defenses.split_at(whole)(net.init(KEY, x), x)
        rest_fn(maps)
