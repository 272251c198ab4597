"""What Neural Cleanse does with a recovered trigger: watch for it, unlearn it, prune the neurons it drives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, linalg, loop, losses, tree
from mlsec_jax.base import ApplyFn, Data, Info, Key, Known, Params, Scorer, Trainer, Transform


def _clean_and_trigger(known: Known, by: str) -> tuple[Data, Any]:
    """The clean rows and the trigger that a method asks for."""
    clean, trigger = (known.require(field, by=by) for field in ("clean", "trigger"))
    checks.data("known.clean", clean)
    return clean, trigger


def _gaps(features_fn: ApplyFn, params: Params, clean: Data, trigger: Any) -> jax.Array:
    """The mean of every neuron with the trigger, less its mean without: `[d]`; larger = driven more by the trigger."""
    present = losses.present(clean)
    seen = lambda x: features_fn(params, x).reshape(x.shape[0], -1)
    apart = seen(trigger(None, present.x)) - seen(present.x)
    weight = clean.weight.astype(apart.dtype)
    return weight @ apart / jnp.sum(weight)


def trigger_neurons(features_fn: ApplyFn, *, fraction: float = 0.01) -> Scorer:
    """How strongly an input drives the neurons that a recovered trigger drives most: the mean activation of those.

    `score_i = mean_{j ∈ N} φ_j(x_i)`, N the `max(1, ⌊fraction · d⌋)` neurons with the largest mean of
    `φ_j(A(x)) - φ_j(x)` over clean rows.

    Threat: changes - what is served (flag rows above a threshold, `combine.filter_above`, set by the scores of clean
    rows); sees - the model, clean rows (`known.clean`) and a trigger (`known.trigger`); budget - the false alarms;
    assumes - the recovered trigger drives the neurons that the true one does.

    Args:
      features_fn: `(params, x, key=None) -> [n, ...]`, the second-to-last layer, flattened.
      fraction: of the neurons; static.

    Returns:
      A `Scorer` for any rows; rows of weight 0 score 0.

    References: Wang et al., "Neural Cleanse", IEEE S&P 2019, section VI.A (top 1 %). Deviates from the paper in: neurons
      are ranked as for pruning, by the gap.
    """
    checks.between("fraction", fraction, 0, 1)

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        del key
        clean, trigger = _clean_and_trigger(known, "defenses.trigger_neurons")
        gaps = _gaps(features_fn, params, clean, trigger)
        slack = 4 * np.finfo(np.float64).eps  # a share that is whole stays so: 0.29 of 100 neurons are 29
        _, chosen = jax.lax.top_k(gaps, max(1, int(fraction * gaps.size * (1 + slack))))
        h = features_fn(params, losses.present(data).x)
        driven = jnp.mean(h.reshape(h.shape[0], -1)[:, chosen], axis=1)
        return jnp.where(data.weight > 0, driven, 0)

    return score


def unlearn_trigger(trainer: Trainer, *, fraction: Any = 0.2) -> Transform:
    """Fine-tunes on clean rows, a share of which carry the recovered trigger with their **correct** labels.

    Threat: changes - the model's parameters; sees - clean rows (`known.clean`) and a trigger (`known.trigger`); budget -
    the trainer's steps; assumes - the recovered trigger does what the true one does.

    Args:
      trainer: `(key, params, data) -> (params, info)`, such as one epoch of `bilevel.unrolled`.
      fraction: of the present rows that are stamped, drawn at random: `⌊fraction · n⌋`.

    Returns:
      A `Transform` of parameters; info: `stamped [n]` (bool) and `train`, the trainer's.

    References: Wang et al., "Neural Cleanse", IEEE S&P 2019, section VI.C (one epoch on 10 % of the training set).
    """
    checks.between("fraction", fraction, 0, 1)

    def transform(key: Key, subject: Params, known: Known) -> tuple[Params, Info]:
        clean, trigger = _clean_and_trigger(known, "defenses.unlearn_trigger")
        draw_key, stamp_key, train_key = jax.random.split(key, 3)
        present = clean.weight > 0
        place = jnp.argsort(jnp.argsort(loop.lots(draw_key, clean.weight)))
        share = linalg.whole_share(fraction, jnp.sum(present, dtype=jnp.int32))
        stamped = present & (place < share.astype(place.dtype))
        x = jnp.where(tree.per_row(stamped, clean.x), trigger(stamp_key, clean.x), clean.x)
        params, info = trainer(train_key, subject, clean._replace(x=x))
        return params, {"stamped": stamped, "train": info}

    return transform


def last_layer(path: str, leaf: Any) -> bool:
    """Chooses `params["head"]["w"]`, the weights `[d, c]` that read the features in the nets of `mlsec_jax.models`."""
    del leaf
    return path == "head/w"


def prune_trigger(
    apply_fn: ApplyFn,
    features_fn: ApplyFn,
    *,
    label: Any,
    success: Any = 0.05,
    num_steps: int = 50,
    reads: tree.Where = last_layer,
) -> Transform:
    """Silences the neurons that a recovered trigger drives most, one more share at a time, until it fails.

    Neurons in the order of the mean of `φ_j(A(x)) - φ_j(x)` over clean rows, largest first; after step k the first
    `⌈k d / num_steps⌉` are cut off from the layer that reads them. It stops at the first k with no more than `success` of
    the stamped clean rows of other labels sent to the label. It never prunes all: k ends at `num_steps - 1`.

    Threat: changes - weights of the layer after the features; sees - clean rows (`known.clean`) and a trigger
    (`known.trigger`); budget - `success`; assumes - the backdoor has neurons of its own.

    Args:
      apply_fn: `(params, x, key=None) -> logits [n, c]`.
      features_fn: `(params, x, key=None) -> [n, ...]`, the second-to-last layer, d neurons when flattened.
      label: what the trigger is taken for.
      success: of the trigger, that is enough to stop; 1 prunes nothing.
      num_steps: static, at least 2.
      reads: the leaves with the neurons as first axis whose rows are set to 0 (`tree.mask_of`).

    Returns:
      A `Transform` of parameters; info: `pruned [d]` (bool), `success`, what is left of the trigger's.

    References: Wang et al., "Neural Cleanse", IEEE S&P 2019, section VI.B.
    """
    checks.between("success", success, 0, 1)
    checks.count("num_steps", num_steps, 2)

    def transform(key: Key, subject: Params, known: Known) -> tuple[Params, Info]:
        del key
        clean, trigger = _clean_and_trigger(known, "defenses.prune_trigger")
        gaps = _gaps(features_fn, subject, clean, trigger)
        readers, rest = tree.partition(subject, reads)
        found = [leaf.shape for leaf in jax.tree.leaves(readers)]
        if not found or any(shape[0] != gaps.size for shape in found):
            raise ValueError(f"reads: expected leaves whose first axis is the {gaps.size} features, got shapes {found}.")
        place = jnp.argsort(jnp.argsort(-gaps)).astype(jnp.int32)
        stamped = trigger(None, losses.present(clean).x)
        checks.between("label", label, 0, jax.eval_shape(apply_fn, subject, stamped).shape[1] - 1)
        other = jnp.where(clean.y == label, 0, clean.weight)

        def cut(k: jax.Array) -> tuple[Params, jax.Array]:
            pruned = place < (k * gaps.size + num_steps - 1) // num_steps
            silence = lambda leaf: jnp.where(tree.per_row(pruned, leaf), jnp.zeros_like(leaf), leaf)
            return tree.merge(jax.tree.map(silence, readers), rest), pruned

        def left(k: jax.Array) -> jax.Array:
            said = jnp.argmax(apply_fn(cut(k)[0], stamped), axis=1).astype(clean.y.dtype)
            return losses.weighted_mean((said == label).astype(gaps.dtype), other)

        going = lambda state: (state[1] > jnp.asarray(success, gaps.dtype)) & (state[0] < num_steps - 1)
        start = jnp.zeros((), jnp.int32)
        k, rate = jax.lax.while_loop(going, lambda state: (state[0] + 1, left(state[0] + 1)), (start, left(start)))
        params, pruned = cut(k)
        return params, {"pruned": pruned, "success": rate}

    return transform
