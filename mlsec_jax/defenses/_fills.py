"""What to paint over a suspicious region of an image: a mean, a membrane, or what a network makes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks
from mlsec_jax.base import ApplyFn, Params

FillFn = Callable[[jax.Array, jax.Array], jax.Array]  # (x [n, h, w, c], mask [n, h, w, 1] of 0 and 1) -> [n, h, w, c]


def fill_mean(mean: Any) -> FillFn:
    """The same value everywhere, usually the data's mean pixel.

    Args:
      mean: a number, or an array that broadcasts to an image (`[c]`).

    Returns:
      A fill: `(x [n, h, w, c], mask [n, h, w, 1]) -> images`, read where the mask is 1.
    """

    def fill(x: jax.Array, mask: jax.Array) -> jax.Array:
        del mask
        return jnp.broadcast_to(jnp.broadcast_to(jnp.asarray(mean, x.dtype), x.shape[1:])[None], x.shape)

    return fill


def fill_harmonic(*, num_steps: int = 96) -> FillFn:
    """The smoothest surface that spans the hole: `Δu = 0` inside, `u = x` around, free at the image's border.

    With the graph of the pixels and their neighbours above, below, left and right, `Σ_{q ~ p} (u_p - u_q) = 0` for every
    pixel p of the hole: symmetric and positive definite, solved by conjugate gradients.

    Args:
      num_steps: of conjugate gradients, static; 96 reach 1e-4 on holes that span 32x32 images.

    Returns:
      A fill, as `fill_mean`. An image that is all hole has nothing to go by and becomes 0.
    """
    checks.count("num_steps", num_steps)

    def fill(x: jax.Array, mask: jax.Array) -> jax.Array:
        hole = mask.astype(x.dtype)
        degree = _neighbours(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
        known = (1 - hole) * x
        dot = lambda a, b: jnp.sum(a * b, axis=(1, 2), keepdims=True)
        stiffness = lambda u: hole * (degree * u - _neighbours(u))
        count = jnp.sum(1 - hole, axis=(1, 2), keepdims=True)
        start = hole * jnp.sum(known, axis=(1, 2), keepdims=True) / jnp.maximum(count, 1)
        residual = hole * _neighbours(known) - stiffness(start)
        enough = jnp.finfo(x.dtype).eps ** 2 * dot(residual, residual)

        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            u, r, p, square = carry
            going = square > enough  # later steps would only stir up rounding
            along = stiffness(p)
            rate = jnp.where(going, square / jnp.where(going, dot(p, along), 1), 0)
            u, r = u + rate * p, r - rate * along
            after = jnp.where(going, dot(r, r), square)
            p = r + jnp.where(going, after / jnp.where(going, square, 1), 0) * p
            return (u, r, p, after), None

        carry = (start, residual, residual, dot(residual, residual))
        (u, *_), _ = jax.lax.scan(step, carry, None, length=num_steps)
        return known + hole * u

    return fill


def _neighbours(u: jax.Array) -> jax.Array:
    """The sum of the four neighbours of every pixel of `[n, h, w, c]`; beyond the border there is nothing."""
    wide = jnp.pad(u, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return wide[:, :-2, 1:-1] + wide[:, 2:, 1:-1] + wide[:, 1:-1, :-2] + wide[:, 1:-1, 2:]


def fill_network(apply_fn: ApplyFn, params: Params) -> FillFn:
    """What a network makes up: `G([x, M])`.

    Args:
      apply_fn: `(params, [x, mask] [n, h, w, c + 1]) -> images [n, h, w, c]`; `models.inpainter` blanks the hole itself.
      params: its parameters (`train.pretrain_inpainter`), which may be traced: build the fill inside of what is jitted.

    Returns:
      A fill, as `fill_mean`.
    """
    return lambda x, mask: apply_fn(params, jnp.concatenate([x, mask.astype(x.dtype)], axis=3))
