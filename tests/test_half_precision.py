"""Inputs of half precision: rows are counted, and matrices factored, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, defenses, losses, measure, scores, tree

KEY = jax.random.key(0)
identity = lambda params, x, key=None: x
HALF = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])


def rows(dtype, n=40):
    x = np.random.default_rng(0).laplace(size=(n, 6)).astype(np.float32)
    x[:4] += 9
    return mj.dataset(jnp.asarray(x, dtype), jnp.arange(n, dtype=jnp.int32) % 2)


def single(data):
    return data._replace(x=data.x.astype(jnp.float32))


@HALF
def test_rows_are_counted(dtype):
    data = mj.dataset(jnp.zeros((3000, 2), dtype), jnp.arange(3000) % 3)
    assert data.weight.dtype == jnp.float32
    assert jnp.cumsum(data.weight)[-1] == 3000
    assert measure.accuracy(jnp.where(jnp.arange(3000) < 2999, data.y, 3), data) < 1
    assert mj.dataset(data.x, data.y, np.ones(3000, bool)).weight.dtype == jnp.float32


@HALF
def test_scores_of_features_are_those_of_the_same_features_in_float32(dtype):
    for make in (scores.spectral, lambda f, **options: scores.activation_clusters(f, num_components=3, **options)):
        scorer = jax.jit(make(identity, num_classes=2))
        ours = scorer(KEY, None, rows(dtype), mj.Known())
        np.testing.assert_array_equal(ours, scorer(KEY, None, single(rows(dtype)), mj.Known()))


@HALF
def test_channels_are_bounded_in_float32_and_keep_their_dtype(dtype):
    layer = {"w": jax.random.normal(KEY, (3, 3, 2, 12)).at[..., 5].multiply(9.0), "b": jnp.ones(12), "scale": jnp.ones(12)}
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), layer)
    changed, info = defenses.channel_lipschitz()(KEY, half, mj.Known())
    expected = defenses.channel_lipschitz()(KEY, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half), mj.Known())[1]
    np.testing.assert_array_equal(info["w"]["bound"], expected["w"]["bound"])
    assert not info["w"]["keep"][5] and info["w"]["keep"].sum() == 11
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(changed))


@HALF
def test_labels_are_smoothed_in_float32(dtype):
    fit, predict = defenses.label_flip_smoothing(flip_rate=0.1, l2=0.1, num_classes=2)
    data = rows(dtype)
    label, info = predict(fit(KEY, None, data)[0], data.x)
    expected, same = predict(fit(KEY, None, single(data))[0], single(data).x)
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_array_equal(info["log_error"], same["log_error"])


@HALF
def test_inner_products_are_summed_in_float32(dtype):
    many = [jnp.full(16, 0.37, dtype) for _ in range(600)]
    square = 16 * 600 * float(many[0][0]) ** 2
    np.testing.assert_allclose(tree.dot(many, many), square, rtol=1e-5)
    assert tree.dot(many, many).dtype == tree.norm(many).dtype == jnp.float32


@HALF
def test_gradients_are_clipped_and_added_in_float32(dtype):
    """A linear loss, whose gradient is each row's own inputs in every leaf; rounding the result costs one part in 256."""
    x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(300, 16)), dtype), np.float64)
    params = [jnp.zeros(16, dtype) for _ in range(60)]
    loss_fn = lambda params, data, key=None: sum(jnp.sum(data.x * leaf[None], axis=1) for leaf in params)
    data = mj.dataset(jnp.asarray(x, dtype), jnp.zeros(300, jnp.int32))
    length = np.sqrt(60) * np.linalg.norm(x, axis=1, keepdims=True)
    clipped = 0.5 * x / length
    grad_fn = bilevel.dp_gradient(clip_norm=0.5, noise_multiplier=0.0, batch_size=1.0)
    for rows in (slice(1), slice(None)):
        ours = grad_fn(KEY, loss_fn, params, jax.tree.map(lambda leaf, rows=rows: leaf[rows], data))
        assert all(leaf.dtype == dtype for leaf in ours)
        np.testing.assert_allclose(np.float64(ours[7]), clipped[rows].sum(axis=0), rtol=2**-8, atol=1e-5)
    ascent = defenses.unlearning(until=1.0, clip_norm=0.5)(KEY, loss_fn, params, jax.tree.map(lambda leaf: leaf[:1], data))
    assert all(leaf.dtype == dtype for leaf in ascent)
    np.testing.assert_allclose(np.float64(ascent[7]), -clipped[0], rtol=2**-8, atol=1e-5)


@HALF
@pytest.mark.parametrize("name", ["implicit", "lu", "glm", "kkt_svm"])
def test_optima_are_solved_in_float32(name, dtype):
    objective = losses.regularised(losses.logistic(bilevel.glm_apply), l2=0.1)
    train = {
        "implicit": bilevel.implicit(objective),
        "lu": bilevel.implicit(objective, linear_solve=bilevel.lu()),
        "glm": bilevel.glm(losses.logistic, l2=0.1),
        "kkt_svm": bilevel.kkt_svm(C=0.1),
    }[name]
    apply_fn = bilevel.svm_apply(bilevel.linear()) if name == "kkt_svm" else bilevel.glm_apply

    @jax.jit
    def scores_of(data):
        start = {"w": jnp.zeros(6, data.x.dtype), "b": jnp.zeros((), data.x.dtype)}
        fit = lambda x: apply_fn(train(KEY, start, data._replace(x=x))[0], data.x).astype(jnp.float32)
        return fit(data.x), jax.grad(lambda x: jnp.sum(jnp.tanh(fit(x))))(data.x)

    (score, slope), (expected, other) = scores_of(rows(dtype)), scores_of(single(rows(dtype)))
    assert slope.dtype == dtype
    np.testing.assert_allclose(score, expected, atol=0.1)
    assert np.corrcoef(np.ravel(slope.astype(jnp.float32)), np.ravel(other))[0, 1] > 0.98
