"""Influence of training rows on a held-out loss (Koh & Liang, ICML 2017)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses
from mlsec_jax.base import Data, Key, Known, LossFn, Params, Scorer


def influence(loss_fn: LossFn, trainer: Any) -> Scorer:
    """How much more of a row would raise the loss on `known.holdout`: the harmful rows score high.

    `score_i = Σw · ∂/∂w_i L(θ*(data), holdout)`. Through `bilevel.implicit` this is
    `-∇L(holdout)ᵀ H⁻¹ (∇ℓ_i - ∇mean ℓ)`: the paper's `I_up,loss(z_i, holdout)` for a mean loss that is renormalised
    when a weight changes, at the price of one linear solve. Through an unrolled trainer it is the influence along the
    path (Hara et al., NeurIPS 2019). Leaving row i out changes the held-out loss by about `-score_i w_i / Σw`.

    Args:
      loss_fn: per-example loss `-> [n]` that is measured on the holdout.
      trainer: `(key, params, data) -> (params, info)`, differentiable in the weights. It starts from the model given,
        which costs `bilevel.implicit` nothing when that is the optimum already.

    Returns:
      A `Scorer`; rows of weight 0 score 0.

    References: Koh & Liang, ICML 2017, eq. (2). Deviates from the paper in: the renormalisation above, which is what
    leave-one-out retraining of a mean loss does; the direct solve is the trainer's `linear_solve`.
    """
    mean_loss = losses.empirical(loss_fn)

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        holdout = known.require("holdout", by="scores.influence")
        checks.finite("known.holdout.x", holdout.x, holdout.weight)
        checks.finite("data.x", data.x, data.weight)

        def held_out(weight: jax.Array) -> jax.Array:
            trained, _ = trainer(key, params, data._replace(weight=weight))
            return mean_loss(trained, holdout)

        slope = jnp.where(data.weight > 0, jax.grad(held_out)(data.weight), 0)
        return jnp.sum(data.weight) * slope

    return score
