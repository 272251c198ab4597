"""DP-SGD as a slot of the loop: the privatised gradient, built once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, tree
from mlsec_jax.base import Data, Key, LossFn, Params
from mlsec_jax.loop import GradFn
from mlsec_jax.losses import present


def dp_gradient(*, clip_norm: Any, noise_multiplier: Any, batch_size: Any, chunk: int | None = None) -> GradFn:
    """The privatised gradient of DP-SGD, exactly clipped example by example.

    `g̃ = (Σ_i m_i g_i min(1, C / ‖g_i‖₂) + N(0, σ² C² I)) / B`, where m_i is 1 for rows of positive weight and 0
    otherwise, the norm is over all trained leaves, and B is the *expected* batch size, a constant: the number of rows
    that a Poisson draw took must not leak. Removing one row changes the sum by at most C in l2.

    Args:
      clip_norm: C > 0.
      noise_multiplier: σ ≥ 0.
      batch_size: B, expected; with `loop.poisson(rate, capacity)` it is `rate · n`.
      chunk: examples differentiated at once; None for the whole batch. A static trade of memory for time.

    Returns:
      A `grad_fn` for the loop, which clips, adds and blurs in at least float32. Weights other than 0 and 1 raise the
      sensitivity, so any positive weight counts as 1.

    Reference: Abadi et al., CCS 2016, algorithm 1. Deviates from the paper in: division by the expected batch size.
    """
    checks.above("clip_norm", clip_norm, 0)
    checks.at_least("noise_multiplier", noise_multiplier, 0)
    checks.above("batch_size", batch_size, 0)
    if chunk is not None:
        checks.count("chunk", chunk, 1)

    def grad_fn(key: Key, loss_fn: LossFn, params: Params, batch: Data) -> Params:
        loss_key, noise_key = jax.random.split(key)
        batch = present(batch)

        def clipped(row: tuple[Data, jax.Array]) -> Params:
            example, k = row
            one = jax.tree.map(lambda leaf: leaf[None], example)
            gradient = jax.grad(lambda p: jnp.sum(loss_fn(p, one, k)))(params)
            factor = tree.clip_factor(gradient, clip_norm)
            factor = factor * (example.weight > 0).astype(factor.dtype)
            return jax.tree.map(lambda g: g.astype(factor.dtype) * factor, gradient)

        rows = (batch, jax.random.split(loss_key, batch.num_rows))
        size = batch.num_rows if chunk is None else min(chunk, batch.num_rows)
        summed = jax.tree.map(lambda g: jnp.sum(g, axis=0), jax.lax.map(clipped, rows, batch_size=size))
        leaves, structure = jax.tree.flatten(summed)
        keys = jax.random.split(noise_key, len(leaves))
        scale = lambda dtype: jnp.asarray(noise_multiplier, dtype) * jnp.asarray(clip_norm, dtype)
        noisy = [
            (g + scale(g.dtype) * jax.random.normal(k, g.shape, g.dtype)) / jnp.asarray(batch_size, g.dtype)
            for g, k in zip(leaves, keys)
        ]
        return jax.tree.map(lambda g, leaf: g.astype(jnp.result_type(leaf)), jax.tree.unflatten(structure, noisy), params)

    return grad_fn
