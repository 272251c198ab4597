"""A trigger as arrays alone: a mask and a pattern, such as an inspector recovers."""

from __future__ import annotations

from typing import NamedTuple

import jax

from mlsec_jax import checks
from mlsec_jax.base import Key


class Overlay(NamedTuple):
    """A trigger without place: `A(x) = (1 - m) ⊙ x + m ⊙ Δ`, called like any other, `trigger(key, x)`.

    It is a pytree of arrays, so that it travels in `Known(trigger=…)` through `jit`.

    Attributes:
      mask: m in [0, 1], `[h, w]` (one number for all channels of a pixel), or of the pattern's own shape.
      pattern: Δ, of the shape of one row, such as `[h, w, c]`.

    >>> import jax.numpy as jnp
    >>> Overlay(jnp.array([0.0, 0.5]), jnp.ones(2))(None, jnp.zeros((1, 2))).tolist()
    [[0.0, 0.5]]
    """

    mask: jax.Array
    pattern: jax.Array

    @property
    def opacity(self) -> jax.Array:
        """The mask with an axis for the channels, so that it multiplies the pattern."""
        return self.mask[..., None] if self.mask.ndim == self.pattern.ndim - 1 else self.mask

    def __call__(self, key: Key | None, x: jax.Array) -> jax.Array:
        """`x [n, ...]` with the trigger; the key is not read."""
        del key
        checks.floating("x", x)
        if x.shape[1:] != self.pattern.shape:
            raise ValueError(f"x: expected rows of the pattern's shape {self.pattern.shape}, got {x.shape[1:]}.")
        m = self.opacity.astype(x.dtype)
        return (1 - m)[None] * x + (m * self.pattern.astype(x.dtype))[None]
