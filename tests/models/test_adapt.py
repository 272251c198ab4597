"""Adapted networks give the libraries' own numbers, freeze their statistics, and take the loop-safe convolution."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mlsec_jax.models import adapt

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(6, 8, 8, 2)).astype(np.float32)


class LinenNet(linen.Module):
    def setup(self):
        self.conv = linen.Conv(4, (3, 3), conv_general_dilated=adapt.loop_safe_conv)
        self.norm = linen.BatchNorm(use_running_average=True)
        self.drop = linen.Dropout(0.5)
        self.head = linen.Dense(3)

    def features(self, x, deterministic=True):
        h = linen.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.drop(h, deterministic=deterministic)

    def __call__(self, x, deterministic=True):
        return self.head(self.features(x, deterministic))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), conv_general_dilated=adapt.loop_safe_conv, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def features(self, x):
        return self.drop(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    def __call__(self, x):
        return self.head(self.features(x))


def make_linen():
    net = LinenNet()
    model = adapt.linen(net, flags_fn=lambda train: {"deterministic": not train}, features_method="features")
    params = model.init(KEY, X)
    state = {"batch_stats": jax.tree.map(lambda leaf: leaf + 0.3, params["state"]["batch_stats"])}
    params = params | {"state": state}
    return model, params, net.apply({"params": params["params"], **state}, X)


def make_nnx():
    net = NnxNet(nnx.Rngs(3))
    net.norm.mean[...] = net.norm.mean[...] + 0.3
    model = adapt.nnx(NnxNet, features_method="features")
    net.eval()
    return model, adapt.nnx_params(net), net(X)


def make_equinox():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout
        head: eqx.nn.Linear

        def __init__(self, key):
            key_conv, key_head = jax.random.split(key)
            self.conv = eqx.nn.Conv2d(2, 4, 3, padding=1, key=key_conv)
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
            self.drop = eqx.nn.Dropout(0.5)
            self.head = eqx.nn.Linear(4, 3, key=key_head)

        def features(self, x, state, key=None):
            h, state = self.norm(self.conv(jnp.moveaxis(x, -1, 0)), state)
            return self.drop(jax.nn.relu(h).mean((1, 2)), key=key), state

        def __call__(self, x, state, key=None):
            h, state = self.features(x, state, key)
            return self.head(h), state

    create = eqx.nn.make_with_state(Net)
    model = adapt.equinox(create, features_method="features")
    net, state = create(jax.random.key(3))
    expected = jax.vmap(lambda row: eqx.nn.inference_mode(net)(row, state)[0])(jnp.asarray(X))
    return model, adapt.equinox_params(net, state), expected


@pytest.fixture(scope="module", params=["linen", "nnx", "equinox"])
def adapted(request):
    model, params, expected = {"linen": make_linen, "nnx": make_nnx, "equinox": make_equinox}[request.param]()
    return model, params, expected, jax.jit(model.apply), jax.jit(model.features)


def test_logits_are_the_librarys_own(adapted):
    _, params, expected, apply, features = adapted
    np.testing.assert_allclose(apply(params, X), expected, rtol=1e-5, atol=1e-5)
    assert features(params, X).shape == (6, 4)


def test_dropout_follows_the_key(adapted):
    _, params, _, apply, features = adapted
    one = apply(params, X, KEY)
    np.testing.assert_array_equal(one, apply(params, X, KEY))
    assert not np.allclose(one, apply(params, X)) and not np.allclose(one, apply(params, X, jax.random.key(1)))
    hidden, dropped = features(params, X), features(params, X, KEY)
    kept = np.asarray(dropped) != 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(dropped[kept], 2 * hidden[kept], rtol=1e-5)  # frozen statistics: only the mask differs


def test_state_is_frozen_and_parameters_are_not(adapted):
    model, params, _, _, _ = adapted
    frozen = params["state"]
    floating, rebuild = [], jax.tree.structure(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        floating.append((adapt.trainable(name, leaf), leaf))
    assert any(chosen for chosen, _ in floating)
    assert sum(not chosen for chosen, _ in floating) == len(jax.tree.leaves(frozen)) > 0

    def loss(leaves):
        return jnp.sum(jnp.square(model.apply(jax.tree.unflatten(rebuild, leaves), X)))

    grads = jax.jit(jax.grad(loss, allow_int=True))([leaf for _, leaf in floating])
    for (chosen, leaf), grad in zip(floating, grads, strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert bool(np.any(np.asarray(grad))) == chosen


def test_members_are_stacked_with_their_states(adapted):
    model, params, expected, _, _ = adapted
    other = model.init(jax.random.key(9), X)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, other)
    both = jax.jit(jax.vmap(model.apply, (0, None)))(stacked, X)
    np.testing.assert_allclose(both[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both[1], model.apply(other, X), rtol=1e-4, atol=1e-5)


def test_haiku():
    hk = pytest.importorskip("haiku")

    def features(x, train=False):
        h = jnp.tanh(hk.Linear(16, name="body")(x.reshape(x.shape[0], -1)))
        scale = hk.get_state("scale", (16,), init=jnp.ones)
        if train:  # Haiku's own dropout multiplies bools by floats, which strict promotion refuses
            h = 2 * h * jax.random.bernoulli(hk.next_rng_key(), 0.5, h.shape).astype(h.dtype)
        return h * scale[None]

    forward = lambda x, train=False: hk.Linear(3, name="head")(features(x, train))
    model = adapt.haiku(forward, flags_fn=lambda train: {"train": train}, features_fn=features)
    params = model.init(KEY, X)
    native = hk.transform_with_state(forward)
    expected, _ = native.apply(params["params"], params["state"], None, X)
    np.testing.assert_allclose(model.apply(params, X), expected, rtol=1e-6)
    np.testing.assert_array_equal(model.apply(params, X, KEY), model.apply(params, X, KEY))
    hidden, dropped = model.features(params, X), model.features(params, X, KEY)
    assert hidden.shape == (6, 16) and 0 < np.sum(np.asarray(dropped) == 0) < 96
    grads = jax.grad(lambda params: jnp.sum(model.apply(params, X)))(params)
    assert not np.any(grads["state"]["~"]["scale"]) and np.any(grads["params"]["body"]["w"])

    def restless(x):
        norm = hk.BatchNorm(True, True, 0.9)
        return norm(x, is_training=True)

    moving = adapt.haiku(restless)
    with pytest.raises(ValueError, match="frozen state"):
        moving.apply(moving.init(KEY, X), X)


def test_haiku_creates_the_statistics_of_batch_norm_under_flags_of_init():
    hk = pytest.importorskip("haiku")
    forward = lambda x, is_training: hk.Linear(2)(hk.BatchNorm(True, True, 0.9)(x, is_training=is_training))
    flags = {"flags_fn": lambda train: {"is_training": False}, "init_flags": {"is_training": True}}
    model, native, x = adapt.haiku(forward, **flags), hk.transform_with_state(forward), jnp.asarray(X[:, 0, 0])
    params = model.init(KEY, x)
    _, state = native.apply(params["params"], params["state"], None, x, is_training=True)  # a step of Haiku's own
    assert jax.tree.structure(state) == jax.tree.structure(params["state"])
    trained = params | {"state": state}
    expected, _ = native.apply(params["params"], state, None, x, is_training=False)
    for key in (None, KEY):
        np.testing.assert_allclose(model.apply(trained, x, key), expected, rtol=1e-6)


def test_errors_name_what_is_missing(monkeypatch):
    model = adapt.linen(linen.Dense(2))
    params = model.init(KEY, (5,))
    with pytest.raises(ValueError, match="features_method="):
        model.features(params, jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="scale images"):
        model.apply(params, jnp.zeros((2, 5), jnp.uint8))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"adapt\.haiku needs haiku"):
        adapt.haiku(lambda x: x)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 9, 8, 4), dict(kernel_size=(3, 2), strides=(2, 1), kernel_dilation=(1, 2))),
        ((2, 9, 8, 4), dict(kernel_size=(3, 3), padding=((1, 2), (0, 1)), feature_group_count=2, input_dilation=2)),
        ((2, 9, 8, 4), dict(kernel_size=(3, 3), padding="CIRCULAR", feature_group_count=4)),
        ((2, 9, 4), dict(kernel_size=(3,), strides=2, padding=((2, 1),))),
    ],
)
def test_loop_safe_conv_is_flaxs_own_convolution(shape, options):
    x = jax.random.normal(KEY, shape)
    own, safe = linen.Conv(8, **options), linen.Conv(8, **options, conv_general_dilated=adapt.loop_safe_conv)
    params = own.init(KEY, x)
    loss = lambda net: jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(net.apply(params, x))), (0, 1)))
    for a, b in zip(jax.tree.leaves(loss(safe)(params, x)), jax.tree.leaves(loss(own)(params, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_training_a_flax_net_in_a_scan_uses_the_fast_labels():
    model, params, _ = make_linen()

    def step(params, _):
        grads = jax.grad(lambda own: jnp.mean(jnp.square(model.apply(params | {"params": own}, X))))(params["params"])
        own = jax.tree.map(lambda p, g: p - 0.1 * g, params["params"], grads)
        return params | {"params": own}, None

    trained = jax.jit(lambda params: lax.scan(step, params, length=3)[0]).lower(params).compile()
    text = trained.as_text()
    assert "dim_labels=b01f_01io->b01f" in text and "_01oi" not in text
    one_by_one = params
    for _ in range(3):
        one_by_one, _ = jax.jit(step)(one_by_one, None)
    for a, b in zip(jax.tree.leaves(trained(params)), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_group_count": 2}, "batch_group_count: expected"),
        ({"precision": "highest"}, "precision: expected"),
        ({"dimension_numbers": ("NCHW", "OIHW", "NCHW")}, "dimension_numbers: expected"),
    ],
)
def test_loop_safe_conv_refuses_what_it_does_not_do(options, message):
    with pytest.raises(ValueError, match=message):
        adapt.loop_safe_conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2)), (1, 1), "SAME", **options)
