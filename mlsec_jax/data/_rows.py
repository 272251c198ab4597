"""From arrays to `Data`, and from one `Data` to several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import base, checks


def to_data(x: Any, y: Any, *, channel: bool = False, flatten: bool = False, dtype: Any = jnp.float32) -> base.Data:
    """Makes `Data` from loaded arrays: bytes become [0, 1], other numbers keep their values.

    Args:
      x: `[n, ...]`; uint8 is divided by 255, any other dtype is only cast.
      y: `[n]` integer (kept as int32) or real labels.
      channel: give grey images their channel axis: `[n, h, w]` to `[n, h, w, 1]`; rows that have one keep it.
      flatten: make each row a vector `[n, d]`.
      dtype: of the inputs, the weights, and real labels.

    Returns:
      The `Data`; every row weighs 1.

    >>> to_data(np.full((2, 3, 3), 255, np.uint8), np.array([0, 1]), channel=True).x.shape
    (2, 3, 3, 1)
    """
    if channel and flatten:
        raise ValueError("channel and flatten: expected at most one of them, got both.")
    x, y = np.asarray(x), np.asarray(y)
    scale = 255 if x.dtype == np.uint8 else 1
    x = x.astype(dtype) / np.asarray(scale, dtype)
    if channel and x.ndim not in (3, 4):
        raise ValueError(f"channel: expected images [n, h, w] or [n, h, w, c], got shape {x.shape}.")
    if channel and x.ndim == 3:
        x = x[..., None]
    if flatten:
        x = x.reshape(x.shape[0], -1)
    y = y.astype(dtype if y.dtype.kind == "f" else np.int32)
    return base.dataset(x, y, np.ones(len(x), dtype))


def select_classes(x: Any, y: Any, classes: Sequence[int], *, relabel: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the rows of some classes, in their order; the classes become 0, 1, … in the order given.

    Args:
      x: `[n, ...]`.
      y: `[n]` integer labels.
      classes: the labels to keep; each must have a row.
      relabel: False keeps the labels as they are.

    Returns:
      `(x [m, ...], y [m])`.

    >>> select_classes(np.arange(4), np.array([7, 3, 1, 7]), [1, 7])
    (array([0, 2, 3]), array([1, 0, 1], dtype=int32))
    """
    x, y, classes = np.asarray(x), np.asarray(y), np.asarray(classes).tolist()
    missing = [label for label in classes if not np.any(y == label)]
    if missing or len(set(classes)) != len(classes) or not classes:
        raise ValueError(f"classes: expected different labels that each have a row, got {classes} (no row: {missing}).")
    rows = np.isin(y, classes)
    labels = y[rows]
    if relabel:
        labels = np.argmax(labels[:, None] == np.asarray(classes)[None, :], axis=1)
    return x[rows], labels.astype(np.int32)


def split(key: base.Key, data: base.Data, sizes: Sequence[int], *, stratify: bool = False) -> list[base.Data]:
    """Cuts the rows, in an order drawn from the key, into disjoint parts; rows left over are in none.

    With `stratify` the drawn order is interleaved: the i-th of a class's n_c rows stands at (i + 1/2) / n_c, so that
    every stretch of the order holds the classes in their proportions, to within a row or two (exactly, for equal
    classes and sizes that are multiples of their number). Shapes depend on `sizes` only: jit and vmap over keys work.

    Args:
      key: the parts' key.
      data: `Data` of `n` physical rows; rows of weight 0 are dealt out like any other.
      sizes: how many rows each part gets; their sum is at most `n`.
      stratify: keep the proportions of the integer labels.

    Returns:
      One `Data` a size.

    >>> parts = split(jax.random.key(0), base.dataset(jnp.zeros((10, 2)), jnp.arange(10)), [6, 3])
    >>> [part.num_rows for part in parts]
    [6, 3]
    """
    for size in sizes:
        checks.count("sizes", size, 1)
    if sum(sizes) > data.num_rows:
        raise ValueError(f"sizes: expected at most {data.num_rows} rows in all, got {sum(sizes)}.")
    order = jax.random.permutation(key, data.num_rows)
    if stratify:
        if data.y.ndim != 1 or not jnp.issubdtype(data.y.dtype, jnp.integer):
            raise ValueError(f"stratify: expected integer labels [n], got {data.y.dtype} of shape {data.y.shape}.")
        order = order[_interleaved(data.y[order])]
    stops = np.cumsum(np.asarray(sizes))
    parts = [order[stop - size : stop] for size, stop in zip(sizes, stops)]
    return [jax.tree.map(lambda leaf, rows=rows: leaf[rows], data) for rows in parts]


def _interleaved(labels: jax.Array) -> jax.Array:
    """The stable order of the rows by their place within their own class, from 0 to 1."""
    by_class = jnp.argsort(labels, stable=True)
    grouped = labels[by_class]
    first = jnp.searchsorted(grouped, grouped, side="left")
    size = jnp.searchsorted(grouped, grouped, side="right") - first
    rank = jnp.arange(labels.shape[0]) - first
    # 2 rank + 1 and 2 size are exact in float32, so classes of one size tie exactly, and ties keep the drawn order.
    place = (2 * rank + 1).astype(jnp.float32) / (2 * size).astype(jnp.float32)
    return jnp.argsort(jnp.zeros_like(place).at[by_class].set(place), stable=True)
