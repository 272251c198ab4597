"""What gradient-matching attacks share: the cosine between the gradient of training on poisons and the attacker's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import losses, tree
from mlsec_jax.base import Data, Key, LossFn, Params

Augment = Callable[[Key, Data], Data]  # differentiable in the inputs


def gradient(loss_fn: LossFn, params: Params, data: Data, trainable: tree.Where = None) -> Params:
    """The gradient of the mean loss in the trainable leaves (None elsewhere)."""
    chosen, fixed = tree.partition(params, trainable)
    mean_loss = losses.empirical(loss_fn)
    return jax.grad(lambda own: mean_loss(tree.merge(own, fixed), data))(chosen)


def cosine(
    loss_fn: LossFn,
    augment_fn: Augment | None,
    batch_size: int | None,
    trainable: tree.Where,
    key: Key,
    params: Params,
    poisons: Data,
    aim: Params,
) -> jax.Array:
    """The mean cosine between the aim and the gradients of shuffled batches of poisons."""
    k = poisons.num_rows
    size = k if batch_size is None else min(batch_size, k)
    order_key, augment_key = jax.random.split(key)
    order = jnp.arange(k) if size == k else jax.random.permutation(order_key, k)
    num_batches = k // size

    def batch(b: jax.Array) -> jax.Array:
        data = tree.take(poisons, jax.lax.dynamic_slice_in_dim(order, b * size, size))
        if augment_fn is not None:
            data = augment_fn(jax.random.fold_in(augment_key, b), data)
        return _cosine(gradient(loss_fn, params, data, trainable), aim)

    return jnp.mean(jax.lax.map(batch, jnp.arange(num_batches)))


def each(fn: Callable[..., Any], *operands: Any, over: str | None) -> Any:
    """`fn` of one network (`over=None`), or of each of several, stacked."""
    if over is None:
        return fn(*operands)
    return jax.vmap(fn)(*operands) if over == "vmap" else jax.lax.map(lambda own: fn(*own), operands)


def _cosine(a: Params, b: Params) -> jax.Array:
    """The cosine between two gradients; 0, with derivative 0, where one of them vanishes: there is nothing to learn."""
    squares = tree.dot(a, a) * tree.dot(b, b)
    inverse = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
    return tree.dot(a, b) * inverse
