"""MaxUp: train on the worst of several augmentations of each row (Gong et al. 2021; Borgnia et al. 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlsec_jax import checks
from mlsec_jax.base import Data, Key, LossFn, Params
from mlsec_jax.loop import BatchTransform


def max_up(loss_fn: LossFn, augment_fn: BatchTransform, *, num_trials: int = 4) -> LossFn:
    """The loss of a row is the largest over `num_trials` augmentations of that row.

    `min_θ mean_i max_{j ≤ m} ℓ(f_θ(T_ij x_i), y_i)`.

    Threat: changes - the loss of training; sees - nothing; budget - `num_trials`; assumes - what the augmentation does to a
    trigger.

    Args:
      loss_fn: per-example loss.
      augment_fn: `(key, data) -> data` that keeps rows apart, such as `cutout` (the paper's) or `train.augment`. One that mixes
        rows (`mixup`) has no maximum row by row.
      num_trials: m, static.

    Returns:
      `(params, data, key=None) -> [n]`, for any trainer. Without a key, in evaluation, it is `loss_fn`; its derivative is that of
      the worst trial.

    References: Gong et al., CVPR 2021, eq. (3); Borgnia et al., ICASSP 2021, section 3. Deviates from the paper's code in:
    trials are grouped by row, where the code of Borgnia et al. groups different rows; it acts from the first epoch on.
    """
    checks.count("num_trials", num_trials, 1)

    def worst(params: Params, data: Data, key: Key | None = None) -> jax.Array:
        if key is None:
            return loss_fn(params, data)

        def trial(key: Key) -> jax.Array:
            augment_key, loss_key = jax.random.split(key)
            return loss_fn(params, augment_fn(augment_key, data), loss_key)

        return jnp.max(jax.vmap(trial)(jax.random.split(key, num_trials)), axis=0)

    return worst
