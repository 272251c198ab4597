"""How well a score separates: the ROC curve, its area, and the detection rate at a false-alarm rate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Roc(NamedTuple):
    """The curve at each row's score as threshold, from strict to lax; tied scores repeat one point.

    Attributes:
      fpr: `[n + 1]`, share of the negatives' weight with score ≥ threshold, from 0 up to 1.
      tpr: `[n + 1]`, share of the positives' weight.
      thresholds: `[n + 1]`, from infinity downwards; rows of weight 0 stand at the end with -infinity.
    """

    fpr: jax.Array
    tpr: jax.Array
    thresholds: jax.Array


def roc(scores: jax.Array, positive: jax.Array, weight: jax.Array | None = None) -> Roc:
    """The ROC curve of "score ≥ threshold means positive".

    Args:
      scores: `[n]`, higher = more likely positive; those of weight-0 rows are not read.
      positive: boolean or {0, 1} `[n]`.
      weight: `[n]` (`Data.weight`), or None for ones.

    Returns:
      `Roc`; NaN rates where the positives, or the negatives, have no weight. NaN scores of present rows spoil the
      curve visibly (NaN), never in silence.

    >>> curve = roc(jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([1, 1, 0, 0]))
    >>> curve.tpr.tolist()
    [0.0, 0.5, 1.0, 1.0, 1.0]
    """
    scores, positive = jnp.asarray(scores), jnp.asarray(positive).astype(bool)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores.astype(float)
    weight = jnp.ones(scores.shape, float) if weight is None else jnp.asarray(weight)
    if scores.ndim != 1 or not scores.shape == positive.shape == weight.shape:
        shapes = f"{scores.shape}, {positive.shape} and {weight.shape}"
        raise ValueError(f"scores, positive and weight: expected one shape [n], got {shapes}.")
    spoilt = jnp.any(jnp.isnan(scores) & (weight > 0))
    scores = jnp.where(weight > 0, scores, -jnp.inf)
    order = jnp.argsort(-scores, stable=True)
    sorted_scores = scores[order]
    # Each row's point counts all rows down to the last that ties with it.
    last = jnp.searchsorted(-sorted_scores, -sorted_scores, side="right") - 1

    def rates(chosen: jax.Array) -> jax.Array:
        counted = jnp.cumsum(jnp.where(chosen, weight, jnp.zeros_like(weight))[order])
        share = jnp.concatenate([jnp.zeros_like(counted[:1]), counted[last]]) / counted[-1]
        return jnp.where(spoilt, jnp.nan, share)

    thresholds = jnp.concatenate([jnp.full_like(scores[:1], jnp.inf), sorted_scores])
    return Roc(rates(~positive), rates(positive), thresholds)


def auc(curve: Roc) -> jax.Array:
    """The area under the curve: the chance that a positive outscores a negative, ties counting half.

    >>> float(auc(roc(jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([1, 1, 0, 0]))))
    0.875
    """
    return jnp.sum(jnp.diff(curve.fpr) * (curve.tpr[1:] + curve.tpr[:-1]) / 2)


def tpr_at_fpr(curve: Roc, fpr: float | jax.Array) -> jax.Array:
    """The largest detection rate at a threshold whose false-alarm rate is at most `fpr`.

    A threshold that exists, not a line drawn between two (which would need a coin toss): membership inference is
    judged so at low rates (Carlini et al., IEEE S&P 2022).

    >>> float(tpr_at_fpr(roc(jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([1, 1, 0, 0])), 0.1))
    0.5
    """
    reached = jnp.where(curve.fpr <= fpr, curve.tpr, jnp.zeros_like(curve.tpr)).max()
    return jnp.where(jnp.isnan(curve.fpr[-1]), jnp.nan, reached)
