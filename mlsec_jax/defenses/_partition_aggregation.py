"""Deep partition aggregation: votes of models that share no training row (Levine & Feizi, ICLR 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses, tree
from mlsec_jax.base import ApplyFn, Data, Info, Key, Params, Trainer

PredictFn = Callable[[Params, Any], tuple[jax.Array, Info]]


def partition_aggregation(
    trainer: Any,
    apply_fn: ApplyFn,
    *,
    num_partitions: int,
    capacity: int | None = None,
    labels_only: bool = False,
    hash_fn: Callable[[Any], jax.Array] | None = None,
    over: str = "map",
) -> tuple[Trainer, PredictFn]:
    """Every row is hashed, by its input alone, to one of k partitions; one model a partition; they vote.

    `n_c` of the k models say c, and `g = argmax_c n_c`, ties to the smaller label. Adding or deleting a row changes one
    partition, so one vote, and g stays what it is as long as no more than

        ρ = ⌊(n_g - max_{c ≠ g} (n_c + [c < g])) / 2⌋

    rows are added or deleted (a replaced row counts twice). The proof needs each model to be a function of its own
    partition: rows are put in an order of their own, at a fixed shape, whatever else is in the data, and the key and the
    starting parameters must not depend on the data. Nor may `apply_fn` or the inputs (a mean over all rows, a network
    pre-trained on them).

    With `labels_only` the attacker flips labels and touches no input. Rows are dealt out evenly in an order of their
    inputs, which may then be features learned from all of them without labels, and ρ counts flipped labels (SS-DPA).

    Threat: changes - rows, added and deleted (or labels); sees - everything; budget - ρ rows for each prediction; assumes -
    nothing.

    Args:
      trainer: of one model, `(key, params, data) -> (params, info)`; model i gets `fold_in(key, i)`.
      apply_fn: `(params, x, key=None) -> logits [m, c]`.
      num_partitions: k, static.
      capacity: rows of the largest partition that are trained on, static; what lies beyond, in the partition's own
        order, is left out, which costs accuracy and never the proof. None: all rows of the data, for toys, whose number the
        attacker must not change: the proof then holds for rows that fill reserved ones (of weight 0), not for appended ones.
      labels_only: see above.
      hash_fn: `x [n, ...] -> [n]` integers, a function of each row alone; None: of the bits of x. Published:
        `lambda x: jnp.sum(jnp.round(255 * x), axis=(1, 2, 3)).astype(jnp.int32)`. Not used with `labels_only`.
      over: `"map"`, one model after another, or `"vmap"`.

    Returns:
      `(trainer, predict_fn)`. The trainer gives the models' parameters stacked `[k, ...]`; info: `train` (the models'
      own), `sizes [k]`, `unused`, how many rows no model saw. `predict_fn(params, x) -> (label [m], info)` with `radius [m]`
      (ρ) and `votes [m, c]`. The derivative of the trainer is taken with the partitions as they are: exact for
      weights and soft labels, while an input that moves is hashed anew, which no derivative sees.

    Edge cases: rows that differ, though a 64-bit digest says they don't, have no order; they weigh 0. A model without rows
    votes as its starting parameters do.

    References: Levine & Feizi, ICLR 2021, eq. (10) and sections 3.1-3.2. Deviates from the paper in: bits hashed, not
      pixel sums; base models for SS-DPA get unsupervised features, not a semi-supervised training.
    """
    checks.count("num_partitions", num_partitions, 1)
    checks.one_of("over", over, ("map", "vmap"))
    if capacity is not None:
        checks.count("capacity", capacity, 1)
    if labels_only and hash_fn is not None:
        raise ValueError("hash_fn: expected None with labels_only, where rows are dealt out evenly.")

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        shown = losses.present(data)
        deal = _dealt_evenly(shown, num_partitions) if labels_only else _hashed(shown, num_partitions, hash_fn)
        rows, kept, sizes = _slots(*deal, num_partitions, capacity or data.num_rows)

        def one(i: jax.Array, rows: jax.Array, kept: jax.Array) -> tuple[Params, Info]:
            own = jax.tree.map(lambda leaf: jnp.where(tree.per_row(kept, leaf[rows]), leaf[rows], 0), shown)
            return trainer(jax.random.fold_in(key, i), params, own)

        models, infos = tree.each(one, jnp.arange(num_partitions), rows, kept, over=over)
        unused = jnp.sum(data.weight > 0, dtype=jnp.int32) - jnp.sum(kept, dtype=jnp.int32)
        return models, {"train": infos, "sizes": sizes, "unused": unused}

    def predict(params: Params, x: Any) -> tuple[jax.Array, Info]:
        logits = tree.each(lambda one: apply_fn(one, x), params, over=over)
        ballots = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.int32)
        votes = jnp.sum(ballots, axis=0, dtype=jnp.int32)
        label = jnp.argmax(votes, axis=1).astype(jnp.int32)
        classes = jnp.arange(votes.shape[1], dtype=jnp.int32)[None]
        rivals = jnp.where(classes == label[:, None], -1, votes + (classes < label[:, None]).astype(jnp.int32))
        most = jnp.max(votes, axis=1)
        return label, {"radius": (most - jnp.max(rivals, axis=1)) // 2, "votes": votes}

    return Trainer(fit), predict


def _hashed(data: Data, num_partitions: int, hash_fn: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each row's partition (k where it is absent), the rows' order, and which rows have one: all by content alone."""
    of_input = _digest(_words(data.x))[0] if hash_fn is None else hash_fn(data.x)
    part = jnp.mod(of_input, jnp.asarray(num_partitions, of_input.dtype)).astype(jnp.int32)
    part = jnp.where(data.weight > 0, part, num_partitions)
    words = _words(data)
    first, second = _digest(words)
    order = jnp.lexsort((second, first, part))
    before = jnp.roll(order, 1)
    alike = (part[order] == part[before]) & (first[order] == first[before]) & (second[order] == second[before])
    group = jnp.cumsum(~alike.at[0].set(False))
    clash = alike & jnp.any(words[order] != words[before], axis=1)
    clashes = jax.ops.segment_max(clash.astype(jnp.int32), group, num_segments=group.size + 1)
    return part[order], order, clashes[group] == 0


def _dealt_evenly(data: Data, num_partitions: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, by the inputs' order alone: the i-th present row goes to partition i mod k."""
    there = data.weight > 0
    first, second = _digest(_words(data.x))
    order = jnp.lexsort((second, first, ~there))
    part = jnp.where(there[order], jnp.arange(order.size) % num_partitions, num_partitions).astype(jnp.int32)
    sort = jnp.argsort(part, stable=True)
    return part[sort], order[sort], jnp.ones(order.shape, bool)


def _slots(
    part: jax.Array, order: jax.Array, ordered: jax.Array, num_partitions: int, capacity: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows of each partition `[k, capacity]`, which of these slots are used, and the partitions' sizes `[k]`."""
    sizes = jnp.bincount(part, length=num_partitions + 1)[:num_partitions].astype(jnp.int32)
    slot = jnp.arange(capacity, dtype=jnp.int32)[None]
    place = jnp.minimum((jnp.cumsum(sizes) - sizes)[:, None] + slot, order.size - 1)
    return order[place], (slot < sizes[:, None]) & ordered[place], sizes


def _words(rows: Any) -> jax.Array:
    """Rows of any arrays as the unsigned 32-bit words that they are made of, `[n, m]`."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}

    def bits(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else jax.lax.stop_gradient(leaf)
        words = jax.lax.bitcast_convert_type(leaf, unsigned[leaf.dtype.itemsize])
        return words.reshape(leaf.shape[0], -1).astype(jnp.uint32)

    return jnp.concatenate([bits(leaf) for leaf in jax.tree.leaves(rows)], axis=1)


def _digest(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two hashes of each row: sums, mod 2³², of its words, each scrambled together with its place."""
    place = jnp.arange(words.shape[1], dtype=jnp.uint32)
    salted = lambda salt: jnp.sum(_scrambled(words ^ _scrambled(place + salt)[None]), axis=1, dtype=jnp.uint32)
    return salted(jnp.uint32(0x9E3779B9)), salted(jnp.uint32(0x7F4A7C15))


def _scrambled(word: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit depends on every bit (MurmurHash3's finaliser)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
