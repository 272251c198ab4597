"""TABOR (Guo et al. 2019): trigger reconstruction with four more priors on a trigger, and a metric of its quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses
from mlsec_jax.base import Data
from mlsec_jax.defenses._invert_trigger import Inversion, ModelFn, attack_loss, sent
from mlsec_jax.threat import Overlay

WEIGHTS = (1.0, 0.1, 0.1, 0.01, 0.01, 0.01)


def tabor(*, weights: Sequence[Any] = WEIGHTS) -> Inversion:
    """The objective of TABOR, for `invert_trigger`: small, smooth triggers that spare the rest and work alone.

    With `Δ' = (1 - m) ⊙ Δ`, what the pattern holds outside the mask,

        E_x CE(f(A(x)), t) + λ₅ E_x CE(f(x ⊙ (1 - m)), y) + λ₆ CE(f(m ⊙ Δ), t)
            + c (λ₁ E(m) + λ₂ E(Δ') + λ₃ S(m) + λ₄ S(Δ')),

    `E(v) = ‖v‖₁ + ‖v‖₂²`, `S(v) = Σ_ij (v_ij - v_{i,j+1})² + (v_ij - v_{i+1,j})²` (over channels too), c the schedule's cost.
    It judges by

        log ‖m‖₁ / d² + log S(m) / (d (d - 1)) - log acc_att - log acc_crop - log acc_exp

    over clean rows: acc_att is the success of the trigger on rows of other labels, acc_crop the accuracy on `x ⊙ (1 - m)`,
    acc_exp the share of those stamped rows that are still sent to t when only the `max(1, ‖m‖₁)` pixels that explain it best
    are left (by `|gradient ⊙ input|` of the logit). Accuracies count as half a row at least, `‖m‖₁` and S as 1e-6.

    Args:
      weights: `λ₁ … λ₆`, non-negative, for images in [0, 1]. At c = 1e-3 the default λ₁ is Neural Cleanse's.

    Returns:
      An `Inversion`.

    References: Guo, Wang, Xing, Du & Song, "TABOR", arXiv:1908.01763. Deviates from the paper in: one cost, of Neural
      Cleanse's schedule, for the four penalties of size and smoothness; the explanation by gradient times input; weights,
      for the published ones belong to pixels in 0 … 255.
    """
    weights = tuple(weights)
    if len(weights) != 6:
        raise ValueError(f"weights: expected six, got {len(weights)}.")
    checks.at_least("weights", weights, 0)

    def loss_fn(model_fn: ModelFn, overlay: Overlay, batch: Data, label: jax.Array) -> tuple:
        w = [jnp.asarray(weight, batch.x.dtype) for weight in weights]
        inside = overlay.opacity * overlay.pattern
        outside = overlay.pattern - inside
        stamped, cropped = overlay(None, batch.x), _cropped(overlay, batch.x)
        logits = model_fn(jnp.concatenate([stamped, cropped, inside[None]]))  # one pass for three losses
        reached, spared, alone = jnp.split(logits, [len(batch.y), 2 * len(batch.y)])
        truth = jnp.take_along_axis(jax.nn.log_softmax(spared), batch.y[:, None], axis=1)
        loss = attack_loss(reached, label) - w[4] * jnp.mean(truth) + w[5] * attack_loss(alone, label)
        penalty = (
            w[0] * _elastic(overlay.mask)
            + w[1] * _elastic(outside)
            + w[2] * _roughness(overlay.mask)
            + w[3] * _roughness(outside)
        )
        return loss, penalty, reached

    def metric_fn(model_fn: ModelFn, overlay: Overlay, clean: Data, label: jax.Array) -> jax.Array:
        height, width = overlay.mask.shape
        stamped = overlay(None, clean.x)
        to_label = lambda x: sent(model_fn(x), label)
        slope = jax.grad(lambda x: jnp.sum(model_fn(x)[:, label]))(stamped)
        saliency = jnp.sum(jnp.abs(slope * stamped), axis=3).reshape(len(clean.y), -1)
        area = jnp.clip(jnp.round(jnp.sum(overlay.mask)).astype(jnp.int32), 1, height * width)
        least = jnp.sort(saliency, axis=1)[:, height * width - area]
        kept = (saliency >= least[:, None]).reshape(*stamped.shape[:3], 1)
        cropped = sent(model_fn(_cropped(overlay, clean.x)), clean.y)
        other = jnp.where(clean.y == label, 0, clean.weight)

        def log_share(hit: jax.Array, weight: jax.Array) -> jax.Array:
            half_a_row = 0.5 / jnp.maximum(jnp.sum(clean.weight > 0, dtype=stamped.dtype), 1)
            return jnp.log(jnp.maximum(losses.weighted_mean(hit.astype(stamped.dtype), weight), half_a_row))

        pairs = (height * (width - 1) + width * (height - 1)) / 2
        size = jnp.log(jnp.maximum(jnp.sum(overlay.mask), 1e-6) / (height * width))
        rough = jnp.log(jnp.maximum(_roughness(overlay.mask), 1e-6) / pairs)
        explained = jnp.where(kept, stamped, 0)
        return size + rough - (
            log_share(to_label(stamped), other) + log_share(cropped, clean.weight) + log_share(to_label(explained), other)
        )

    return Inversion(loss_fn, metric_fn)


def _cropped(overlay: Overlay, x: jax.Array) -> jax.Array:
    return (1 - overlay.opacity)[None] * x


def _elastic(v: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(v)) + jnp.sum(jnp.square(v))


def _roughness(v: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.diff(v, axis=0))) + jnp.sum(jnp.square(jnp.diff(v, axis=1)))
