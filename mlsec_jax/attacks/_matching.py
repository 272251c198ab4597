"""What gradient-matching attacks share: the cosine between the gradient of training on poisons and the attacker's."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlsec_jax import checks, linalg, losses, tree
from mlsec_jax.base import Data, Key, LossFn, Params

Augment = Callable[[Key, Data], Data]  # differentiable in the inputs


def gradient(loss_fn: LossFn, params: Params, data: Data, trainable: tree.Where = None) -> Params:
    """The gradient of the mean loss in the trainable leaves (None elsewhere)."""
    chosen, fixed = tree.partition(params, trainable)
    mean_loss = losses.empirical(loss_fn)
    return jax.grad(lambda own: mean_loss(tree.merge(own, fixed), data))(chosen)


def matcher(
    loss_fn: LossFn, augment_fn: Augment | None, batch_size: int | None, trainable: tree.Where
) -> Callable[[Key, Params, Data, Params], jax.Array]:
    """`(key, params, poisons, aim) -> cosine`: between the aim and gradients of shuffled batches of poisons, their mean.

    Every poison is in one batch; the last may have fewer.
    """
    if batch_size is not None:
        checks.count("batch_size", batch_size, 1)

    def cosine(key: Key, params: Params, poisons: Data, aim: Params) -> jax.Array:
        k = poisons.num_rows
        size = k if batch_size is None else min(batch_size, k)
        order_key, augment_key = jax.random.split(key)
        order = jnp.arange(k) if size == k else jax.random.permutation(order_key, k)
        batches = -(-k // size)
        order = jnp.pad(order, (0, batches * size - k))  # rows that fill up the last batch weigh 0

        def batch(b: jax.Array) -> jax.Array:
            data = tree.take(poisons, jax.lax.dynamic_slice_in_dim(order, b * size, size))
            if k % size:
                data = data._replace(weight=jnp.where(b * size + jnp.arange(size) < k, data.weight, 0))
            if augment_fn is not None:
                data = augment_fn(jax.random.fold_in(augment_key, b), data)
            return _cosine(gradient(loss_fn, params, data, trainable), aim)

        return jnp.mean(jax.lax.map(batch, jnp.arange(batches)))

    return cosine


def _cosine(a: Params, b: Params) -> jax.Array:
    """The cosine between two gradients; 0, with derivative 0, where one of them vanishes: there is nothing to learn."""
    return tree.dot(a, b) * linalg.inverse_root(tree.dot(a, a)) * linalg.inverse_root(tree.dot(b, b))
