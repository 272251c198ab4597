"""The networks: shapes, names, dropout, dtypes, and gradients against central differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import models

KEY = jax.random.key(0)

# name: (model, shape of a row, outputs, features)
NETS = {
    "linear": (models.linear(num_outputs=2, scale=0.1), (5,), 2, 5),
    "softmax_regression": (models.softmax_regression(num_classes=3, scale=0.1), (4, 4, 1), 3, 16),
    "logistic_regression": (models.logistic_regression(scale=0.1), (5,), 1, 5),
    "mlp": (models.mlp(widths=(7, 6), num_classes=3, dropout=0.5), (4, 4, 1), 3, 6),
    "lenet": (
        models.lenet(channels=(2, 3), widths=(6, 5), num_classes=4, kernel=3, pooling="max", dropout=0.5),
        (8, 8, 1),
        4,
        5,
    ),
    "resnet": (models.resnet(width=4, blocks=(1, 1), groups=2, num_classes=3, dropout=0.5), (8, 8, 3), 3, 8),
}


@pytest.fixture(scope="module")
def compiled():
    """Every network, initialised and compiled once: `name -> (params, apply, features, x)`."""
    out = {}
    for name, (model, shape, _, _) in NETS.items():
        x = jax.random.uniform(jax.random.key(1), (3, *shape))
        out[name] = jax.jit(model.init)(KEY, x), jax.jit(model.apply), jax.jit(model.features), x
    return out


@pytest.mark.parametrize("name", list(NETS))
def test_shapes_names_and_dropout(compiled, name):
    model, shape, num_outputs, num_features = NETS[name]
    params, apply, features, x = compiled[name]
    logits, hidden = apply(params, x), features(params, x)
    assert logits.shape == (3, num_outputs) and hidden.shape == (3, num_features)
    np.testing.assert_allclose(hidden @ params["head"]["w"] + params["head"]["b"][None], logits, rtol=1e-5, atol=1e-6)
    assert logits.dtype == jnp.float32
    trained = apply(params, x, KEY)
    np.testing.assert_array_equal(trained, apply(params, x, KEY))  # same key, same bits
    if name in ("mlp", "lenet", "resnet"):
        assert not np.allclose(trained, logits) and not np.allclose(trained, apply(params, x, jax.random.key(5)))
    else:
        np.testing.assert_array_equal(trained, logits)
    from_shape = jax.eval_shape(lambda key: model.init(key, shape), KEY)
    assert jax.tree.map(jnp.shape, from_shape) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("name", ["softmax_regression", "mlp", "lenet", "resnet"])
def test_seeds_are_a_vmap_and_a_second_call_does_not_retrace(compiled, name):
    model = NETS[name][0]
    x = compiled[name][3]
    traces = []

    @jax.jit
    def logits(keys, x):
        traces.append(1)
        return jax.vmap(lambda key: model.apply(model.init(key, x), x))(keys)

    keys = jax.random.split(KEY, 2)
    both = logits(keys, x)
    logits(keys[::-1], x + 0.1)
    assert len(traces) == 1
    for key, found in zip(keys, both, strict=True):
        expected = compiled[name][1](jax.jit(model.init)(key, x), x)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(both[0], both[1])


def central(f, x, direction, step):
    moved = lambda t: f(jax.tree.map(lambda a, d: a + t * d, x, direction))
    return (moved(step) - moved(-step)) / (2 * step)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_lenet_gradients_and_curvature_agree_with_central_differences_on_ties(pooling):
    """Flat images, so that windows tie; parameters and the images' own strokes move, the background stays."""
    with jax.enable_x64(True):
        sizes = dict(channels=(2, 3), widths=(6,), num_classes=3, kernel=3)
        model = models.lenet(**sizes, pooling=pooling, activation_fn=jnp.tanh)
        generator = np.random.default_rng(2)
        x = np.zeros((3, 12, 12, 1))
        x[:, 4:7, 4:7] = generator.uniform(0.2, 1, (3, 3, 3, 1))
        x, mask = jnp.asarray(x), jnp.asarray(x > 0)
        # Biases off 0: there the zero padding of the second convolution ties with a background that can move.
        params = jax.tree.map(lambda a: a + 0.1 * jnp.asarray(generator.normal(size=a.shape)), model.init(KEY, x))
        y = jax.nn.one_hot(jnp.arange(3), 3, dtype=jnp.float64)
        loss = lambda z: -jnp.mean(jnp.sum(jax.nn.log_softmax(model.apply(z[0], jnp.where(mask, z[1], 0))) * y, 1))
        z = (params, x)
        u = jax.tree.map(lambda a: jnp.asarray(generator.normal(size=a.shape)), z)
        inner = lambda a, b: sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
        slope = lambda z: inner(jax.grad(loss)(z), u)
        value, first, second = jax.jit(lambda z: (loss(z), slope(z), jax.jvp(slope, (z,), (u,))[1]))(z)
        assert np.isfinite(value)
        np.testing.assert_allclose(first, central(jax.jit(loss), z, u, 1e-6), rtol=1e-7)
        np.testing.assert_allclose(second, central(jax.jit(slope), z, u, 1e-6), rtol=1e-6)


def test_parameter_counts():
    count = lambda model, shape: sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda key: model.init(key, shape), KEY))
    )
    assert count(models.lenet(), (28, 28, 1)) == 454_922
    assert count(models.lenet(channels=(8, 16), widths=(64,)), (28, 28, 1)) == 54_314
    assert count(models.softmax_regression(), (28, 28, 1)) == 7850
    assert count(models.mlp(), (28, 28, 1)) == 79_510


def test_float64_and_the_scale_of_the_initial_weights():
    with jax.enable_x64(True):
        model = models.mlp(widths=(400,), num_classes=2)
        params = model.init(KEY, jnp.zeros((1, 300)))
        assert model.apply(params, jnp.ones((2, 300))).dtype == jnp.float64
        assert math.isclose(float(jnp.std(params["layer0"]["w"])), math.sqrt(2 / 300), rel_tol=0.02)
        assert math.isclose(float(jnp.std(params["head"]["w"])), math.sqrt(1 / 400), rel_tol=0.1)
    zero = models.softmax_regression().init(KEY, (4,))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero))


def test_normalisation_lives_inside():
    x = jax.random.uniform(KEY, (2, 8, 8, 3))
    mean, std = np.array([0.1, 0.2, 0.3], np.float32), np.array([0.5, 1.0, 2.0], np.float32)
    options = dict(channels=(2,), widths=(4,), num_classes=3, kernel=3)
    inside, plain = models.lenet(**options, mean=mean, std=std), models.lenet(**options)
    params = plain.init(KEY, x)
    expected = plain.apply(params, (x - mean[None, None, None]) / std[None, None, None])
    np.testing.assert_allclose(inside.apply(params, x), expected, rtol=1e-5, atol=1e-6)
    ours = models.linear(mean=0.5, std=2.0)
    np.testing.assert_allclose(ours.features({}, x), (x.reshape(2, -1) - 0.5) / 2, rtol=1e-6)


@pytest.mark.parametrize("over", ["map", "vmap"])
def test_an_ensemble_is_each_member_by_itself(compiled, over):
    nets = ["softmax_regression", "mlp"]
    x = compiled["mlp"][3]
    keys = jax.random.split(KEY, 3)
    stacked = tuple(jax.vmap(lambda key, n=name: NETS[n][0].init(key, x))(keys[: 2 + (name == "mlp")]) for name in nets)
    fn = jax.jit(models.ensemble([NETS[name][0].features for name in nets], over=over))
    out = fn(stacked, x)
    assert [[leaf.shape for leaf in each] for each in out] == [[(3, 16)] * 2, [(3, 6)] * 3]
    for name, own, found in zip(nets, stacked, out, strict=True):
        for member in range(len(found)):
            expected = NETS[name][0].features(jax.tree.map(lambda leaf, m=member: leaf[m], own), x)
            np.testing.assert_allclose(found[member], expected, rtol=1e-5, atol=1e-6)
    dropped = fn(stacked, x, KEY)[1]
    assert not np.array_equal(dropped[0] == 0, dropped[1] == 0)  # every member its own key


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: models.mlp().apply({}, jnp.zeros((2, 4), jnp.uint8)), r"scale images to \[0, 1\]"),
        (lambda: models.lenet().init(KEY, jnp.zeros((2, 8, 8, 1), jnp.int32)), r"scale images to \[0, 1\]"),
        (lambda: models.lenet().init(KEY, (8,)), "expected images"),
        (lambda: models.lenet(pooling="min"), "pooling: expected one of"),
        (lambda: models.lenet(channels=()), "channels: expected at least one"),
        (lambda: models.mlp(widths=(0,)), "widths: expected an integer of at least 1"),
        (lambda: models.mlp(dropout=1.0), "dropout: expected less than 1"),
        (lambda: models.mlp(std=0.0), "std: expected more than 0"),
        (lambda: models.resnet(width=6, groups=4), "groups: expected a divisor"),
        (lambda: models.resnet(blocks=()), "blocks: expected at least one"),
        (lambda: models.linear(scale=-1.0), "scale: expected at least 0"),
        (lambda: models.softmax_regression(num_classes=1), "num_classes: expected an integer of at least 2"),
        (lambda: models.linear().init(KEY, jnp.zeros(3)), "x: expected a batch"),
        (lambda: models.ensemble(lambda p, x: x), "fns: expected a sequence"),
        (lambda: models.ensemble([lambda p, x, key: x], over="loop"), "over: expected one of"),
        (lambda: models.ensemble([lambda p, x, key: x])((), jnp.zeros(2)), "params: expected a tuple of 1"),
        (
            lambda: models.ensemble([lambda p, x, key: x])(({"a": jnp.zeros(2), "b": jnp.zeros(3)},), jnp.zeros(2)),
            "lead with the members' axis",
        ),
    ],
)
def test_wrong_arguments_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
