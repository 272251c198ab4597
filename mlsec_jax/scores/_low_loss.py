"""Loss-based isolation: what is learned first, and too well, is suspicious (anti-backdoor learning, Li et al. 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses
from mlsec_jax.base import Data, Key, Known, LossFn, Params, Scorer, Trainer


def low_loss(loss_fn: LossFn, *, trainer: Trainer | None = None) -> Scorer:
    """Minus the loss of a row, in a model that was trained for a short while only.

    `score_i = -ℓ(θ, z_i)`, `θ = train(θ_0, data)`. Anti-backdoor learning trains for 10 to 20 epochs, with
    `grad_fn=defenses.flooding(0.5)` to hold the loss of ordinary rows up, and isolates the 1 % of the lowest loss:
    `combine.filter_top(low_loss(…), fraction=0.01)`.

    Differentiable as far as the trainer is.

    Args:
      loss_fn: per-example loss `-> [n]`; evaluated without a key.
      trainer: `(key, params, data) -> (params, info)`, from the model given; None: the model given is scored as it is.

    Returns:
      A `Scorer`; rows of weight 0 score `-inf`.

    References: Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021, section 3.2.
    """

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        del known
        checks.finite("data.x", data.x, data.weight)
        if trainer is not None:
            params, _ = trainer(key, params, data)
        return jnp.where(data.weight > 0, -loss_fn(params, losses.present(data)), -jnp.inf)

    return score
