"""Trigger reconstruction: for every label, the smallest trigger that sends clean rows there (Neural Cleanse, TABOR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, loop, losses, tree
from mlsec_jax.base import ApplyFn, Data, Inspector, Key, Known, Params
from mlsec_jax.threat import Overlay

EPSILON = 1e-7  # of Keras, in `tanh(u) / (2 - ε) + ½`
ModelFn = Callable[[jax.Array], jax.Array]  # x [n, ...] -> logits [n, c]: an `apply_fn` with its parameters


class Inversion(NamedTuple):
    """What an inverted trigger is to be.

    Attributes:
      loss_fn: `(model_fn, overlay, batch, label) -> (loss, penalty, logits [n, c] of the stamped rows)`; what is
        minimised is `loss + cost · penalty`, the cost set by the schedule.
      metric_fn: `(model_fn, overlay, clean, label) -> scalar`, for `measure.anomaly_index`: small = suspicious.
    """

    loss_fn: Callable[[ModelFn, Overlay, Data, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    metric_fn: Callable[[ModelFn, Overlay, Data, jax.Array], jax.Array]


class Inverted(NamedTuple):
    """The record of `invert_trigger`; the leading axis of every field is the label.

    Attributes:
      label: `[k]`.
      mask: `[k, h, w]` in [0, 1].
      pattern: `[k, h, w, c]` in [0, 1].
      size: `[k]`, the mask's L1 norm.
      success: `[k]`, the share of the clean rows of other labels that the trigger sends to the label.
      metric: `[k]`, what the objective judges by (`size` for Neural Cleanse).
      found: `[k]`, whether any step reached the success asked for; where not, the trigger is the last one tried.
      num_steps: `[k]`, steps taken before the search stopped.
    """

    label: jax.Array
    mask: jax.Array
    pattern: jax.Array
    size: jax.Array
    success: jax.Array
    metric: jax.Array
    found: jax.Array
    num_steps: jax.Array

    def trigger(self, k: Any) -> Overlay:
        """The trigger of the k-th entry, for `Known(trigger=…)` or to be called on rows."""
        return Overlay(self.mask[k], self.pattern[k])


class Schedule(NamedTuple):
    """The cost of the penalty and the counters that move it, all scalars."""

    cost: jax.Array
    reached: jax.Array  # steps in a row of enough success while the cost was 0
    above: jax.Array  # steps in a row of enough success
    below: jax.Array  # steps in a row of too little
    raised: jax.Array  # whether the cost has gone up since it was set
    lowered: jax.Array
    best: jax.Array  # least size of a trigger of enough success
    stalled: jax.Array  # steps in a row in which that did not improve
    stop: jax.Array


class Rule(NamedTuple):
    """How the schedule moves: the hyper-parameters of `invert_trigger` of these names."""

    cost: Any
    multiplier: Any
    patience: int
    early_stop: int

    def start(self, dtype: Any) -> Schedule:
        """No cost until the first success."""
        zero, none, no = jnp.zeros((), dtype), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        return Schedule(zero, none, none, none, no, no, jnp.full((), jnp.inf, dtype), none, no)

    def move(self, old: Schedule, reached: jax.Array, size: jax.Array) -> Schedule:
        """After a step of enough success, or not, by a trigger of a size; the order of the published code."""
        best = jnp.where(reached & (size < old.best), size, old.best)
        stalled = jnp.where(jnp.isfinite(best), jnp.where(best >= old.best, old.stalled + 1, 0), old.stalled)
        stop = old.raised & old.lowered & (stalled >= self.early_stop)
        first = jnp.where((old.cost == 0) & reached, old.reached + 1, 0)
        begin = first >= self.patience
        count = lambda value: jnp.where(begin, 0, value)
        above = jnp.where(reached, count(old.above) + 1, 0)
        below = jnp.where(reached, 0, count(old.below) + 1)
        up, down = above >= self.patience, below >= self.patience
        factor = jnp.asarray(self.multiplier, old.cost.dtype)
        cost = jnp.where(begin, jnp.asarray(self.cost, old.cost.dtype), old.cost)
        cost = jnp.where(up, cost * factor, jnp.where(down, cost / factor**1.5, cost))
        raised, lowered = (old.raised & ~begin) | up, (old.lowered & ~begin) | down
        above, below = jnp.where(up, 0, above), jnp.where(down, 0, below)
        return Schedule(cost, first, above, below, raised, lowered, best, stalled, stop)


class Search(NamedTuple):
    """The state of one label's search."""

    variables: Overlay  # u, of which mask and pattern are `tanh(u) / (2 - ε) + ½`
    optimizer: Any
    schedule: Schedule
    best: Overlay  # likewise u
    step: jax.Array


def invert_trigger(
    apply_fn: ApplyFn,
    *,
    num_classes: int,
    objective: Inversion,
    labels: Sequence[int] | None = None,
    num_steps: int = 1000,
    num_batches: int = 31,
    batch_size: int = 32,
    learning_rate: Any = 0.1,
    success: Any = 0.99,
    cost: Any = 1e-3,
    multiplier: Any = 2.0,
    patience: int = 5,
    early_stop: int = 25,
    over: str = "map",
) -> Inspector:
    """For every label, the trigger that an objective likes best among those that send clean rows to it.

    `min_{m, Δ} loss + c · penalty` of `A(x) = (1 - m) ⊙ x + m ⊙ Δ`, m and Δ through `tanh(u) / (2 - 1e-7) + ½` from a
    uniform start, by Adam(0.1, 0.5, 0.9). c is 0 until `patience` steps in a row reach the success asked for, then
    `cost`; it is multiplied by `multiplier` after every `patience` steps that reach it, and divided by `multiplier^1.5`
    after as many that don't. Kept is the smallest mask of enough success. The search of a label stops when c has gone
    both ways and nothing smaller came in `early_stop` steps.

    Threat: changes - nothing; sees - the model's parameters and clean rows (`known.clean`); budget - none; assumes - the
    backdoor is one trigger for one label, small, and in the same place (an all-to-all backdoor is not seen).

    Args:
      apply_fn: `(params, x, key=None) -> logits [n, c]` of images in [0, 1]; any normalisation is inside it.
      num_classes: static; integer labels of `known.clean` are below it.
      objective: `neural_cleanse()`, `tabor(…)`, or any `Inversion`.
      labels: static, those to be inspected; None: all. A label's search does not depend on the others.
      num_steps: of the schedule, at most; static.
      num_batches: updates in each of them; static.
      batch_size: rows an update, drawn with replacement by weight; static.
      learning_rate: of Adam.
      success: share of the rows that the trigger must send to its label, in a step.
      cost: of the penalty when it is first set.
      multiplier: more than 1.
      patience: static.
      early_stop: static.
      over: the axis of the labels, `"map"` (one after another, each until it stops) or `"vmap"` (all at once).

    Returns:
      An `Inspector`; its record is `Inverted`. There is no reverse-mode derivative: JAX raises for the `while_loop`.

    References: Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV; the schedule is that of its released code,
      github.com/bolunwang/backdoor (1,000 steps of 31 batches of 32 rows). 300 steps of one batch of 64 are enough
      for small digit models. Deviates from the code in: the mask that is kept is the one whose size is recorded (the
      code keeps the one after its update); a batch may hold a row twice.
    """
    checks.count("num_classes", num_classes, 2)
    for name, value in {"num_steps": num_steps, "num_batches": num_batches, "batch_size": batch_size,
                        "patience": patience, "early_stop": early_stop}.items():  # fmt: skip
        checks.count(name, value, 1)
    checks.above("learning_rate", learning_rate, 0)
    checks.between("success", success, 0, 1)
    checks.above("cost", cost, 0)
    checks.above("multiplier", multiplier, 1)
    checks.one_of("over", over, ("map", "vmap"))
    chosen = tuple(range(num_classes)) if labels is None else tuple(labels)
    if not chosen or not all(label in range(num_classes) for label in chosen):
        raise ValueError(f"labels: expected some of 0 to {num_classes - 1}, got {labels!r}.")
    rule = Rule(cost, multiplier, patience, early_stop)

    def inspect(key: Key, params: Params, known: Known) -> Inverted:
        clean: Data = known.require("clean", by="defenses.invert_trigger")
        checks.data("known.clean", clean)
        checks.labels("known.clean.y", clean.y, clean.weight, num_classes)
        if clean.x.ndim != 4 or clean.y.ndim != 1:
            raise ValueError(f"known.clean: expected images [n, h, w, c] with integer labels [n], got shapes "
                             f"{clean.x.shape} and {clean.y.shape}.")  # fmt: skip
        clean = losses.present(clean)
        dtype = clean.x.dtype
        adam = optax.adam(learning_rate, b1=0.5, b2=0.9)
        start_key, batch_key = jax.random.split(key)
        piled = jnp.cumsum(clean.weight)
        model_fn = lambda x: apply_fn(params, x)

        def whole(x: jax.Array) -> jax.Array:
            size = min(batch_size, x.shape[0])
            return jax.lax.map(lambda row: apply_fn(params, row[None])[0], x, batch_size=size)

        def draw(k: jax.Array) -> Data:
            place = jax.random.uniform(jax.random.fold_in(batch_key, k), (batch_size,), piled.dtype) * piled[-1]
            place = jnp.minimum(place, jnp.nextafter(piled[-1], jnp.zeros_like(piled[-1])))
            return tree.take(clean, jnp.searchsorted(piled, place, side="right"))._replace(
                weight=jnp.ones(batch_size, clean.weight.dtype)
            )

        def search(label: jax.Array) -> Inverted:
            def total(u: Overlay, batch: Data, cost: jax.Array) -> tuple[jax.Array, jax.Array]:
                loss, penalty, logits = objective.loss_fn(model_fn, squash(u), batch, label)
                hit = jnp.mean(sent(logits, label).astype(dtype))
                return loss + cost * penalty, hit

            def step(state: Search) -> Search:
                def update(carry: Any, k: jax.Array) -> tuple[Any, jax.Array]:
                    u, optimizer, _ = carry
                    slope, hit = jax.grad(total, has_aux=True)(u, draw(k), state.schedule.cost)
                    moved, optimizer = loop.apply_optimizer(adam, slope, optimizer, u)
                    return (moved, optimizer, u), hit

                carry = (state.variables, state.optimizer, state.variables)
                ks = state.step * num_batches + jnp.arange(num_batches, dtype=jnp.int32)
                (u, optimizer, judged), hits = jax.lax.scan(update, carry, ks)
                size = jnp.sum(squash(judged).mask)
                reached = jnp.mean(hits) >= jnp.asarray(success, dtype)
                schedule = rule.move(state.schedule, reached, size)
                keep = (schedule.best < state.schedule.best) | ~jnp.isfinite(schedule.best)
                best = jax.tree.map(lambda new, old: jnp.where(keep, new, old), judged, state.best)
                return Search(u, optimizer, schedule, best, state.step + 1)

            mask_key, pattern_key = jax.random.split(jax.random.fold_in(start_key, label))
            unit = Overlay(
                jax.random.uniform(mask_key, clean.x.shape[1:3], dtype),
                jax.random.uniform(pattern_key, clean.x.shape[1:], dtype),
            )
            u = jax.tree.map(lambda v: jnp.arctanh((v - 0.5) * (2 - EPSILON)), unit)
            state = Search(u, adam.init(u), rule.start(dtype), u, jnp.zeros((), jnp.int32))
            going = lambda state: (state.step < num_steps) & ~state.schedule.stop
            state = jax.lax.while_loop(going, step, state)
            overlay = squash(state.best)
            other = jnp.where(clean.y == label, 0, clean.weight)
            hit = sent(whole(overlay(None, clean.x)), label)
            return Inverted(
                label,
                overlay.mask,
                overlay.pattern,
                size=jnp.sum(overlay.mask),
                success=losses.weighted_mean(hit.astype(dtype), other),
                metric=objective.metric_fn(whole, overlay, clean, label),
                found=jnp.isfinite(state.schedule.best),
                num_steps=state.step,
            )

        return tree.each(search, jnp.asarray(chosen, clean.y.dtype), over=over)

    return inspect


def squash(u: Overlay) -> Overlay:
    """Mask and pattern in [0, 1]."""
    return jax.tree.map(lambda v: jnp.clip(jnp.tanh(v) / (2 - EPSILON) + 0.5, 0, 1), u)


def sent(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Which rows are taken for the label (one for all, or `[n]`): bool `[n]`."""
    return jnp.argmax(logits, axis=1).astype(label.dtype) == label


def attack_loss(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The mean cross-entropy of one label for all rows."""
    return -jnp.mean(jax.nn.log_softmax(logits)[:, label])
