"""The scorers, once each."""

import jax.numpy as jnp

from mlsec_jax import bilevel, defenses, scores
from tests import problems
from tests.registry._row import MOMENTUM, Row, objective, unrolled

identity = lambda params, x, key=None: x
ROWS = [
    Row("scores.sphere", "scorer", lambda problem, _: scores.sphere(), problem=problems.binary, translation_invariant=True),
    Row("scores.slab", "scorer", lambda problem, _: scores.slab(), problem=problems.binary, translation_invariant=True),
    Row(
        "scores.spectral",
        "scorer",
        lambda problem, _: scores.spectral(identity, num_classes=problems.CLASSES),
        translation_invariant=True,
    ),
    Row(
        "scores.activation_clusters",
        "scorer",
        lambda problem, _: scores.activation_clusters(identity, num_classes=problems.CLASSES, num_components=2, num_steps=100),
        translation_invariant=True,
    ),
    Row(
        "scores.deep_knn",
        "scorer",
        lambda problem, _: scores.deep_knn(identity, num_neighbours=3, num_classes=problems.CLASSES, block_size=5),
    ),
    Row(
        "scores.strip",
        "scorer",
        lambda problem, mix: scores.strip(problem.apply_fn, num_overlays=4, mix=(1 - mix, mix)),
        problem=lambda p: p._replace(params={**p.params, "w": 3 * jnp.eye(problems.DIM, problems.CLASSES)}),
    ),
    Row(
        "scores.roni",
        "scorer",
        lambda problem, _: scores.roni(problem.apply_fn, unrolled(problem), num_train=4, num_quiz=5, num_trials=2),
    ),
    Row(
        "scores.low_loss",
        "scorer",
        lambda problem, level: scores.low_loss(
            problem.loss_fn, trainer=bilevel.unrolled(problem.loss_fn, MOMENTUM, 5, grad_fn=defenses.flooding(level))
        ),
    ),
    Row(
        "scores.influence",
        "scorer",
        lambda problem, _: scores.influence(problem.loss_fn, bilevel.implicit(objective(problem, 0.1))),
    ),
]
