"""A sanitizer is believed only where a model trained without what it removed takes that for another class."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses, scores
from mlsec_jax.base import ApplyFn, Data, Info, Key, Known, Params, Trainer, Transform
from mlsec_jax.combine import ModelTransform, needs_model


def reclassified(
    sanitizer: Transform,
    apply_fn: ApplyFn,
    trainer: Trainer,
    init_fn: Callable[[Key], Params],
    *,
    num_classes: int,
    num_suspects: int = 1,
) -> Transform:
    """Keeps what a sanitizer removed of the classes that were most likely poisoned, and gives the others their rows back.

    A filter of a share of every class (spectral signatures) costs clean rows of all classes to reach the poisons of one. A
    new model, trained on what the filter left, is asked about what it removed: clean rows are mostly taken for their own
    class, poisons for the class that they were taken from. The `num_suspects` classes of the highest `p / (l + p)`
    (`scores.taken_elsewhere`) keep their removals; what was removed of the others comes back.

    Two trainings in place of one: this model is not the one to use, as it lacks clean rows. No threshold is asked for: without
    an attack, too, one class loses its share.

    Args:
      sanitizer: of `Data`, such as `combine.filter_top(..., num_classes=...)`.
      apply_fn: `(params, x, key=None) -> [n, num_classes]`.
      trainer: `(key, params, data) -> (params, info)`.
      init_fn: `key -> params`, where the new model starts.
      num_classes: static; labels are integers below it.
      num_suspects: how many classes are believed to be poisoned, static.

    Returns:
      A transform of `Data`; info: the sanitizer's own under `sanitizer`, `share [num_classes]`, and `suspect [num_classes]`.

    References: Chen et al., arXiv:1811.03728, section 4 (exclusionary reclassification, there of clusters and against a
      threshold); Hayase et al., "SPECTRE", ICML 2021, which also picks the one class that stands out.
    """
    checks.count("num_classes", num_classes, 1)
    checks.count("num_suspects", num_suspects)
    if num_suspects > num_classes:
        raise ValueError(f"num_suspects: expected at most the {num_classes} classes, got {num_suspects}.")

    def act(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        checks.labels("subject.y", subject.y, subject.weight, num_classes)
        sanitize_key, init_key, train_key = jax.random.split(key, 3)
        left, info = sanitizer(sanitize_key, subject, known)
        trained, _ = trainer(train_key, init_fn(init_key), left)
        said = jnp.argmax(apply_fn(trained, losses.present(subject).x), axis=1)
        share = scores.taken_elsewhere(said, subject, subject.weight - left.weight, num_classes=num_classes)
        rank = jnp.argsort(jnp.argsort(-share, stable=True), stable=True)
        suspect = rank < num_suspects
        weight = jnp.where(suspect[subject.y], left.weight, subject.weight)
        return subject._replace(weight=weight), {"sanitizer": info, "share": share, "suspect": suspect}

    return ModelTransform(act) if needs_model(sanitizer) else act
