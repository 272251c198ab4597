"""The pruning-aware backdoor: it is learned by the channels that clean data need (Liu, Dolan-Gavitt, Garg 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses, tree
from mlsec_jax.base import Info, Key, Known, LossFn, Params, Trainer, Transform
from mlsec_jax.channels import Layer, mean_activation, ranks


def pruning_aware(
    loss_fn: LossFn,
    layer: Layer,
    *,
    poison: Transform,
    trainer_fn: Callable[[LossFn], Trainer],
    num_pruned: int,
    margin: Any = 1.0,
) -> Transform:
    """Trains a network whose dormant channels are decoys: pruning them leaves the backdoor where it is.

    1. train on clean data; 2. prune the `num_pruned` channels of least mean activation on it; 3. train the pruned
    network on poisoned data, so that the backdoor has to live in the other channels; 4. put the pruned channels back
    as they were after 1, their biases lowered by `(1 + margin) max_{x in clean, hw} g_k(x)`, so that clean data leave them
    dormant and a defender who prunes takes them first.

    Threat: changes - the training, and so the model; sees - the training set, `known.clean`; budget - that of `poison`;
    assumes - the attacker trains the model, and the defender prunes what clean data leave dormant.

    Args:
      loss_fn: what the attacker minimises.
      layer: the channels, `channels.layer("conv1", activations_fn)`. On the clean data decoys are exactly dormant
        where the activation is ReLU, alone or before max-pooling.
      poison: a `Transform` of training data, such as `attacks.badnets(...)`.
      trainer_fn: `loss_fn -> Trainer`, for steps 1 and 3.
      num_pruned: channels that become decoys; static, fewer than the layer's. The paper gives channels back where the
        pruned network cannot learn both tasks: choose fewer.
      margin: non-negative, how much further than needed on the clean data biases are lowered.

    Returns:
      A `Transform` of initial parameters into the network that the victim gets; info: `keep [channels]` (False: a
      decoy), `shift [channels]` of the biases, `poison`, `clean` and `backdoor`, the infos of the parts.

    References: Liu, Dolan-Gavitt & Garg, "Fine-Pruning", RAID 2018, section 4. Deviates from the paper in: the number
      of decoys is given, and so is how far biases are lowered, which the paper leaves open.
    """
    checks.count("num_pruned", num_pruned)
    checks.at_least("margin", margin, 0)

    def transform(key: Key, subject: Params, known: Known) -> tuple[Params, Info]:
        clean_key, poison_key, backdoor_key = jax.random.split(key, 3)
        clean = known.require("clean", by="attacks.pruning_aware")
        checks.data("known.clean", clean)
        first, clean_info = trainer_fn(loss_fn)(clean_key, subject, clean)
        order = jnp.argsort(mean_activation(layer, first, clean), stable=True)
        if num_pruned >= order.shape[0]:
            raise ValueError(f"num_pruned: expected fewer than the layer's {order.shape[0]} channels, got {num_pruned}.")
        keep = ranks(order) >= num_pruned
        pruned_loss = lambda params, data, key=None: loss_fn(layer.prune_fn(params, keep), data, key)
        poisoned, poison_info = poison(poison_key, clean, known)
        second, backdoor_info = trainer_fn(pruned_loss)(backdoor_key, first, poisoned)
        second = layer.prune_fn(second, keep)
        # What pruning takes from `first`, and 0 in every leaf that it does not touch.
        taken = jax.tree.map(lambda a, b: a - b if tree.is_float(a) else a, first, layer.prune_fn(first, keep))
        whole = jax.tree.map(lambda a, b: a + b if tree.is_float(a) else a, second, taken)
        seen = losses.present(clean)
        active = layer.activations_fn(whole, seen.x)
        active = active.reshape(active.shape[0], -1, active.shape[-1])
        largest = jnp.max(active, axis=(0, 1), where=(clean.weight > 0)[:, None, None], initial=0)
        shift = jnp.where(keep, 0, (1 + jnp.asarray(margin, largest.dtype)) * largest)
        info = {"keep": keep, "shift": shift, "poison": poison_info, "clean": clean_info, "backdoor": backdoor_info}
        return layer.shift_fn(whole, shift), info

    return transform
