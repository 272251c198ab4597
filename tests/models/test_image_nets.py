"""The networks for 32x32 images: sizes, layers, dropout, gradients, ensembles; the depthwise convolution."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mlsec_jax import models
from mlsec_jax.models import _depthwise
from mlsec_jax.models._norm import group_norm

KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # each compiled once, run a few times
MAKE = {
    "resnet": lambda **o: models.resnet(width=4, blocks=(1, 1), **o),
    "vgg": lambda **o: models.vgg(width=2, **o),
    "mobilenet": lambda **o: models.mobilenet(width=4, blocks=(1, 2, 1, 1, 1, 1, 1), **o),
    "convnet": lambda **o: models.convnet(width=4, sizes=(1, 2, 2), pooled=(1, 2), **o),
    "alexnet": lambda **o: models.alexnet(width=4, **o),
}
# name: (side of the images, features, blocks)
EXPECTED = {
    "resnet": (8, 8, 2),
    "vgg": (32, 16, 5),
    "mobilenet": (8, 160, 8),
    "convnet": (8, 32, 3),
    "alexnet": (8, 12, 2),
}


def count(model, shape=(32, 32, 3)):
    leaves = jax.tree.leaves(jax.eval_shape(lambda key: model.init(key, shape), KEY))
    return sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "mobilenet" else ()) for name in MAKE]
)
def test_layers_dropout_and_gradients(name):
    """Layers end in the features, each dropout acts under a key and nowhere else, gradients are right: one program."""
    side, num_features, num_blocks = EXPECTED[name]
    make = lambda **rates: MAKE[name](num_classes=3, groups=2, activation_fn=jnp.tanh, **rates)

    def loss(z, rates, key):
        model = make(**rates)
        layers = model.layers(*z, key)
        return jnp.sum(jnp.sin(jnp.arange(1.0, 7.0).reshape(2, 3) * model.apply(*z, key))), (layers, model.apply(*z, key))

    with jax.enable_x64(True):
        generator = np.random.default_rng(1)
        x = jnp.asarray(generator.uniform(size=(2, side, side, 3)))
        shapes = jax.eval_shape(make().init, KEY, x)
        params = jax.tree.map(lambda a: jnp.asarray(generator.normal(0.3, 0.3, size=a.shape)), shapes)
        z, program = (params, x), jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
        run = lambda block, last, z=z, key=KEY: program(z, {"block_dropout": block, "dropout": last}, key)
        (_, (layers, logits)), grad = run(0.0, 0.0)
        _, (dropped, noisy) = run(0.25, 0.5)[0]
        _, (other, _) = run(0.25, 0.5, key=jax.random.key(1))[0]
        assert len(layers) == num_blocks + 1 and layers[-1].shape == (2, num_features)
        assert all(layer.shape[0] == 2 and layer.ndim == 4 for layer in layers[:-1])
        head = params["head"]
        for hidden, out in ((layers[-1], logits), (dropped[-1], noisy)):
            np.testing.assert_allclose(hidden @ head["w"] + head["b"][None], out, rtol=1e-10)
        for block in range(num_blocks):
            acts = not np.allclose(layers[block], dropped[block])
            assert acts or (block == 0 and name in ("convnet", "alexnet"))  # theirs comes after the first block
        assert np.any(dropped[-1] == 0) and not np.any(layers[-1] == 0)
        assert not np.allclose(dropped[-2], other[-2])

        u = jax.tree.map(lambda a: jnp.asarray(generator.normal(size=a.shape)), z)
        low, high = (run(0.0, 0.0, jax.tree.map(lambda a, b, t=t: a + t * b, z, u))[0][0] for t in (-1e-6, 1e-6))
        slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(u), strict=True))
        np.testing.assert_allclose(slope, (high - low) / 2e-6, rtol=1e-5)
        # Evaluation, without a key, is the program without any dropout.
        both = make(block_dropout=0.25, dropout=0.5)
        assert str(jax.make_jaxpr(both.apply)(params, x)) == str(jax.make_jaxpr(make().apply)(params, x))


def test_parameter_counts_are_those_of_the_published_networks():
    """As counted in PyTorch, where batch norm has as many parameters as group norm."""
    assert count(models.resnet(width=64, blocks=(2, 2, 2, 2))) == 11_173_962
    assert count(models.mobilenet(width=32)) == 2_296_922
    assert count(models.vgg(width=64)) == 9_231_114 - 2752  # there, convolutions have a bias before the norm
    convolutions = 3 * 9 * 16 + 9 * (16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 2 * (16 + 32 + 32 + 64 + 64)
    assert count(models.convnet()) == convolutions + 64 * 10 + 10
    brew = models.convnet(width=32, pooled=(3, 4), window=3)
    assert brew.init(KEY, (32, 32, 3))["head"]["w"].shape == (36 * 32, 10)
    dense = (7 * 7 * 64 + 1) * 384 + 385 * 192 + 193 * 10
    assert count(models.alexnet(width=64)) == 75 * 64 + 1600 * 64 + 4 * 64 + dense


def test_without_normalisation_a_place_sees_its_surroundings_alone():
    x = jax.random.uniform(KEY, (1, 16, 16, 1))
    changed = [int(np.sum(np.any(maps[0][0] != maps[1][0], axis=2))) for maps in (both(x, None), both(x, 2))]
    assert changed == [4, 16]  # pixel 7 reaches 6 to 8, pooled 3 and 4, then 2 to 5, pooled 1 and 2; everything
    model = models.convnet(width=4, sizes=(1, 2), pooled=(0, 1), groups=None, averaged=True)
    params = model.init(KEY, x)
    assert params["conv0"].keys() == {"w", "b"} and params["head"]["w"].shape == (8, 10)
    maps, features = model.layers(params, x)[1:]
    np.testing.assert_allclose(features, np.mean(maps, axis=(1, 2)), rtol=1e-6)


def both(x, groups):
    """The last maps of an image and of the same with another pixel in its middle."""
    model = models.convnet(width=4, sizes=(1, 2), pooled=(0, 1), groups=groups, averaged=True, activation_fn=jnp.tanh)
    params = model.init(KEY, x)
    return [model.layers(params, each)[1] for each in (x, x.at[:, 7, 7].add(1))]


def test_an_ensemble_of_several_layers_is_each_member_by_itself():
    nets = [MAKE["resnet"](num_classes=3, groups=2, block_dropout=0.2), MAKE["convnet"](num_classes=3, groups=2)]
    x = jax.random.uniform(KEY, (2, 8, 8, 3))
    stacked = tuple(jax.vmap(lambda key, n=net: n.init(key, x))(jax.random.split(KEY, 2)) for net in nets)
    last_two = [lambda *args, n=net: n.layers(*args)[-2:] for net in nets]
    out, dropped = jax.jit(lambda p, x, key: (models.ensemble(last_two)(p, x), models.ensemble(last_two)(p, x, key)))(
        stacked, x, KEY
    )
    shapes = [[[leaf.shape for leaf in member] for member in own] for own in out]
    assert shapes == [[[(2, 4, 4, 8), (2, 8)]] * 2, [[(2, 2, 2, 8), (2, 32)]] * 2]
    for net, own, found in zip(nets, stacked, out, strict=True):
        expected = jax.jit(net.layers)(jax.tree.map(lambda leaf: leaf[1], own), x)[-2:]
        for a, b in zip(found[1], expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not np.allclose(dropped[0][0][-1], out[0][0][-1])
    np.testing.assert_allclose(dropped[1][0][-1], out[1][0][-1], rtol=1e-5)  # without dropout a key changes nothing
    mlp = models.mlp(widths=(4,), num_classes=2)
    (only,) = mlp.layers(mlp.init(KEY, (3,)), jnp.ones((2, 3)))
    assert only.shape == (2, 4)


def test_group_norm_against_its_definition():
    generator = np.random.default_rng(0)
    x = generator.normal(3, 2, size=(2, 3, 4, 6)).astype(np.float32)
    scale, bias = generator.normal(size=(2, 6)).astype(np.float32)
    grouped = x.reshape(2, 12, 3, 2).astype(np.float64)
    normed = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
    expected = normed.reshape(x.shape) * scale + bias
    np.testing.assert_allclose(group_norm(jnp.asarray(x), scale, bias, 3), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(group_norm(jnp.asarray(x), scale, bias, 9), expected, rtol=1e-4, atol=1e-5)  # gcd 3


@pytest.mark.parametrize(("taps", "stride", "shape"), [((3, 3), 1, (5, 6)), ((3, 3), 2, (6, 7)), ((1, 5), 3, (7, 8))])
def test_depthwise_is_xlas_grouped_convolution_in_every_order(taps, stride, shape):
    def reference(x, k):
        return lax.conv_general_dilated(
            x,
            k[:, :, None],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[3],
        )

    def batches(grad, x, k, own=True):
        """Gradients of three batches, of images, of kernels and of both; `own`: by `vmap`, not one by one."""
        xs, ks = jnp.stack([x, 2 * x]), jnp.stack([k, jnp.sin(k)])
        if own:
            return [jax.vmap(grad, axes)(*a) for axes, a in (((0, None), (xs, k)), ((None, 0), (x, ks)), (0, (xs, ks)))]
        stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        pairs = ([(xs[0], k), (xs[1], k)], [(x, ks[0]), (x, ks[1])], [(xs[0], ks[0]), (xs[1], ks[1])])
        return [stack(*(grad(*pair) for pair in two)) for two in pairs]

    def orders(f, x, k):
        grad = jax.grad(lambda x, k: jnp.sum(jnp.sin(f(x, k))), (0, 1))
        return {
            "value": f(x, k),
            "grad": grad(x, k),
            "forward over reverse": jax.jvp(grad, (x, k), (jnp.cos(x), jnp.cos(k)))[1],
            "reverse over reverse": jax.grad(lambda x: sum(jnp.sum(g**3) for g in grad(x, k)))(x),
            "in a loop": lax.scan(lambda k, _: (k - 0.1 * grad(x, k)[1], None), k, length=2)[0],
            "batches": batches(grad, x, k, own=f is not reference),
        }

    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        x, k = (jnp.asarray(generator.normal(size=s)) for s in ((2, *shape, 3), (*taps, 3)))
        both = jax.jit(lambda x, k: (orders(lambda *a: models.depthwise(*a, stride=stride), x, k), orders(reference, x, k)))
        found, expected = both(x, k)
    for order in expected:
        for a, b in zip(jax.tree.leaves(found[order]), jax.tree.leaves(expected[order]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=order)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_depthwise_sums_halves_over_many_images_as_exactly_as_xla(dtype):
    x, y = (jax.random.uniform(key, (512, 8, 8, 4)).astype(dtype) for key in jax.random.split(KEY))
    theirs = lambda x, k: lax.conv_general_dilated(
        x, k[:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    slope = lambda f, x, y: jax.vjp(lambda k: f(x, k), jnp.ones((3, 3, 4), x.dtype))[1](y)[0].astype(jnp.float32)
    exact = slope(theirs, x.astype(jnp.float32), y.astype(jnp.float32))
    error = lambda f: float(jnp.linalg.norm(slope(f, x, y) - exact) / jnp.linalg.norm(exact))
    assert error(models.depthwise) <= 2 * error(theirs), (error(models.depthwise), error(theirs))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_depthwise_lowers_for_accelerators_to_the_same_values(platform):
    x, k = jnp.ones((2, 5, 6, 3)), jnp.ones((3, 3, 3))
    grad = jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(models.depthwise(x, k))), (0, 1)))
    text = jax.export.export(grad, platforms=[platform])(x, k).mlir_module()
    assert "feature_group_count = 3" in text and "while" not in text
    generator = np.random.default_rng(0)
    x, y, k = (jnp.asarray(generator.normal(size=s).astype(np.float32)) for s in (x.shape, x.shape, k.shape))
    np.testing.assert_allclose(_depthwise._run_depthwise(x, k), models.depthwise(x, k), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        _depthwise._run_correlate(x, y, taps=(3, 3)), _depthwise._run_correlate_cpu(x, y, taps=(3, 3)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: models.vgg().init(KEY, (16, 16, 3)), "expected images .* of at least 32x32"),
        (lambda: models.vgg(block_dropout=1.0), "block_dropout: expected less than 1"),
        (lambda: models.resnet(block_dropout=-0.1), "block_dropout: expected between"),
        (lambda: models.mobilenet(width=6), "width: expected a multiple of 4"),
        (lambda: models.mobilenet(blocks=(1, 1)), "blocks: expected 7 numbers"),
        (lambda: models.convnet(pooled=(5,)), "pooled: expected different convolutions"),
        (lambda: models.convnet(sizes=()), "sizes: expected at least one"),
        (lambda: models.alexnet(width=0), "width: expected an integer of at least 1"),
        (lambda: models.alexnet().init(KEY, (6, 6, 3)), "at least 7x7"),
        (lambda: models.depthwise(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 3))), "with the same c"),
        (lambda: models.depthwise(jnp.ones((1, 4, 4, 2), int), jnp.ones((3, 3, 2))), "floating dtype"),
        (lambda: models.depthwise(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2)), stride=0), "stride: expected"),
        (lambda: models.depthwise(jnp.ones((1, 4, 4, 2)), jnp.ones((2, 3, 2))), "odd sides"),
    ],
)
def test_wrong_arguments_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_bfloat16_is_inside_only():
    """Outputs, layers and gradients keep float32 and come near the plain network's; dropout draws the same entries."""
    net = MAKE["convnet"](num_classes=3, groups=2, dropout=0.3)
    half = models.in_bfloat16(net)
    x = jax.random.uniform(KEY, (2, 8, 8, 3))
    params = half.init(KEY, x)

    @jax.jit
    def seen(params, x):
        both = []
        for model in (net, half):
            loss = lambda params, x, model=model: jnp.sum(jnp.square(model.apply(params, x, KEY)))
            both.append((model.layers(params, x), model.features(params, x, KEY), jax.grad(loss, (0, 1))(params, x)))
        return both

    plain, rounded = seen(params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype("float32")}
    vectors = lambda seen: [*jax.tree.leaves(seen[:2]), jax.flatten_util.ravel_pytree(seen[2])[0]]  # all gradients as one
    gaps = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in zip(vectors(plain), vectors(rounded))]
    assert 0 < max(gaps[:-1]) < 0.02 and gaps[-1] < 0.15, gaps
    assert models.in_bfloat16(models.Model(None, net.apply, net.features)).layers(params, x)[0].shape == (2, 32)
