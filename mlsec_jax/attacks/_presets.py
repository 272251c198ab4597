"""The named poisoning attacks that are the generic one with a goal, and the goals and starting points they use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, linalg, losses, tree
from mlsec_jax.attacks._bilevel import Options, bilevel
from mlsec_jax.base import Algorithm, Data, Key, LossFn

Rule = Callable[[Key, jax.Array], jax.Array]  # (key, y [k]) -> y' [k]


def availability(loss_fn: LossFn, trainer: Any, **options: Unpack[Options]) -> Algorithm:
    """Denial of service: poisons that raise the victim's loss on everything.

    `min_poison -mean ℓ(θ*(D), goal)`, the goal carrying its *true* labels.

    Threat: changes - what `threat` says; sees - the training set, the trainer, θ₀ (`known.params`), validation data
    with true labels (`known.goal`); budget - the threat's; assumes - the trainer given is the victim's or a surrogate.

    Args:
      loss_fn: the attacker's per-example loss `-> [n]`.
      trainer: `(key, params, data) -> (params, info)`.
      **options: `threat` and `optimizer`, both required, `order` and `fixed_key` of `bilevel`.

    Returns:
      An `Algorithm`: `bilevel` with `losses.availability(loss_fn)`.

    References: Muñoz-González et al., AISec 2017, eq. (3); Biggio et al., ICML 2012, eq. (3).
    """
    return bilevel(losses.availability(loss_fn), trainer, **options)


def targeted(loss_fn: LossFn, trainer: Any, **options: Unpack[Options]) -> Algorithm:
    """Integrity: poisons that make the victim give chosen points the labels that the attacker chose.

    `min_poison mean ℓ(θ*(D), goal)`, the goal carrying the *desired* labels (`targeted_goal`).

    Threat: changes - what `threat` says; sees - the training set, the trainer, θ₀ (`known.params`), the target points
    (`known.goal`); budget - the threat's; assumes - the trainer given is the victim's or a surrogate of it.

    Args: as `availability`.

    Returns:
      An `Algorithm`: `bilevel` with `losses.goal_loss(loss_fn)`.

    References: Muñoz-González et al., AISec 2017, eq. (4).
    """
    return bilevel(losses.goal_loss(loss_fn), trainer, **options)


def error_specific(loss_fn: LossFn, trainer: Any, **options: Unpack[Options]) -> Algorithm:
    """Poisons that send one class to another, on data never seen: 8s to 3s.

    `min_poison mean ℓ(θ*(D), goal)`, the goal a relabelled validation set (`error_specific_goal`).

    Threat: changes - what `threat` says; sees - the training set, the trainer, θ₀ (`known.params`), a validation set
    (`known.goal`); budget - the threat's; assumes - the trainer given is the victim's or a surrogate of it.

    Args: as `availability`.

    Returns:
      An `Algorithm`: `bilevel` with `losses.goal_loss(loss_fn)`.

    References: Muñoz-González et al., AISec 2017, eq. (4) and section 4.3.
    """
    return targeted(loss_fn, trainer, **options)


def targeted_goal(points: Data, labels: Any) -> Data:
    """The goal of a targeted attack: the points with the labels that the attacker desires.

    Args:
      points: the targets; what they truly are does not matter.
      labels: `[n]`, or one label for all.
    """
    return points._replace(y=jnp.broadcast_to(jnp.asarray(labels, points.y.dtype), points.y.shape))


def error_specific_goal(holdout: Data, *, source: Any = 8, target: Any = 3, clean_weight: Any = 0.0) -> Data:
    """The goal of an error-specific attack, in both its published forms.

    Rows of class `source` are relabelled `target`; every other row keeps its true label and its weight is multiplied by
    `clean_weight`. With 0 the goal is the relabelled sources alone, as the 2017 paper ran it; with 1 it is the mixed
    set of the lecture (targets with the desired label plus clean samples), which asks the attack to spare the rest.

    Args:
      holdout: validation data with integer labels.
      source: the class to be misclassified.
      target: the class it shall be taken for.
      clean_weight: non-negative.

    Returns:
      `Data` of the same shape: rows that do not count have weight 0.

    >>> from mlsec_jax.base import dataset
    >>> goal = error_specific_goal(dataset(jnp.ones((3, 1)), jnp.array([8, 3, 1])), clean_weight=0.5)
    >>> goal.y.tolist(), goal.weight.tolist()
    ([3, 3, 1], [1.0, 0.5, 0.5])
    """
    checks.at_least("clean_weight", clean_weight, 0)
    checks.single_labels("holdout.y", holdout.y)
    if checks.is_concrete((holdout, source)) and source not in np.asarray(holdout.y)[np.asarray(holdout.weight) > 0]:
        raise ValueError(f"source: expected a class that holdout has rows of, got {source}.")
    chosen = holdout.y == source
    factor = jnp.where(chosen, 1, jnp.asarray(clean_weight, holdout.weight.dtype))
    relabelled = jnp.where(chosen, jnp.asarray(target, holdout.y.dtype), holdout.y)
    return holdout._replace(y=relabelled, weight=holdout.weight * factor.astype(holdout.weight.dtype))


def swap(first: Any, second: Any) -> Rule:
    """The rule that exchanges two labels and leaves others alone; for binary labels it is the flip.

    >>> swap(3, 8)(None, jnp.array([3, 8, 5])).tolist()
    [8, 3, 5]
    """

    def rule(key: Key, y: jax.Array) -> jax.Array:
        del key
        a, b = jnp.asarray(first, y.dtype), jnp.asarray(second, y.dtype)
        return jnp.where(y == a, b, jnp.where(y == b, a, y))

    return rule


def random_other(num_classes: int) -> Rule:
    """The rule that draws uniformly among the other labels of `[0, num_classes)`."""
    checks.count("num_classes", num_classes, 2)
    return lambda key, y: linalg.turned(y, jax.random.randint(key, y.shape, 1, num_classes, jnp.int32), num_classes)


def start_points(key: Key, train: Data, num_points: int, *, rule: Rule, classes: Sequence[int] | None = None) -> Data:
    """Where poisons start: copies of training rows with labels changed by a rule, for `threat.reserve`.

    Args:
      key: draws rows, then labels.
      train: the training set, one label a row; rows of weight 0 are never drawn.
      num_points: static. If fewer rows are eligible, they are used again.
      rule: `swap(3, 8)`, `random_other(num_classes)`, or any `(key, y) -> y'`.
      classes: draw rows of these classes only; None for all.

    Returns:
      `Data` of `num_points` rows with weight 1.

    References: Muñoz-González et al., AISec 2017, section 4 (cloned training points, labels flipped or swapped).
    """
    checks.count("num_points", num_points)
    checks.single_labels("train.y", train.y)
    row_key, label_key = jax.random.split(key)
    eligible = train.weight > 0
    if classes is not None:
        eligible &= jnp.any(train.y[:, None] == jnp.asarray(classes, train.y.dtype)[None, :], axis=1)
    if num_points and checks.is_concrete(train) and not np.isin(
        np.asarray(train.y)[np.asarray(train.weight) > 0], np.asarray(train.y if classes is None else classes)
    ).any():
        raise ValueError(f"classes: expected at least one training row of the classes {classes}, got none.")
    order = jnp.argsort(jnp.where(eligible, jax.random.uniform(row_key, eligible.shape), 2.0))
    count = jnp.maximum(jnp.sum(eligible.astype(order.dtype)), 1)
    chosen = tree.take(train, order[jnp.arange(num_points, dtype=order.dtype) % count])
    return chosen._replace(y=rule(label_key, chosen.y), weight=jnp.ones(num_points, train.weight.dtype))
