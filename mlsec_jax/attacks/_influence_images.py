"""Adversarial training images (Koh & Liang, ICML 2017): invisible changes to the training set of a transferred head."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, losses
from mlsec_jax.attacks._bilevel import bilevel
from mlsec_jax.base import Algorithm, ApplyFn, Data, Info, Key, Known, LossFn, OuterFn, Params, Threat, Trainer


class Transferred(NamedTuple):
    """The parameters of a model of which only the head is trained.

    Attributes:
      features: of the frozen network.
      head: of what is trained on its features.
    """

    features: Params
    head: Params


def on_features(features_fn: ApplyFn, trainer: Any) -> Trainer:
    """Trains a head on frozen features: inputs are mapped once, and derivatives go back through the network to pixels.

    Args:
      features_fn: `(params, x, key=None) -> [n, d]`.
      trainer: of the head, `(key, params, data) -> (params, info)` on data whose inputs are features.

    Returns:
      A `Trainer` of `Transferred` parameters.
    """

    def fit(key: Key, params: Transferred, data: Data) -> tuple[Transferred, Info]:
        features = features_fn(params.features, losses.present(data).x)
        head, info = trainer(key, params.head, data._replace(x=features))
        return params._replace(head=head), info

    return Trainer(fit)


def on_features_loss(features_fn: ApplyFn, loss_fn: LossFn) -> LossFn:
    """The head's loss as a loss of `Transferred` parameters on data whose inputs are pixels."""

    def loss(params: Transferred, data: Data, key: Key | None = None) -> jax.Array:
        return loss_fn(params.head, data._replace(x=features_fn(params.features, data.x)), key)

    return loss


def influence_images(
    features_fn: ApplyFn,
    loss_fn: LossFn,
    trainer: Any,
    *,
    threat: Threat,
    step_size: Any = 0.02 / 255,
) -> Algorithm:
    """Changes training images by less than rounding, so that a retrained head errs on a chosen test image.

    `x ← Π(x - α sign ∇_x outer(θ*(D)))`, `outer = -L(goal, θ*)`: for `bilevel.implicit` the gradient is the
    perturbation influence `∇L(goal)ᵀ H⁻¹ ∂_x∇_θ ℓ(x, y)` of the paper, taken anew after every retraining.

    Threat: changes - the pixels of the threat's rows, labels stay; sees - the training set, the frozen network and the
    head's start (`known.params`, `Transferred`), the test images with their true labels (`known.goal`); budget - the
    threat's: `perturb_rows(rows, radius=0.499 / 255)` keeps every image within the rounding of its 8-bit self (at 0.5 a
    pixel may round to its neighbour); assumes - the victim freezes the features and retrains the head to its optimum, on
    images that are not re-quantised.

    Args:
      features_fn: `(params, x, key=None) -> [n, d]`.
      loss_fn: the head's per-example loss on features `-> [n]`.
      trainer: of the head; `bilevel.implicit(losses.regularised(loss_fn, l2=…))` is the paper's.
      threat: `perturb_rows`; `most_influential` chooses its rows.
      step_size: α, in the data's units; the paper's 0.02 of a pixel value.

    Returns:
      An `Algorithm`: `bilevel` with a sign step.

    References: Koh & Liang, ICML 2017, section 5.2. Deviates from the paper in: no early stop at p(correct) < ½ (look
    at `outer` in the infos); the solve is the trainer's, not LiSSA.
    """
    outer = losses.availability(on_features_loss(features_fn, loss_fn))
    return bilevel(outer, on_features(features_fn, trainer), threat=threat, optimizer=optax.sign_sgd(step_size))


def most_influential(
    key: Key, outer: OuterFn, trainer: Any, subject: Data, known: Known, *, num_rows: int
) -> tuple[jax.Array, Info]:
    """The rows whose inputs the goal depends on most: the largest `‖∇_{x_i} outer(θ*(D), D, goal)‖₁`.

    Args:
      key: the trainer's.
      outer: `(params, data, goal) -> scalar`.
      trainer: `(key, params, data) -> (params, info)`, differentiable in `data`.
      subject: the training `Data`.
      known: `params` and `goal`.
      num_rows: static.

    Returns:
      `(rows [num_rows], info)`, most influential first; info: `score [n]`, zero for absent rows.

    References: Koh & Liang, ICML 2017, section 5.2.
    """
    checks.count("num_rows", num_rows, 1)
    if num_rows > checks.num_present(subject):
        raise ValueError(f"num_rows: expected at most the {checks.num_present(subject)} present rows, got {num_rows}.")
    goal = known.require("goal", by="attacks.most_influential")
    params = known.require("params", by="attacks.most_influential")

    def objective(x: Any) -> jax.Array:
        data = subject._replace(x=x)
        return outer(trainer(key, params, data)[0], data, goal)

    gradient = jax.grad(objective)(subject.x)
    norms = [jnp.sum(jnp.abs(g).reshape(g.shape[0], -1), axis=1) for g in jax.tree.leaves(gradient)]
    score = jnp.where(subject.weight > 0, jnp.sum(jnp.stack(norms), axis=0), 0)
    order = jnp.argsort(jnp.where(subject.weight > 0, -score, jnp.inf), stable=True)
    return order[:num_rows], {"score": score}
