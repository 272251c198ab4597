"""Gradient shaping: DP-SGD's clipped and noisy gradient, for its effect on poisons (Hong et al. 2020)."""

from __future__ import annotations

from typing import Any

from mlsec_jax import bilevel
from mlsec_jax.loop import GradFn


def gradient_shaping(*, batch_size: Any, clip_norm: Any = 1.0, noise_multiplier: Any = 0.01, chunk: int | None = None) -> GradFn:
    """Bounds what one row may do to a step, and blurs the direction that poisons agree on: `bilevel.dp_gradient`.

    `g̃ = (Σ_i g_i min(1, C / ‖g_i‖) + N(0, σ² C² I)) / B`.

    The noise that shapes gradients is far below what a privacy guarantee takes: no ε comes with it.

    Threat: changes - the gradients of training; sees - nothing; budget - C and σ, paid in accuracy; assumes - poisons need
    gradients that are longer than, or point away from, those of clean rows.

    Args:
      batch_size: B, the expected number of rows of a batch.
      clip_norm: C > 0.
      noise_multiplier: σ ≥ 0; 0 clips alone.
      chunk: as in `bilevel.dp_gradient`.

    Returns:
      A `grad_fn` for trainers on the SGD loop, `bilevel.unrolled(…, grad_fn=…)`.

    References: Hong et al., "On the Effectiveness of Mitigating Data Poisoning Attacks with Gradient Shaping",
      arXiv:2002.11497. The defaults are this library's.
    """
    return bilevel.dp_gradient(clip_norm=clip_norm, noise_multiplier=noise_multiplier, batch_size=batch_size, chunk=chunk)
