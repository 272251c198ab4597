"""Fine-pruning: cut the channels that clean data leave dormant, then fine-tune (Liu, Dolan-Gavitt, Garg 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses, measure
from mlsec_jax.base import ApplyFn, Info, Key, Known, LossFn, Params, Trainer, Transform
from mlsec_jax.channels import Layer, along, mean_activation, ranks
from mlsec_jax.combine import Soft, StraightThrough, Surrogate, check_surrogate

TrainerFn = Callable[[LossFn], Trainer]


def fine_prune(
    apply_fn: ApplyFn,
    layer: Layer,
    *,
    budget: Any = 0.04,
    max_pruned: int | None = None,
    trainer_fn: TrainerFn | None = None,
    loss_fn: LossFn | None = None,
    gradient: Surrogate = "hard",
) -> Transform:
    """Prunes the channels of least mean activation on clean data while held-out accuracy allows, then fine-tunes.

    `a_k = E_{x in clean} mean_{hw} g_k(x)`; channels are pruned in ascending order of a; with `A_j` the accuracy on
    the holdout without the first j of them, the number pruned is the largest m with `A_j ≥ A_0 - budget` for **every**
    `j ≤ m`: the first step that breaks the budget is not taken, nor any after it.

    Fine-tuning minimises `loss(prune(θ, keep))` on the clean data: the derivative in a pruned channel is exactly 0,
    whatever the trainer, and no other channel learns to lean on it.

    Threat: changes - the model's parameters; sees - `known.clean` and `known.holdout`, no other data; budget - points of
    held-out accuracy; assumes - a backdoor lives in channels that clean inputs leave dormant, which an attacker who
    knows of it can avoid (`attacks.pruning_aware`).

    Args:
      apply_fn: the model's logits.
      layer: the channels, `channels.layer("conv1", activations_fn)`; the last convolution in the paper.
      budget: by how much accuracy may fall, non-negative; 0 prunes what costs nothing.
      max_pruned: at most so many channels, static; None: all of them. 0 changes nothing but for the fine-tuning.
      trainer_fn: `loss_fn -> Trainer`, such as `lambda loss_fn: bilevel.unrolled(loss_fn, optax.adam(1e-4), 100)`; None:
        prune only.
      loss_fn: what is fine-tuned; None: cross-entropy of `apply_fn`.
      gradient: how the choice of channels is differentiated: `"hard"` holds it fixed, so that derivatives are those of
        the channels kept; `combine.soft(t)` keeps `sigmoid((a_k - cut) / t)` of each, the cut midway between the last
        pruned and the first kept; `combine.straight_through(t)` has the derivative of that alone. For adaptive
        attacks, which are to be judged against "hard".

    Returns:
      A `Transform` of parameters; info: `activation [channels]`, `order [channels]` (the least active first), `accuracy
      [max_pruned + 1]` on the holdout along the path, `num_pruned`, `keep [channels]` (bool), and `tune`, the trainer's
      info. `channels.along(layer.prune_fn, params, info["order"], …)` measures anything else along the path.

    References: Liu, Dolan-Gavitt & Garg, "Fine-Pruning", RAID 2018, section 3. Deviates from the paper in: the
      accuracy is that of a holdout apart from the data that rank and fine-tune.
    """
    checks.at_least("budget", budget, 0)
    if max_pruned is not None:
        checks.count("max_pruned", max_pruned)
    check_surrogate(gradient)
    tuned_loss = losses.cross_entropy(apply_fn) if loss_fn is None else loss_fn

    def kept(activation: jax.Array, order: jax.Array, num_pruned: jax.Array) -> tuple[jax.Array, jax.Array]:
        keep = ranks(order) >= num_pruned
        factor = keep.astype(activation.dtype)
        if not isinstance(gradient, (Soft, StraightThrough)):
            return keep, factor
        at = lambda place: activation[order[jnp.clip(place, 0, order.shape[0] - 1)]]
        cut = (at(num_pruned - 1) + at(num_pruned)) / 2
        smooth = jax.nn.sigmoid((activation - cut) / jnp.asarray(gradient.temperature, activation.dtype))
        smooth = jnp.where(num_pruned > 0, smooth, 1)
        return keep, smooth if isinstance(gradient, Soft) else factor + smooth - jax.lax.stop_gradient(smooth)

    def transform(key: Key, subject: Params, known: Known) -> tuple[Params, Info]:
        clean = known.require("clean", by="defenses.fine_prune")
        holdout = known.require("holdout", by="defenses.fine_prune")
        checks.data("known.clean", clean)
        checks.data("known.holdout", holdout)
        activation = mean_activation(layer, subject, clean)
        order = jnp.argsort(activation, stable=True)
        if max_pruned is not None and max_pruned > order.shape[0]:
            raise ValueError(f"max_pruned: expected at most the layer's {order.shape[0]} channels, got {max_pruned}.")
        seen = losses.present(holdout)
        accuracy_of = lambda params: measure.accuracy(apply_fn(params, seen.x), seen)
        accuracy = along(layer.prune_fn, subject, order, accuracy_of, num_levels=max_pruned)
        within = accuracy >= accuracy[0] - jnp.asarray(budget, accuracy.dtype) - 1e-6
        num_pruned = jnp.maximum(jnp.sum(jnp.cumprod(within.astype(order.dtype)), dtype=order.dtype) - 1, 0)
        keep, factor = kept(activation, order, num_pruned)
        tune: Info = {}
        if trainer_fn is not None:
            pruned_loss = lambda params, data, key=None: tuned_loss(layer.prune_fn(params, factor), data, key)
            subject, tune = trainer_fn(pruned_loss)(key, subject, clean)
        info = {"activation": activation, "order": order, "accuracy": accuracy, "num_pruned": num_pruned}
        return layer.prune_fn(subject, factor), {**info, "keep": keep, "tune": tune}

    return transform
