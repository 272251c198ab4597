"""How often a model errs, and how often an attack gets what it wants. Pure JAX; rows of weight 0 are absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlsec_jax import base, checks
from mlsec_jax.measure._interval import wilson


def _labels(name: str, values: jax.Array) -> jax.Array:
    """Integer labels `[n]`; logits, probabilities or soft labels `[n, c]` by their largest entry, -1 with NaN."""
    values = jnp.asarray(values)
    if values.ndim == 2 and values.shape[1] > 1:
        return jnp.where(jnp.any(jnp.isnan(values), axis=1), -1, jnp.argmax(values, axis=1).astype(jnp.int32))
    if values.ndim != 1 or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integer [n] or real [n, c], c > 1, got {values.dtype} of shape {values.shape}.")
    return values.astype(jnp.int32)  # unsigned labels would make 255 of -1


def _compared(predicted: jax.Array, data: base.Data) -> tuple[jax.Array, jax.Array]:
    """Predicted and true labels, both `[n]`."""
    predicted, true = _labels("predicted", predicted), _labels("data.y", data.y)
    if predicted.shape != true.shape:
        raise ValueError(f"predicted and data.y: expected as many rows, got {predicted.shape} and {true.shape}.")
    return predicted, true


def accuracy(predicted: jax.Array, data: base.Data) -> jax.Array:
    """The weighted share of rows predicted as their label: Σ w 1{ŷ = y} / Σ w.

    Args:
      predicted: labels `[n]`, or logits `[n, c]` (the first of the largest entries wins; with a NaN none does).
      data: `n` rows; soft labels count by their largest entry.

    Returns:
      A scalar; NaN where no row has weight.

    >>> rows = base.dataset(jnp.zeros((3, 1)), jnp.array([0, 1, 1]), jnp.array([1.0, 1.0, 0.0]))
    >>> float(accuracy(jnp.array([0, 0, 0]), rows))
    0.5
    """
    predicted, true = _compared(predicted, data)
    return _share(predicted == true, data.weight)


def error(predicted: jax.Array, data: base.Data) -> jax.Array:
    """The weighted share of rows predicted as another label: Σ w 1{ŷ ≠ y} / Σ w. See `accuracy`."""
    predicted, true = _compared(predicted, data)
    return _share(predicted != true, data.weight)


def error_on(predicted: jax.Array, data: base.Data, classes: int | Sequence[int]) -> jax.Array:
    """The error on the rows of one class, or of several together.

    Args:
      predicted: labels `[n]`, or logits `[n, c]`.
      data: `n` rows.
      classes: a label, or labels.

    Returns:
      A scalar; NaN where no such row has weight.

    >>> rows = base.dataset(jnp.zeros((3, 1)), jnp.array([8, 8, 3]))
    >>> float(error_on(jnp.array([3, 8, 8]), rows, 8))
    0.5
    """
    predicted, true = _compared(predicted, data)
    chosen = jnp.isin(true, jnp.atleast_1d(jnp.asarray(classes, true.dtype)))
    return _share(predicted != true, jnp.where(chosen, data.weight, jnp.zeros_like(data.weight)))


def per_class_error(predicted: jax.Array, data: base.Data, num_classes: int) -> jax.Array:
    """The error on each class.

    Args:
      predicted: labels `[n]`, or logits `[n, c]`.
      data: `n` rows.
      num_classes: how many labels there are (static).

    Returns:
      `[num_classes]`; NaN for a class none of whose rows has weight.
    """
    counts = confusion(predicted, data, num_classes)
    return 1 - jnp.diagonal(counts) / counts.sum(axis=1)


def confusion(predicted: jax.Array, data: base.Data, num_classes: int) -> jax.Array:
    """The summed weight of the rows with each pair of labels.

    Args:
      predicted: labels `[n]`, or logits `[n, c]`.
      data: `n` rows. True or predicted labels of present rows outside `[0, num_classes)`
        are an error where they can be looked at.
      num_classes: how many labels there are (static).

    Returns:
      `[num_classes, num_classes]`: row = true label, column = predicted label.

    >>> confusion(jnp.array([0, 1, 1]), base.dataset(jnp.zeros((3, 1)), jnp.array([0, 0, 1])), 2).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    checks.count("num_classes", num_classes, 1)
    predicted, true = (jnp.where(data.weight > 0, labels, 0) for labels in _compared(predicted, data))
    checks.between("data.y", true, 0, num_classes - 1)
    checks.between("predicted", predicted, 0, num_classes - 1)
    weight = jnp.where(predicted < 0, jnp.nan, data.weight)
    return jnp.zeros((num_classes, num_classes), data.weight.dtype).at[true, predicted].add(weight)


class AttackSuccess(NamedTuple):
    """How often the attack got what it wanted: counts, their ratio, and its Wilson interval."""

    successes: jax.Array
    trials: jax.Array
    rate: jax.Array
    low: jax.Array
    high: jax.Array


def attack_success(
    predicted: jax.Array,
    data: base.Data,
    label: jax.Array | int,
    *,
    eligible: jax.Array | None = None,
    confidence: float = 0.95,
) -> AttackSuccess:
    """Counts the eligible rows that are predicted as the attacker's label.

    Eligible rows have positive weight and another true label than the attacker's; `eligible` narrows them further,
    usually to the rows that a clean model gets right. Weights decide presence only: a trial counts once.

    Args:
      predicted: labels `[n]`, or logits `[n, c]`, of the attacked model.
      data: the targets, with their true labels.
      label: the attacker's label, one for all or `[n]`.
      eligible: boolean `[n]`, or None for all.
      confidence: of the interval.

    Returns:
      `AttackSuccess` of scalars. Without a trial the rate is NaN and the interval is all of [0, 1].

    >>> rows = base.dataset(jnp.zeros((4, 1)), jnp.array([8, 8, 8, 3]))
    >>> success = attack_success(jnp.array([3, 3, 8, 3]), rows, 3)
    >>> int(success.successes), int(success.trials)
    (2, 3)
    """
    predicted, true = _compared(predicted, data)
    label = jnp.broadcast_to(jnp.asarray(label, true.dtype), true.shape)
    chosen = (data.weight > 0) & (true != label)
    if eligible is not None:
        chosen = chosen & jnp.asarray(eligible, bool)
    successes, trials = jnp.sum(chosen & (predicted == label)), jnp.sum(chosen)
    rate = successes.astype(data.weight.dtype) / trials.astype(data.weight.dtype)
    return AttackSuccess(successes, trials, rate, *wilson(successes, trials, confidence=confidence))


def _share(hit: jax.Array, weight: jax.Array) -> jax.Array:
    """Σ w 1{hit} / Σ w."""
    return jnp.where(hit, weight, jnp.zeros_like(weight)).sum() / weight.sum()
