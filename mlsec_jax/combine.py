"""What is written once for every method: run, iterate, chain, mask, restart, filter, defend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlsec_jax import checks, linalg, tree
from mlsec_jax.base import Algorithm, Data, Info, Key, Known, Params, Scorer, Trainer, Transform
from mlsec_jax.loop import BatchTransform


def run(algorithm: Algorithm, key: Key, subject: Any, known: Known, *, num_steps: int) -> tuple[Any, Info]:
    """Runs an algorithm: one `lax.scan`, in which step k uses `fold_in(step_key, k)`.

    Args:
      algorithm: the `Algorithm`.
      key: split once into the key of `init` and the key of the steps.
      subject: what is acted on (for a poisoning attack the training `Data`).
      known: what the actor sees.
      num_steps: static.

    Returns:
      `(state, infos)`: the last state, and the infos of all steps stacked `[num_steps, ...]`.
    """
    checks.count("num_steps", num_steps)
    init_key, step_key = jax.random.split(key)
    state = algorithm.init(init_key, subject, known)

    def body(state: Any, k: jax.Array) -> tuple[Any, Info]:
        return algorithm.step(jax.random.fold_in(step_key, k), state, subject, known)

    return jax.lax.scan(body, state, jnp.arange(num_steps))


def iterate(algorithm: Algorithm, num_steps: int) -> Transform:
    """Makes a one-shot `Transform` of an algorithm: run it, then read its state."""

    def transform(key: Key, subject: Any, known: Known) -> tuple[Any, Info]:
        state, infos = run(algorithm, key, subject, known, num_steps=num_steps)
        return algorithm.read(state, subject), infos

    return transform


@dataclasses.dataclass(frozen=True)
class ModelTransform:
    """A transform that reads a model from `known.params`; `defended` trains one for it.

    Attributes:
      apply: the transform.
    """

    apply: Transform

    def __call__(self, key: Key, subject: Any, known: Known) -> tuple[Any, Info]:
        """The transform itself."""
        return self.apply(key, subject, known)


def needs_model(transform: Transform) -> bool:
    """Whether a transform reads `known.params`."""
    return isinstance(transform, ModelTransform)


def chain(*transforms: Transform) -> Transform:
    """One transform after another, each with its own key; the info is the tuple of theirs.

    >>> double = lambda key, subject, known: (2 * subject, {})
    >>> chain(double, double)(jax.random.key(0), 3, Known())[0]
    12
    """

    def transform(key: Key, subject: Any, known: Known) -> tuple[Any, Info]:
        infos = []
        for k, each in enumerate(transforms):
            subject, info = each(jax.random.fold_in(key, k), subject, known)
            infos.append(info)
        return subject, tuple(infos)

    return ModelTransform(transform) if any(map(needs_model, transforms)) else transform


def masked(transform: Transform, where: tree.Where) -> Transform:
    """Lets a transform see and change the chosen leaves only (`tree.mask_of`); the rest passes through."""

    def act(key: Key, subject: Any, known: Known) -> tuple[Any, Info]:
        chosen, rest = tree.partition(subject, where)
        changed, info = transform(key, chosen, known)
        return tree.merge(changed, rest), info

    return ModelTransform(act) if needs_model(transform) else act


def best_of(
    transform: Transform, num_restarts: int, loss_fn: Callable[[Any, Info], jax.Array], *, over: str = "map"
) -> Transform:
    """Runs a transform from `num_restarts` keys and keeps the result of the lowest loss.

    Args:
      transform: for an algorithm, `iterate(algorithm, num_steps)`.
      num_restarts: static, at least 1.
      loss_fn: `(subject', info) -> scalar`; NaN counts as the worst.
      over: the axis's word, `"map"` (one after another) or `"vmap"` (all at once).

    Returns:
      A transform; its info is the best run's, with `losses [num_restarts]` of all beside it.
    """
    checks.count("num_restarts", num_restarts, 1)
    checks.one_of("over", over, ("map", "vmap"))

    def act(key: Key, subject: Any, known: Known) -> tuple[Any, Info]:
        def once(k: jax.Array) -> tuple[Any, Info, jax.Array]:
            result, info = transform(jax.random.fold_in(key, k), subject, known)
            return result, info, loss_fn(result, info)

        results, infos, losses = tree.each(once, jnp.arange(num_restarts), over=over)
        best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
        return tree.take(results, best), {"best": tree.take(infos, best), "losses": losses}

    return ModelTransform(act) if needs_model(transform) else act


class KeepBest(NamedTuple):
    """The state of `keep_best`.

    Attributes:
      state: the algorithm's own.
      best: the state of the lowest value so far.
      value: that value.
    """

    state: Any
    best: Any
    value: jax.Array


def keep_best(algorithm: Algorithm, value_fn: Callable[[Info], jax.Array] = lambda info: info["outer"]) -> Algorithm:
    """Remembers the state of the lowest value that the algorithm itself reported; `read` reads that one.

    A step's info is of the state that it started from, so the last state, which no step has looked at, is not a
    candidate. NaN is never the lowest.

    Args:
      algorithm: any `Algorithm`.
      value_fn: `info -> scalar`, what is to be low; the attacker's own objective, never a test figure.
    """

    def init(key: Key, subject: Any, known: Known) -> KeepBest:
        state = algorithm.init(key, subject, known)
        return KeepBest(state, state, jnp.asarray(jnp.inf, jnp.result_type(float)))

    def step(key: Key, state: KeepBest, subject: Any, known: Known) -> tuple[KeepBest, Info]:
        moved, info = algorithm.step(key, state.state, subject, known)
        value = value_fn(info).astype(state.value.dtype)
        better = value < state.value
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.state, state.best)
        return KeepBest(moved, best, jnp.where(better, value, state.value)), info

    return Algorithm(init, step, lambda state, subject: algorithm.read(state.best, subject))


class Soft(NamedTuple):
    """Surrogate gradient of a filter: keep-weights `sigmoid((threshold - score) / temperature)`, forward and backward."""

    temperature: Any


class StraightThrough(NamedTuple):
    """Surrogate gradient of a filter: the hard filter forward, the soft one's derivative backward."""

    temperature: Any


Surrogate = str | Soft | StraightThrough  # "hard", or the name of what stands for its derivative


def soft(temperature: Any) -> Soft:
    """Names the soft surrogate for `filter_top(gradient=...)`."""
    checks.above("temperature", temperature, 0)
    return Soft(temperature)


def straight_through(temperature: Any) -> StraightThrough:
    """Names the straight-through surrogate for `filter_top(gradient=...)`."""
    checks.above("temperature", temperature, 0)
    return StraightThrough(temperature)


def filter_top(
    scorer: Scorer,
    *,
    fraction: Any,
    gradient: Surrogate = "hard",
    reads_model: bool = True,
    num_classes: int | None = None,
) -> Transform:
    """Makes a sanitizer of any scorer: the `fraction` of the present rows that look most suspicious get weight 0.

    `w'_i = w_i · [rank_i ≥ ⌊fraction · n⌋]`, ranks among the n rows of positive weight, ties by row.

    The hard filter's derivative is what it is: zero for a removed row, and none through the choice. An adaptive attack
    optimises through `soft(t)` or `straight_through(t)` and is judged against the hard filter.

    Args:
      scorer: `(key, params, data, known) -> [n]`, higher = more suspicious.
      fraction: of the present rows, in [0, 1].
      gradient: `"hard"`, `soft(temperature)` or `straight_through(temperature)`.
      reads_model: whether the scorer needs a model; `defended` then trains a probe for it.
      num_classes: with it the fraction is of each class on its own, by integer label (spectral signatures); None: of all.

    Returns:
      A transform of `Data`; its info holds `keep [n]` (bool), `score [n]`, `threshold` (`[num_classes]` with classes) and
      `num_removed` (likewise).
    """
    checks.between("fraction", fraction, 0.0, 1.0)
    check_surrogate(gradient)

    def cut(score: jax.Array, subject: Data) -> tuple[jax.Array, jax.Array, dict]:
        group = jnp.zeros(score.shape, jnp.int32)
        if num_classes is not None:
            checks.integer_labels("subject.y", subject.y)
            checks.labels("subject.y", subject.y, subject.weight, num_classes)
            group = subject.y
        present = subject.weight > 0
        score = jnp.where(jnp.isnan(score), jnp.inf, score)  # what has no score is not to be trusted
        ordered, rank, count = linalg.ranked(-score, jnp.where(present, group, num_classes or 1), num_classes or 1)
        first = jnp.cumsum(count) - count
        removed = linalg.whole_share(fraction, count, score.dtype)
        keep = present & (rank >= removed[group])
        at = lambda place: score[ordered[jnp.clip(first + place, 0, score.size - 1)]]
        kept = at(jnp.where(removed < count, removed, removed - 1))  # the highest; of none the last that went
        threshold = jnp.where(removed > 0, (at(removed - 1) + kept) / 2, jnp.inf)
        for_people = (lambda v: v[0]) if num_classes is None else (lambda v: v)
        return keep, threshold[group], {"threshold": for_people(threshold), "num_removed": for_people(removed)}

    return _filter(scorer, cut, gradient, reads_model)


def filter_above(
    scorer: Scorer, *, threshold: Any, gradient: Surrogate = "hard", reads_model: bool = True
) -> Transform:
    """Makes a sanitizer of any scorer: present rows that score more than the threshold get weight 0.

    Args:
      scorer: as in `filter_top`.
      threshold: a number.
      gradient: as in `filter_top`.
      reads_model: as in `filter_top`.

    Returns:
      A transform of `Data`; its info holds `keep [n]` (bool), `score [n]`, `threshold` and `num_removed`.
    """
    check_surrogate(gradient)

    def cut(score: jax.Array, subject: Data) -> tuple[jax.Array, jax.Array, dict]:
        level = jnp.asarray(threshold, score.dtype)
        keep = (subject.weight > 0) & (score <= level)
        removed = jnp.sum((subject.weight > 0) & ~keep, dtype=jnp.int32)
        return keep, jnp.broadcast_to(level, score.shape), {"threshold": level, "num_removed": removed}

    return _filter(scorer, cut, gradient, reads_model)


def check_surrogate(gradient: Any) -> None:
    """Raises unless it is "hard" or names a surrogate: for whatever takes `gradient=`."""
    if gradient != "hard" and not isinstance(gradient, (Soft, StraightThrough)):
        raise ValueError(f"gradient: expected 'hard', soft(t) or straight_through(t), got {gradient!r}.")


def _filter(scorer: Scorer, cut: Callable, gradient: Surrogate, reads_model: bool) -> Transform:
    """Weighs rows by `cut: (score, subject) -> (keep [n], threshold of each row [n], info)`."""

    def transform(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        params = known.require("params", by="filter") if reads_model else None
        score = jnp.asarray(scorer(key, params, subject, known))
        if score.shape != subject.weight.shape:
            raise ValueError(f"scorer: expected one number a row, {subject.weight.shape}, got shape {score.shape}.")
        if not tree.is_float(score):
            score = score.astype(subject.weight.dtype)  # such as a count: shares and thresholds are no integers
        keep, threshold, info = cut(score, subject)
        factor = keep.astype(score.dtype)
        if isinstance(gradient, (Soft, StraightThrough)):
            finite = jnp.isfinite(threshold)
            gap = jnp.where(finite, threshold - score, 0)
            smooth = jax.nn.sigmoid(gap / jnp.asarray(gradient.temperature, score.dtype))
            smooth = jnp.where(finite & ~jnp.isnan(score), smooth, factor)
            hard = factor + smooth - jax.lax.stop_gradient(smooth)
            factor = smooth if isinstance(gradient, Soft) else hard
        weight = subject.weight * factor.astype(subject.weight.dtype)
        return subject._replace(weight=weight), {"keep": keep, "score": score, **info}

    return ModelTransform(transform) if reads_model else transform


def defended(
    trainer: Any,
    *,
    before: Sequence[Transform] = (),
    during: BatchTransform | None = None,
    after: Sequence[Transform] = (),
    known: Known | None = None,
) -> Trainer:
    """Composes a trainer with defenses; the result is again a trainer, so an adaptive attack is the old attack on it.

    Args:
      trainer: the victim's, `(key, params, data) -> (params, info)`.
      before: sanitizers of the training `Data`. If one needs a model, a probe is first trained on the unfiltered data
        with its own key; the victim then starts from the original parameters.
      during: `(key, batch) -> batch`, for trainers that run the SGD loop; not for the probe, nor for that of a trainer that
        is `defended` already.
      after: transforms of the trained parameters.
      known: the defender's own knowledge.

    Returns:
      A `Trainer`. Its info keeps the stages apart: `before`, `train`, `after`, and `weight [n]`, the weights that the
      victim trained on.
    """
    known = Known() if known is None else known
    inner = trainer
    if during is not None:
        if getattr(trainer, "batched", None) is None:
            raise ValueError("during: expected a trainer that runs the SGD loop (it has `batched`), got one without.")
        inner = trainer.batched(during)
    return _defended(inner, trainer, before, after, known)


def _defended(inner: Any, prober: Any, before: Sequence[Transform], after: Sequence[Transform], known: Known) -> Trainer:
    """`defended` of the victim's trainer, `during` included, and of the probe's, which has none."""
    sanitize, repair = chain(*before), chain(*after)

    def sanitized(key: Key, params: Params, data: Data) -> tuple[Data, Info, Key, Key]:
        """The data that the victim trains on, the sanitizers' info, and the keys of what comes after."""
        probe_key, before_key, train_key, after_key = jax.random.split(key, 4)
        seen = known
        if needs_model(sanitize):
            seen = known.replace(params=prober(probe_key, params, data)[0])
        return *sanitize(before_key, data, seen), train_key, after_key

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        clean, before_info, train_key, after_key = sanitized(key, params, data)
        trained, train_info = inner(train_key, params, clean)
        trained, after_info = repair(after_key, trained, known)
        info = {"before": before_info, "train": train_info, "after": after_info, "weight": clean.weight}
        return trained, info

    def batched(transform: BatchTransform) -> Trainer:
        return _defended(inner.batched(transform), prober, before, after, known)

    def probe(key: Key, params: Params, data: Data, cotangent: Params) -> dict[str, jax.Array]:
        """What the inner trainer says of itself; which rows were kept is part of the `pattern`."""
        clean, _, train_key, after_key = sanitized(key, params, data)
        if after:
            trained, _ = inner(train_key, params, clean)
            (cotangent,) = jax.vjp(lambda p: repair(after_key, p, known)[0], trained)[1](cotangent)
        found = inner.probe(train_key, params, clean, cotangent) if isinstance(inner, Trainer) else {}
        kept = (clean.weight > 0).astype(jnp.int32)
        return {**found, "pattern": jnp.concatenate([kept, found["pattern"]]) if "pattern" in found else kept}

    return Trainer(fit, probe, None if getattr(inner, "batched", None) is None else batched)
