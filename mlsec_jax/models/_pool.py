"""Pooling whose gradient is exact on ties and cheap.

On images with a flat background the entries of a window tie constantly. There the maximum has no derivative in a
tied pixel, and the convention shows: `jnp.maximum` splits the gradient among the tied (on MNIST the hypergradient's
cosine to PyTorch's is then 0.88), `lax.reduce_window` gives it to the first as PyTorch does, but its backward pass is
some ten times slower. Here a window is a fold of `where(a >= b, a, b)` over views of it: the first wins, at speed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mlsec_jax import checks


def _views(x: jax.Array, window: int, stride: int | None) -> list[jax.Array]:
    """For each place in the window, row by row, what stands there in every window: `[n, p, q, c]`."""
    checks.count("window", window, 1)
    stride = window if stride is None else stride
    checks.count("stride", stride, 1)
    if x.ndim != 4 or min(x.shape[1:3]) < window:
        raise ValueError(f"x: expected [n, h, w, c] with h and w at least the window {window}, got {x.shape}.")
    n, h, w, c = x.shape
    p, q = (h - window) // stride + 1, (w - window) // stride + 1
    if stride != window:
        return [
            x[:, i : i + stride * (p - 1) + 1 : stride, j : j + stride * (q - 1) + 1 : stride]
            for i in range(window)
            for j in range(window)
        ]
    # Disjoint windows: split, whose transpose is one concatenation, in place of strided slices.
    blocks = x[:, : p * window, : q * window].reshape(n, p, window, q, window, c)
    ones = (1,) * window
    views = [view for rows in lax.split(blocks, ones, axis=2) for view in lax.split(rows, ones, axis=4)]
    return [view.reshape(n, p, q, c) for view in views]


def _first_wins(a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger, the first on a tie; NaN stays NaN."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def max_pool(x: jax.Array, *, window: int = 2, stride: int | None = None) -> jax.Array:
    """The largest entry of each window; on a tie the first one, row by row, takes the whole gradient.

    Args:
      x: `[n, h, w, c]`.
      window: its side.
      stride: distance between windows; None: the window's side. Windows that do not fit are left out.

    Returns:
      `[n, p, q, c]`, with p = (h - window) // stride + 1.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    return functools.reduce(_first_wins, _views(x, window, stride))


def avg_pool(x: jax.Array, *, window: int = 2, stride: int | None = None) -> jax.Array:
    """The mean of each window: smooth, no ties. Arguments and shapes as in `max_pool`.

    >>> avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
    Array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    return functools.reduce(jnp.add, _views(x, window, stride)) * (1 / window**2)


def global_avg_pool(x: jax.Array) -> jax.Array:
    """The mean over space: `[n, h, w, c]` -> `[n, c]`."""
    if x.ndim != 4:
        raise ValueError(f"x: expected [n, h, w, c], got {x.shape}.")
    return jnp.mean(x, axis=(1, 2))
