"""Reject on negative impact: what training on a row costs on a quiz (Nelson et al. 2008; Barreno et al. 2010)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlsec_jax import checks, loop, losses, measure, tree
from mlsec_jax.base import ApplyFn, Data, Key, Known, Params, Scorer, Trainer
from mlsec_jax.scores._by_class import no_derivative


def roni(
    apply_fn: ApplyFn, trainer: Trainer, *, num_train: int = 20, num_quiz: int = 50, num_trials: int = 5, over: str = "map"
) -> Scorer:
    """The mean loss of accuracy on a quiz when a row joins a small training set, over a few trials.

    `score_i = (1/T) Σ_t [accuracy(train(S_t), Q_t) - accuracy(train(S_t ∪ {i}), Q_t)]`, the disjoint sets S_t and Q_t drawn
    without replacement from `known.clean`. Rows that score more than the scores of clean rows usually are
    (`median + 3 σ` in the paper) are rejected: `filter_above`.

    `T · (n + 1)` trainings: for cheap trainers. A backdoor or a targeted poison costs no accuracy, and passes. Accuracies
    have no derivative: to differentiate raises.

    Args:
      apply_fn: `(params, x, key=None) -> logits [n, c]`.
      trainer: `(key, params, data) -> (params, info)`, from the model given; it sees `num_train + 1` rows.
      num_train: rows of S, static.
      num_quiz: rows of Q, static.
      num_trials: T, static.
      over: `"map"`, one row after another, or `"vmap"`, all at once.

    Returns:
      A `Scorer` in [-1, 1]; rows of weight 0 score 0. Each joins with its weight.

    References: Nelson et al., "Exploiting Machine Learning to Subvert Your Spam Filter", LEET 2008, section 5.1.
    """
    checks.count("num_train", num_train, 1)
    checks.count("num_quiz", num_quiz, 1)
    checks.count("num_trials", num_trials, 1)
    checks.one_of("over", over, ("map", "vmap"))

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        clean = known.require("clean", by="scores.roni")
        there = checks.num_present(clean)
        if num_train + num_quiz > there:
            raise ValueError(f"num_train + num_quiz: expected at most the {there} rows of known.clean, "
                             f"got {num_train + num_quiz}.")  # fmt: skip
        checks.finite("known.clean.x", clean.x, clean.weight)
        checks.finite("data.x", data.x, data.weight)
        params, data, clean = no_derivative("scores.roni", (params, losses.present(data), losses.present(clean)))
        drawn, nobody = tree.take(data, jnp.zeros(1, jnp.int32)), jnp.zeros(1, data.weight.dtype)

        def trial(key: Key) -> jax.Array:
            draw_key, train_key = jax.random.split(key)
            order = jnp.argsort(loop.lots(draw_key, clean.weight))
            base, quiz = (tree.take(clean, rows) for rows in (order[:num_train], order[num_train : num_train + num_quiz]))

            def accuracy(row: Data) -> jax.Array:
                joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), base, row)
                trained, _ = trainer(train_key, params, joined)
                return measure.accuracy(apply_fn(trained, quiz.x), quiz)

            each = lambda k: accuracy(tree.take(data, k[None]))
            return accuracy(drawn._replace(weight=nobody)) - tree.each(each, jnp.arange(data.num_rows), over=over)

        mean = jnp.mean(jax.lax.map(trial, jax.random.split(key, num_trials)), axis=0)
        return jnp.where(data.weight > 0, mean, 0)

    return score
