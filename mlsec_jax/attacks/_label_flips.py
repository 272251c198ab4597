"""Poisoning by flipping labels: random, ranked by margin, greedy (Paudice et al. 2018), ALFA (Xiao et al. 2012).

All are `Transform`s of training `Data` with integer labels in `[0, num_classes)`, at a fixed budget `num_flips`. Rows
of weight 0 are never flipped.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, linalg, losses, tree
from mlsec_jax.base import ApplyFn, Data, Info, Key, Known, LossFn, OuterFn, Transform
from mlsec_jax.combine import ModelTransform


def _check(subject: Data, num_flips: int, num_classes: int) -> None:
    checks.integer_labels("subject.y", subject.y)
    checks.data("subject", subject)
    if checks.is_concrete(subject):
        present = np.asarray(subject.weight) > 0
        checks.between("subject.y", np.asarray(subject.y)[present], 0, num_classes - 1)
        if num_flips > present.sum():
            raise ValueError(f"num_flips: expected at most the {present.sum()} present rows, got {num_flips}.")


def _flip_lowest(subject: Data, score: jax.Array, labels: jax.Array, num_flips: int) -> tuple[Data, Info]:
    """Gives the present rows of the `num_flips` lowest scores their new labels."""
    present = subject.weight > 0
    order = jnp.argsort(jnp.where(present, score, jnp.inf), stable=True)
    rank = jnp.zeros(score.shape, jnp.int32).at[order].set(jnp.arange(score.size, dtype=jnp.int32))
    flipped = present & (rank < num_flips)
    return subject._replace(y=jnp.where(flipped, labels.astype(subject.y.dtype), subject.y)), {"flipped": flipped}


def flip_random(*, num_flips: int, num_classes: int, stratify: bool = False) -> Transform:
    """Flips labels of rows drawn at random, each to a uniformly drawn other class: the baseline of all poisoning.

    Threat: changes - `num_flips` labels; sees - the training set; budget - `num_flips`; assumes - nothing.

    Args:
      num_flips: static.
      num_classes: static.
      stratify: draw from each class in proportion to its size, so that flips do not drift an unbalanced prior.

    Returns:
      A `Transform`; info: `flipped [n]`.
    """
    checks.count("num_flips", num_flips)
    checks.count("num_classes", num_classes, 2)

    def transform(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        _check(subject, num_flips, num_classes)
        order_key, label_key = jax.random.split(key)
        shift = jax.random.randint(label_key, subject.y.shape, 1, num_classes, jnp.int32)
        score = jax.random.uniform(order_key, subject.y.shape)
        if stratify:  # the rank within the class as a share of the class: low shares come from all classes alike
            _, before, count = linalg.ranked(score, jnp.where(subject.weight > 0, subject.y, num_classes), num_classes)
            score = (before.astype(score.dtype) + score) / jnp.maximum(count[subject.y], 1).astype(score.dtype)
        return _flip_lowest(subject, score, linalg.turned(subject.y, shift, num_classes), num_flips)

    return transform


def flip_margin(apply_fn: ApplyFn, *, num_flips: int, farthest: bool = False) -> ModelTransform:
    """Flips the rows nearest to (or farthest from) the decision boundary to the strongest other class.

    Ranked by the margin `f_y(x) - max_{c≠y} f_c(x)` of the model in `known.params`: nearest flips the smallest
    magnitudes, farthest the largest margins.

    Threat: changes - `num_flips` labels; sees - the training set and a trained model (`known.params`); budget -
    `num_flips`; assumes - the model is near to the victim's.

    Args:
      apply_fn: `(params, x, key=None) -> logits [n, c]`, or one logit a row, `[n]` or `[n, 1]`, of class 1.
      num_flips: static.
      farthest: flip the most confident rows instead.

    Returns:
      A `Transform`; info: `flipped [n]`, `margin [n]`.

    References: Xiao et al., ECAI 2012, section 4 (the nearest-first and furthest-first baselines).
    """
    checks.count("num_flips", num_flips)

    def transform(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        params = known.require("params", by="attacks.flip_margin")
        logits = apply_fn(params, losses.present(subject).x)
        if logits.size == subject.num_rows:  # one logit a row is that of class 1 against class 0
            logits = jnp.stack([-logits.reshape(-1) / 2, logits.reshape(-1) / 2], axis=1)
        if logits.ndim != 2:
            raise ValueError(f"apply_fn: expected logits [n, c], [n, 1] or [n], got shape {logits.shape}.")
        _check(subject, num_flips, logits.shape[-1])
        label = jax.nn.one_hot(subject.y, logits.shape[-1], dtype=logits.dtype)
        others = jnp.where(label > 0, -jnp.inf, logits)
        margin = jnp.sum(logits * label, axis=-1) - jnp.max(others, axis=-1)
        score = -margin if farthest else jnp.abs(margin)
        flipped, info = _flip_lowest(subject, score, jnp.argmax(others, axis=-1), num_flips)
        return flipped, {**info, "margin": margin}

    return ModelTransform(transform)


def flip_greedy(outer: OuterFn, trainer: Any, *, num_flips: int, num_classes: int, over: str = "map") -> Transform:
    """Tries every flip by retraining, keeps the best, and goes on: `O(n · num_flips)` trainings.

    Step t: `(i, c) = argmin_{i not yet flipped, c ≠ y_i} outer(θ*(D with y_i := c), D, goal)`.

    Threat: changes - `num_flips` labels; sees - the training set, the trainer, θ₀ (`known.params`), its goal
    (`known.goal`); budget - `num_flips`; assumes - the trainer given is the victim's or a surrogate of it.

    Args:
      outer: `(params, data, goal) -> scalar`, minimised; `losses.availability(loss_fn)` is the paper's.
      trainer: `(key, params, data) -> (params, info)`; its derivative is not used.
      num_flips: static.
      num_classes: static.
      over: the candidates' axis, `"map"` or `"vmap"`.

    Returns:
      A `Transform`; info: `flipped [n]`, `outer [num_flips]`, the goal after each flip; infinite, and nothing is flipped,
      where no row is left or every candidate's goal is NaN.

    References: Paudice, Muñoz-González & Lupu, 2018 (arXiv:1803.00992), algorithm 1. Deviates from the paper in: any
    number of classes; every row is a candidate.
    """
    checks.count("num_flips", num_flips)
    checks.count("num_classes", num_classes, 2)
    checks.one_of("over", over, ("map", "vmap"))

    def transform(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        _check(subject, num_flips, num_classes)
        goal = known.require("goal", by="attacks.flip_greedy")
        start = known.require("params", by="attacks.flip_greedy")
        if isinstance(goal, Data):
            checks.data("known.goal", goal)
        n = subject.num_rows
        candidates = jnp.arange(n * (num_classes - 1))

        def relabel(y: jax.Array, candidate: jax.Array) -> jax.Array:
            row, shift = candidate % n, (1 + candidate // n).astype(jnp.int32)
            return y.at[row].set(linalg.turned(y[row], shift, num_classes))

        def body(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            y, flipped = carry

            def evaluate(candidate: jax.Array) -> jax.Array:
                data = subject._replace(y=relabel(y, candidate))
                params, _ = trainer(key, start, data)
                with checks.naming("known.goal"):
                    return outer(params, data, goal)

            values = tree.each(evaluate, candidates, over=over)
            taken = jnp.tile(flipped | (subject.weight <= 0), num_classes - 1)
            values = jnp.where(taken | jnp.isnan(values), jnp.inf, values)
            best = jnp.argmin(values)
            free = values[best] < jnp.inf
            y = jnp.where(free, relabel(y, best), y)
            return (y, flipped.at[best % n].set(flipped[best % n] | free)), values[best]

        carry = (subject.y, jnp.zeros(n, bool))
        (y, flipped), values = jax.lax.scan(body, carry, None, length=num_flips)
        return subject._replace(y=y), {"flipped": flipped, "outer": values}

    return transform


def flip_alfa(
    loss_fn: LossFn, trainer: Any, *, num_flips: int, num_classes: int = 2, num_rounds: int = 10
) -> Transform:
    """Adversarial label flips: labels that a poisoned model fits well and the clean model fits badly.

    Over the set of every row with every label, `min_q Σ_i Σ_c q_ic (ℓ_poisoned(x_i, c) - ℓ_clean(x_i, c))` with one
    label a row and `num_flips` rows flipped, alternated with training the poisoned model on q. For a fixed model the
    linear program has a closed form: flip the rows of the lowest `min_{c≠y} Δ_ic - Δ_iy`. ℓ_poisoned starts at 0.

    Threat: changes - `num_flips` labels; sees - the training set, the trainer and θ₀ (`known.params`); budget -
    `num_flips`; assumes - the trainer given is the victim's or a surrogate of it. It needs no validation data.

    Args:
      loss_fn: per-example loss `-> [n]`.
      trainer: `(key, params, data) -> (params, info)`.
      num_flips: static.
      num_classes: static.
      num_rounds: static; the alternation has usually settled after ten.

    Returns:
      A `Transform`; info: `flipped [n]`, `changed [num_rounds]` (labels that the round changed; 0 = settled).

    References: Xiao, Xiao & Eckert, ECAI 2012, eq. (11)-(12), algorithm 1. Deviates from the paper in: any trainer,
    any number of classes, and one uniform flip cost.
    """
    checks.count("num_flips", num_flips)
    checks.count("num_classes", num_classes, 2)
    checks.count("num_rounds", num_rounds, 1)

    def transform(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        _check(subject, num_flips, num_classes)
        start = known.require("params", by="attacks.flip_alfa")
        rows = losses.present(subject)

        def by_label(data: Data) -> jax.Array:
            """The losses `[n, c]` that the model trained on `data` gives every row under every label."""
            params, _ = trainer(key, start, data)
            with_label = lambda c: loss_fn(params, rows._replace(y=jnp.full_like(rows.y, c)))
            return jnp.stack([with_label(c) for c in range(num_classes)], axis=-1)

        clean = by_label(subject)
        own = jax.nn.one_hot(subject.y, num_classes, dtype=clean.dtype)

        def choose(poisoned: jax.Array) -> jax.Array:
            delta = poisoned - clean
            others = jnp.where(own > 0, jnp.inf, delta)
            gain = jnp.min(others, axis=-1) - jnp.sum(delta * own, axis=-1)
            return _flip_lowest(subject, gain, jnp.argmin(others, axis=-1), num_flips)[0].y

        def body(y: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            then = choose(by_label(subject._replace(y=y)))
            return then, jnp.sum(then != y)

        y, changed = jax.lax.scan(body, choose(jnp.zeros_like(clean)), None, length=num_rounds)
        return subject._replace(y=y), {"flipped": y != subject.y, "changed": changed}

    return transform
