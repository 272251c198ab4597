"""What augmentations that mix rows share: partners, mixed labels and weights, and boxes in images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks
from mlsec_jax.base import Data, Key
from mlsec_jax.losses import soft_labels


def distributions(batch: Data, num_classes: int) -> jax.Array:
    """The labels as distributions `[n, num_classes]`, in a floating dtype."""
    if batch.y.ndim == 1 and not jnp.issubdtype(batch.y.dtype, jnp.integer):
        raise ValueError(f"batch.y: expected integer labels [n] or soft ones [n, {num_classes}], got real labels [n].")
    if batch.y.ndim == 1:
        checks.labels("batch.y", batch.y, batch.weight, num_classes)
    y = soft_labels(batch.y, num_classes, batch.weight.dtype)
    if y.shape[1:] != (num_classes,):
        raise ValueError(f"batch.y: expected soft labels of {num_classes} classes, got shape {batch.y.shape}.")
    return y


def partners(key: Key, weight: jax.Array) -> jax.Array:
    """`[n]`: a uniform permutation of the present rows among themselves; absent rows stay where they are."""
    present = weight > 0
    draw = jax.random.uniform(key, weight.shape)
    places = jnp.argsort(~present, stable=True)  # present rows in order, then absent ones
    shuffled = jnp.argsort(jnp.where(present, draw, jnp.inf), stable=True)  # present rows shuffled, then absent ones
    return jnp.zeros_like(places).at[places].set(shuffled)


def mix_labels(y: jax.Array, weight: jax.Array, rows: jax.Array, shares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Labels and weights such that `w ℓ(f, y) = Σ_k s_k w_k ℓ(f, y_k)` for every loss that is linear in y.

    Args:
      y: `[n, c]`, distributions.
      weight: `[n]`.
      rows: `[ways, n]`, whose labels are mixed.
      shares: `[ways]`, of the mixture, summing to 1.

    Returns:
      `([n, c], [n])`; a row that is absent keeps its own label.
    """
    part = shares.astype(weight.dtype)[:, None] * weight[rows]
    total = jnp.sum(part, axis=0)
    inner = part / jnp.where(total > 0, total, 1)[None]
    mixed = jnp.sum(inner.astype(y.dtype)[:, :, None] * y[rows], axis=0)
    return jnp.where((total > 0)[:, None], mixed, y), total


def box(key: Key, height: int, width: int, sides: Any) -> jax.Array:
    """`[height, width]`, True in a box of the given sides around a pixel drawn uniformly, cut at the border."""
    rows, columns = (
        _stretch(k, size, jnp.asarray(side, jnp.int32))
        for k, size, side in zip(jax.random.split(key), (height, width), sides, strict=True)
    )
    return rows[:, None] & columns[None]


def _stretch(key: Key, size: int, side: jax.Array) -> jax.Array:
    start = jax.random.randint(key, (), 0, size, jnp.int32) - side // 2
    at = jnp.arange(size, dtype=jnp.int32)
    return (at >= start) & (at < start + side)


def images(batch: Data) -> jax.Array:
    """The batch's images; raises unless they are floating `[n, h, w, c]`."""
    x = batch.x
    if not hasattr(x, "ndim") or x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"batch.x: expected floating images [n, h, w, c], got {x!r}.")
    return x
