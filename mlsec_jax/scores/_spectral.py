"""Spectral signatures: how far a row goes along its class's first principal direction (Tran, Li & Madry 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlsec_jax import checks, linalg, losses
from mlsec_jax.base import ApplyFn, Data, Key, Known, Params, Scorer


def spectral(features_fn: ApplyFn, *, num_classes: int, centred: bool = True, num_steps: int = 32) -> Scorer:
    """The squared projection on the top singular vector of the centred features of the row's class.

    `τ_i = ((φ(x_i) - μ_y) · v_y)²`, v_y the first right singular vector of the matrix of rows `φ(x_j) - μ_y`, `y_j = y`.
    The published defense removes `1.5 ε n_y` rows of every class and trains once more:
    `filter_top(spectral(…), fraction=1.5 * eps, num_classes=…)`.

    All classes are one program: two matrix products `[n, d] x [d, c]` a Lanczos step, no matrix of `d x d`. The derivative
    with respect to the data goes through v (`linalg.top_eigenvector`), so that an adaptive attack sees the defense.

    Args:
      features_fn: `(params, x, key=None) -> [n, ...]`, flattened.
      num_classes: static; labels are integers below it.
      centred: False scores `|φ(x_i) · v_y|` without centring it, as the original code does (v is of the centred matrix
        there too): it ranks by the class mean as well, and is here for comparison only.
      num_steps: of Lanczos, static.

    Returns:
      A `Scorer`; rows of weight 0 score 0.

    References: Tran, Li & Madry, NeurIPS 2018, algorithm 1.
    """
    checks.count("num_classes", num_classes, 1)
    checks.count("num_steps", num_steps, 1)

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        del known
        checks.labels("data.y", data.y, data.weight, num_classes)
        h = features_fn(params, losses.present(data).x)
        h = h.reshape(h.shape[0], -1)
        weight = data.weight.astype(h.dtype)
        member = (data.y[None] == jnp.arange(num_classes, dtype=data.y.dtype)[:, None]) & (data.weight > 0)[None]
        weights = jnp.where(member, weight[None], 0)
        total = jnp.sum(weights, axis=1, keepdims=True)
        mean = weights @ h / jnp.where(total > 0, total, 1)
        common = jnp.mean(mean, axis=0)  # a shift of all features changes nothing but the rounding
        near, mean = h - common[None], mean - common[None]

        def direction(w: jax.Array, size: jax.Array, mu: jax.Array, start: jax.Array) -> jax.Array:
            def scatter(u: jax.Array) -> jax.Array:
                along = w * (near @ u - jnp.vdot(mu, u))
                return (near.T @ along - mu * jnp.sum(along)) / jnp.where(size > 0, size, 1)

            return linalg.top_eigenvector(scatter, start, num_steps=num_steps)

        start = jax.random.normal(key, mean.shape, h.dtype)
        v = jax.vmap(direction)(weights, total[:, 0], mean, start)
        own = jax.nn.one_hot(data.y, num_classes, dtype=h.dtype)
        pick = lambda table: jnp.sum(own * table, axis=1)
        if centred:
            along = jnp.square(pick(near @ v.T - jnp.sum(mean * v, axis=1)[None]))
        else:
            along = jnp.abs(pick(h @ v.T))
        return jnp.where(data.weight > 0, along, 0)

    return score
