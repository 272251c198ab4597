"""Pooling: values, and the gradient on ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mlsec_jax.models import avg_pool, conv, global_avg_pool, max_pool


def tied(seed, *shape, dtype=np.float32):
    """Images on which most windows tie: small integers, two thirds of them 0."""
    generator = np.random.default_rng(seed)
    return (generator.integers(0, 3, shape) * (generator.uniform(size=shape) > 0.66)).astype(dtype)


@pytest.mark.parametrize(("window", "stride", "side"), [(2, None, 8), (2, None, 7), (3, None, 9), (3, 2, 9), (2, 3, 8)])
def test_max_pool_is_reduce_window_with_its_first_wins_gradient(window, stride, side):
    x = jnp.asarray(tied(0, 3, side, side + 1, 2))
    step = stride or window
    reference = lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, window, window, 1), (1, step, step, 1), "VALID"
    )
    ours = lambda x: max_pool(x, window=window, stride=stride)
    found, pull = jax.vjp(ours, x)
    expected, pull_reference = jax.vjp(reference, x)
    np.testing.assert_array_equal(found, expected)
    cotangent = jax.random.normal(jax.random.key(1), found.shape)
    np.testing.assert_allclose(pull(cotangent)[0], pull_reference(cotangent)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("window", "stride", "side"), [(2, None, 8), (3, None, 7), (3, 2, 9)])
def test_avg_pool_is_the_mean_of_the_window(window, stride, side):
    x = jnp.asarray(tied(2, 2, side, side, 3))
    step = stride or window
    total = lax.reduce_window(x, 0.0, lax.add, (1, window, window, 1), (1, step, step, 1), "VALID")
    np.testing.assert_allclose(avg_pool(x, window=window, stride=stride), total / window**2, rtol=1e-6, atol=1e-7)


def test_global_avg_pool():
    x = jnp.asarray(tied(3, 2, 4, 6, 3))
    np.testing.assert_allclose(global_avg_pool(x), np.asarray(x).mean((1, 2)), rtol=1e-6)


def test_nan_is_not_swallowed():
    for place in range(4):
        x = jnp.zeros((4,)).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
        assert jnp.isnan(max_pool(x)).all()


def test_the_hypergradient_through_max_pooling_agrees_with_central_differences_on_ties():
    """Two steps of training a convolutional net, the poison one image on a flat background.

    Every window of the background ties, and goes on tying while the poison moves, so that the loss is differentiable
    in the poison's own pixels.
    """
    with jax.enable_x64(True):
        images = np.zeros((4, 8, 8, 1))
        images[:, 2:6, 2:6] = tied(4, 4, 4, 4, 1, dtype=np.float64) / 2 + 0.1
        x, y = jnp.asarray(images), jnp.asarray([0.0, 1.0, 1.0, 0.0])
        generator = np.random.default_rng(5)
        start = {
            "kernel": jnp.asarray(generator.normal(size=(3, 3, 1, 3)) / 3),
            "head": jnp.asarray(generator.normal(size=(48, 1)) / 5),
        }

        def loss(params, x):
            hidden = max_pool(conv(x, params["kernel"])).reshape(4, -1)
            return jnp.mean(jnp.square(jnp.tanh(hidden @ params["head"])[:, 0] - y))

        def outer(poison):
            data = x.at[0, 3:5, 3:5, 0].set(poison)
            step = lambda params, _: (
                jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params, data)),
                None,
            )
            return loss(lax.scan(step, start, length=3)[0], x)

        poison = x[0, 3:5, 3:5, 0] + 0.03 * jnp.asarray(generator.normal(size=(2, 2)))
        function = jax.jit(outer)
        numeric = np.zeros((2, 2))
        for index in np.ndindex(2, 2):
            shift = np.zeros((2, 2))
            shift[index] = 1e-5
            numeric[index] = (function(poison + shift) - function(poison - shift)) / 2e-5
        exact = jax.jit(jax.grad(outer))(poison)
        scale = np.abs(numeric).max()
        assert np.abs(exact - numeric).max() < 1e-7 * scale
        assert scale > 1e-4


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (jnp.zeros((2, 4, 4)), {}, "expected \\[n, h, w, c\\]"),
        (jnp.zeros((2, 1, 4, 1)), {}, "at least the window"),
        (jnp.zeros((2, 4, 4, 1)), {"window": 0}, "window: expected an integer"),
        (jnp.zeros((2, 4, 4, 1)), {"stride": 1.5}, "stride: expected an integer"),
    ],
)
def test_wrong_arguments_are_named(x, options, message):
    for pool in (max_pool, avg_pool):
        with pytest.raises(ValueError, match=message):
            pool(x, **options)
