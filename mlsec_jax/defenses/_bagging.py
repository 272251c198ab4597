"""Bagging: votes of models trained on few rows drawn at random, with a certificate (Jia, Cao & Gong, AAAI 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, losses, measure, tree
from mlsec_jax.base import ApplyFn, Data, Info, Key, Params, Trainer

PredictFn = Callable[[Params, Any], tuple[jax.Array, Info]]


class Bagged(NamedTuple):
    """The parameters of a bag: those of the models, stacked, and how many rows they were drawn from."""

    models: Params
    num_rows: jax.Array


def bagging(
    trainer: Any,
    apply_fn: ApplyFn,
    *,
    num_models: int,
    num_draws: int,
    alpha: float = 0.001,
    num_tests: int | None = None,
    over: str = "map",
) -> tuple[Trainer, PredictFn]:
    """N models, each of k rows drawn with replacement, vote; a draw seldom holds a poison.

    Let `p_c` be the probability that a model of a random draw says c. From the votes, one-sided Clopper-Pearson bounds at
    level `alpha / (c · num_tests)`, which hold together with probability `1 - alpha`, give `p_l ≥ p̲` for the leading
    label and `p_c ≤ p̄` for all others. The label l of the infinite ensemble stays what it is when r of the n rows are
    changed, added or deleted, n becoming n', if for every n' in [n - r, n + r]

        (n'/n)^k - 2 ((max(n, n') - r)/n)^k + 1 < p̲ - p̄

    and the radius is the largest such r. Where the left side is below 1 at `n' = n`, it is largest there: what has to hold is
    `2 - 2 (1 - r/n)^k < p̲ - p̄`.

    Threat: changes - rows: changed (counted once), added, deleted; sees - everything but the draws; budget - the radius for
    each prediction; assumes - a certificate may be wrong with probability alpha.

    Args:
      trainer: of one model, `(key, params, data) -> (params, info)`; model i gets a key of its own.
      apply_fn: `(params, x, key=None) -> logits [m, c]`.
      num_models: N, static.
      num_draws: k, static.
      alpha: static, for the bounds are computed on the host.
      num_tests: for how many predictions alpha holds together; None: for those of one call. Say it where a test set is
        predicted in several.
      over: `"map"`, one model after another, or `"vmap"`.

    Returns:
      `(trainer, predict_fn)`. The trainer gives a `Bagged`; info: `train` (the models' own).
      `predict_fn(params, x) -> (label [m], info)` with `radius [m]`, -1 where not even the leading label is certain
      (abstention), `votes [m, c]` and `gap [m]`, `p̲ - p̄`.

    Edge cases: the draw is uniform over the present rows, whatever they weigh; with none, every model trains on
    nothing. Rounding can only lower a radius.

    References: Jia, Cao & Gong, AAAI 2021, theorem 1 and algorithm 1. Deviates from the paper in: without its δ terms, of
      the order `n^{-k}`, which the proof by overlap doesn't need.
    """
    checks.count("num_models", num_models, 1)
    checks.count("num_draws", num_draws, 1)
    checks.one_of("over", over, ("map", "vmap"))
    if num_tests is not None:
        checks.count("num_tests", num_tests, 1)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected between 0 and 1, got {alpha}.")

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        shown = losses.present(data)
        there = data.weight > 0
        rows = jnp.argsort(~there, stable=True)
        num_rows = jnp.sum(there, dtype=jnp.int32)

        def one(i: jax.Array) -> tuple[Params, Info]:
            draw_key, train_key = jax.random.split(jax.random.fold_in(key, i))
            drawn = jax.random.randint(draw_key, (num_draws,), 0, jnp.maximum(num_rows, 1))
            return trainer(train_key, params, tree.take(shown, rows[drawn]))

        models, infos = tree.each(one, jnp.arange(num_models), over=over)
        return Bagged(models, num_rows), {"train": infos}

    def predict(params: Bagged, x: Any) -> tuple[jax.Array, Info]:
        logits = tree.each(lambda one: apply_fn(one, x), params.models, over=over)
        num_classes = logits.shape[-1]
        votes = jnp.sum(jax.nn.one_hot(jnp.argmax(logits, axis=-1), num_classes, dtype=jnp.int32), axis=0)
        label = jnp.argmax(votes, axis=1).astype(jnp.int32)
        level = alpha / (num_classes * (num_tests or votes.shape[0]))
        low, high = measure.clopper_pearson(np.arange(num_models + 1), num_models, confidence=1 - 2 * level)
        lead = jnp.asarray(low, jnp.result_type(float))[jnp.max(votes, axis=1)]
        others = jnp.where(jnp.arange(num_classes, dtype=jnp.int32)[None] == label[:, None], 0, votes)
        rival = jnp.asarray(high, lead.dtype)[jnp.max(others, axis=1)]
        gap = lead - jnp.minimum(rival, 1 - lead)
        return label, {"radius": _radius(gap, params.num_rows, num_draws), "votes": votes, "gap": gap}

    return Trainer(fit), predict


def _radius(gap: jax.Array, num_rows: jax.Array, num_draws: int) -> jax.Array:
    """The largest r of `2 - 2 (1 - r/n)^k < gap`, `[m]`; -1 where r = 0 fails.

    Solved for r, for a power's rounding errors grow with k; those of the gap, of logarithm and exponential don't.
    """
    margin = gap - 16 * jnp.finfo(gap.dtype).eps
    bound = -num_rows.astype(gap.dtype) * jnp.expm1(jnp.log1p(-margin / 2) / num_draws)
    return jnp.maximum(jnp.ceil(bound).astype(jnp.int32) - 1, -1)
