"""The network that `deep_back_gradient` poisons, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlsec_jax import base, bilevel, loop, losses

CHANNELS, CLASSES = 16, 10
FEATURES = 49 * CHANNELS
BATCH = 350


class Recipe(NamedTuple):
    """The dense units' power and how a victim is trained.

    A scale s multiplies a layer's parameters, so that they learn s² times as fast.
    """

    power: int
    filter_scale: float
    bias_scale: float
    out_scale: float
    num_steps: int
    learning_rates: tuple[float, ...]


CALM = Recipe(2, 0.04, 0.04, 0.5, 60, (15.0, 30.0, 60.0))
LIVELY = Recipe(3, 0.1, 0.2, 1.0, 100, (12.0, 14.0, 16.0))


def filters() -> jax.Array:
    """The eight lowest filters of the two-dimensional cosine basis, and their negatives: `[5, 5, 1, 16]`."""
    position = (np.arange(5) + 0.5) * np.pi / 5
    basis = [np.cos(k * position) * math.sqrt((1 if k == 0 else 2) / 5) for k in range(5)]
    lowest = sorted((u + v, u, v) for u in range(5) for v in range(5))[: CHANNELS // 2]
    half = np.stack([np.outer(basis[u], basis[v]) for _, u, v in lowest], axis=-1)[:, :, None, :]
    return jnp.asarray(np.concatenate([half, -half], axis=-1), jnp.float32)


def init(key: base.Key, recipe: Recipe, width: int = 576) -> base.Params:
    """Initial parameters: the cosine filters with 10 % noise, a random dense layer, zeros at the outputs."""
    filter_key, dense_key = jax.random.split(key)
    noisy = filters() + 0.02 * jax.random.normal(filter_key, (5, 5, 1, CHANNELS))
    return {
        "filters": noisy / recipe.filter_scale,
        "filters_b": jnp.zeros(CHANNELS),
        "dense": jax.random.normal(dense_key, (FEATURES, width)),
        "dense_b": jnp.zeros(width),
        "out": jnp.zeros((width, CLASSES)),
        "linear": jnp.zeros((FEATURES, CLASSES)),
        "linear_b": jnp.zeros(CLASSES),
    }


def strided(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`models.conv(x, kernel, stride=2)` of one channel and 5x5 pixels, as a product with the 25 shifted images.

    With so few channels a whole training and its derivative take .6 of the time they take through `models.conv`.
    """
    padded = jnp.pad(x[..., 0], ((0, 0), (1, 2), (1, 2)))
    shifted = [padded[:, i : i + 27 : 2, j : j + 27 : 2] for i in range(5) for j in range(5)]
    return jnp.einsum("nhwk,kc->nhwc", jnp.stack(shifted, axis=-1), kernel.reshape(25, -1))


def features(recipe: Recipe, params: base.Params, x: jax.Array) -> jax.Array:
    """`[n, 28, 28, 1]` to `[n, 784]`: convolution, rectifier, 2x2 average pooling, scaled to unit mean square."""
    h = strided(x, recipe.filter_scale * params["filters"])
    h = jax.nn.relu(h + recipe.bias_scale * params["filters_b"][None, None, None])
    return 2.9 * h.reshape(-1, 7, 2, 7, 2, CHANNELS).mean((2, 4)).reshape(x.shape[0], FEATURES)


def head_fn(params: base.Params, h: jax.Array, key: Any = None) -> jax.Array:
    """The linear path's logits, of features `[n, 784]`."""
    return h @ params["linear"] / math.sqrt(FEATURES) + 0.3 * params["linear_b"][None]


def network(recipe: Recipe) -> base.ApplyFn:
    """`(params, x [n, 28, 28, 1]) -> logits [n, 10]`: the linear path plus 576 rectifiers to a power.

    A power's constant makes the units' mean square that of squared rectifiers, of inputs N(0, 1): 3 / 2.
    """
    constant = math.sqrt(3 / math.prod(range(1, 2 * recipe.power, 2)))

    def apply_fn(params: base.Params, x: jax.Array, key: Any = None) -> jax.Array:
        h = features(recipe, params, x)
        z = jax.nn.relu(h @ params["dense"] / math.sqrt(FEATURES) + 0.3 * params["dense_b"][None])
        z = constant * z**recipe.power
        return head_fn(params, h) + recipe.out_scale * z @ params["out"] / math.sqrt(params["out"].shape[0])

    return apply_fn


def sgd(recipe: Recipe, learning_rate: Any) -> optax.GradientTransformation:
    """Momentum 0.9, and a learning rate that decays to zero along a cosine."""
    return optax.sgd(optax.cosine_decay_schedule(learning_rate, recipe.num_steps), momentum=0.9)


def from_scratch(recipe: Recipe, learning_rate: Callable[[base.Key], Any], width: int = 576) -> base.Trainer:
    """Trains every parameter of a network whose initialisation, batches and learning rate the key gives."""

    def fit(key: base.Key, params: base.Params, train: base.Data) -> tuple[base.Params, base.Info]:
        init_key, batch_key, rate_key = jax.random.split(key, 3)
        trainer = bilevel.unrolled(
            losses.cross_entropy(network(recipe)),
            sgd(recipe, learning_rate(rate_key)),
            recipe.num_steps,
            batching=loop.shuffled(BATCH),
        )
        return trainer(batch_key, init(init_key, recipe, width), train)

    return base.Trainer(fit)


def only_head(recipe: Recipe, learning_rate: float) -> base.Trainer:
    """Trains the linear path alone, on the features of the filters as they are: convex, full batch, no randomness."""
    head = bilevel.unrolled(
        losses.cross_entropy(head_fn),
        sgd(recipe, learning_rate),
        recipe.num_steps,
        trainable=lambda path, leaf: "linear" in path,
    )

    def fit(key: base.Key, params: base.Params, train: base.Data) -> tuple[base.Params, base.Info]:
        return head(key, params, train._replace(x=features(recipe, params, train.x)))

    return base.Trainer(fit)
