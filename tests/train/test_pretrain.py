"""The augmentation against its definition pixel by pixel, and the pre-training recipe."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import combine, losses, models, parallel, train

KEY = jax.random.key(0)
MODEL = models.convnet(width=4, sizes=(1, 2), pooled=(0, 1), num_classes=2, groups=2, block_dropout=0.1)
RECIPE = train.Recipe(num_epochs=6, batch_size=8, learning_rate=0.1, pad=1)


def stripes(n):
    """Images of 8x8 whose class is the direction of their stripes: neither a shift nor a flip changes it."""
    generator = np.random.default_rng(0)
    y = np.arange(n) % 2
    lines = (np.arange(8) + generator.integers(0, 2, n)[:, None]) % 2
    x = np.where(y[:, None, None] > 0, lines[:, :, None], lines[:, None, :]) + 0.1 * generator.normal(size=(n, 8, 8))
    return mj.dataset(x[..., None].astype(np.float32), y)


@pytest.mark.parametrize("flip", [False, True])
def test_every_augmented_image_is_a_crop_of_the_padded_one(flip):
    x = jax.random.uniform(KEY, (60, 5, 4, 2))
    batch = mj.dataset(x, jnp.arange(60))
    out = jax.jit(train.augment(pad=1, flip=flip))(jax.random.key(1), batch)
    np.testing.assert_array_equal(out.y, batch.y)
    np.testing.assert_array_equal(out.weight, batch.weight)
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for image, big in zip(np.asarray(out.x), padded, strict=True):
        kinds = [
            (i, j, mirrored)
            for i in range(3)
            for j in range(3)
            for mirrored in ((False, True) if flip else (False,))
            if np.array_equal(image, big[i : i + 5, j : j + 4][:, :: -1 if mirrored else 1])
        ]
        assert len(kinds) == 1  # exactly one crop, bit for bit
        seen.add(kinds[0])
    assert len(seen) > (14 if flip else 8)  # of 18, or all 9
    same = train.augment(pad=0, flip=False)(KEY, batch)
    np.testing.assert_array_equal(same.x, x)


def test_subpixel_shifts_interpolate_and_gradients_are_the_transpose(x64):
    x = jax.random.uniform(KEY, (3, 6, 6, 1))
    batch = mj.dataset(x, jnp.arange(3))
    act = train.augment(pad=1.5, flip=True, subpixel=True)
    ramp = jnp.broadcast_to(jnp.arange(6.0)[None, :, None, None], (3, 6, 6, 1))
    out = act(KEY, batch._replace(x=ramp)).x
    inside = out[:, 2:4, 2:4]  # a linear ramp stays one away from the border: shifted by its own amount
    shift = inside[:, :1, :1] - ramp[:, 2:3, 2:3]
    np.testing.assert_allclose(inside, ramp[:, 2:4, 2:4] + jnp.broadcast_to(shift, inside.shape), rtol=1e-12)
    assert np.all(np.abs(shift) <= 1.5) and len(np.unique(np.asarray(shift).round(6))) == 3
    f = lambda x: jnp.sum(jnp.sin(3 * act(KEY, batch._replace(x=x)).x))
    u = jax.random.normal(jax.random.key(2), x.shape)
    central = (f(x + 1e-6 * u) - f(x - 1e-6 * u)) / 2e-6
    np.testing.assert_allclose(jnp.vdot(jax.grad(f)(x), u), central, rtol=1e-7)
    zero = train.augment(pad=0.0, flip=False, subpixel=True)(KEY, batch)
    np.testing.assert_array_equal(zero.x, x)


def test_the_recipe_learns_and_is_the_sgd_that_it_says():
    data, held_out = stripes(64), stripes(40)
    params, info = jax.jit(lambda key: train.pretrain(key, MODEL, data, RECIPE))(KEY)
    right = jnp.argmax(MODEL.apply(params, held_out.x), axis=1) == held_out.y
    assert jnp.mean(right) > 0.95
    expected = losses.empirical(losses.cross_entropy(MODEL.apply))(params, data)
    np.testing.assert_allclose(info["loss"], expected, rtol=1e-4)

    bare = train.Recipe(num_epochs=2, batch_size=64, warmup=0.5, pad=0, flip=False, weight_decay=0.01)
    plain = models.softmax_regression(num_classes=2)
    found, _ = train.pretrain(KEY, plain, data, bare)
    w, slope = plain.init(KEY, data.x), jax.grad(losses.empirical(losses.cross_entropy(plain.apply)))
    trace = jax.tree.map(jnp.zeros_like, w)
    for rate in (0.0, bare.learning_rate):  # one step of warm-up, then the top of the cosine
        grad = jax.tree.map(lambda g, p: g + 0.01 * p, slope(w, data), w)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, grad)
        w = jax.tree.map(lambda p, t, g, r=rate: p - r * (g + 0.9 * t), w, trace, grad)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, w)


@pytest.mark.slow
def test_weights_bfloat16_and_seeds():
    data = stripes(16)
    short = RECIPE._replace(num_epochs=1)
    run = jax.jit(lambda key, data: train.pretrain(key, MODEL, data, short))
    broken = data._replace(x=data.x.at[3].set(jnp.nan), weight=data.weight.at[3].set(0.0))
    other = data._replace(x=data.x.at[3].set(9.0), weight=data.weight.at[3].set(0.0))
    (first, info), (second, _) = run(KEY, broken), run(KEY, other)
    assert np.isfinite(info["loss"])
    jax.tree.map(np.testing.assert_array_equal, first, second)  # a row of weight 0 is absent
    half, _ = train.pretrain(KEY, models.in_bfloat16(MODEL), data, short)
    full, _ = run(KEY, data)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    near = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), half, full)
    assert 0 < max(jax.tree.leaves(near)) < 0.1
    untrained, _ = train.pretrain(KEY, MODEL, data, short._replace(num_epochs=0))
    jax.tree.map(np.testing.assert_array_equal, untrained, MODEL.init(jax.random.split(KEY)[0], data.x))


def test_the_augmentation_composes_into_any_trainer():
    data = stripes(16)
    trainer = combine.defended(
        train.scratch(losses.cross_entropy(MODEL.apply), num_epochs=1, batch_size=8, num_rows=16),
        during=train.augment(pad=1),
    )
    params = MODEL.init(KEY, data.x)
    goal = jax.jit(jax.grad(lambda x: optax.tree.norm(trainer(KEY, params, data._replace(x=x))[0]).astype(x.dtype)))
    assert jnp.any(goal(data.x) != 0)


def test_the_recipes_rates_are_operands():
    data, net = stripes(16), models.softmax_regression(num_classes=2)

    def fit(*rates):
        fields = dict(zip(("learning_rate", "momentum", "weight_decay"), rates))
        return train.pretrain(KEY, net, data, RECIPE._replace(**fields))[0]

    rates = (jnp.array([0.1, 0.0]), jnp.array([0.9, 0.5]), jnp.array([0.1, 0.0]))
    found = jax.jit(jax.vmap(fit))(*rates)
    for i, each in enumerate(zip(*(rate.tolist() for rate in rates))):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), found, fit(*each))


def test_the_frozen_statistics_of_an_adapted_network_stay_what_they_are():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2)(linen.BatchNorm(use_running_average=True)(x.reshape(x.shape[0], -1)))

    data, net = stripes(16), models.adapt.linen(Net())
    start = net.init(jax.random.split(KEY)[0], data.x[:1])
    params, _ = train.pretrain(KEY, net, data, RECIPE, trainable=models.adapt.trainable)
    jax.tree.map(np.testing.assert_array_equal, params["state"], start["state"])
    assert not np.allclose(params["params"]["Dense_0"]["kernel"], start["params"]["Dense_0"]["kernel"])


@pytest.mark.parametrize("mesh", [parallel.mesh(1), jax.make_mesh((1,), ("rows",))], ids=["ours", "jax's"])
def test_a_mesh_of_one_device_changes_nothing(mesh):
    data, net = stripes(16), models.softmax_regression(num_classes=2)
    fit = lambda mesh: train.pretrain(KEY, net, data, RECIPE._replace(num_epochs=1), mesh=mesh)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), fit(mesh), fit(None))


@pytest.mark.slow
def test_rows_of_a_batch_spread_over_two_devices():
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from mlsec_jax import train
        from tests.train.test_pretrain import KEY, MODEL, RECIPE, stripes
        data, short = stripes(32), RECIPE._replace(num_epochs=1)
        mesh = jax.make_mesh((2,), ("rows",))
        one, _ = jax.jit(lambda key, data: train.pretrain(key, MODEL, data, short))(KEY, data)
        two = jax.jit(lambda key, data: train.pretrain(key, MODEL, data, short, mesh=mesh)).lower(KEY, data).compile()
        assert "all-reduce" in two.as_text()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), two(KEY, data)[0], one)
    """
    flags = "--xla_force_host_platform_device_count=2"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True)
    assert not out.returncode, out.stderr


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: train.augment(pad=-1), "pad: expected an integer of at least 0"),
        (lambda: train.augment(pad=0.5), "pad: expected an integer"),
        (lambda: train.augment()(KEY, mj.dataset(jnp.ones((2, 3)), jnp.arange(2))), "batch.x: expected floating images"),
        (lambda: train.pretrain(KEY, MODEL, stripes(4), RECIPE), "train.num_rows: expected an integer of at least 8"),
        (lambda: train.pretrain(KEY, MODEL, stripes(8), RECIPE._replace(warmup=2.0)), "recipe.warmup: expected between"),
    ],
)
def test_wrong_arguments_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
