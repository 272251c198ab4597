"""Poisoning support vector machines through the KKT system of their active set."""

from __future__ import annotations

from typing import Any

from mlsec_jax import bilevel as trainers
from mlsec_jax import checks, losses
from mlsec_jax.attacks._bilevel import Order, bilevel, joint, unit_rows
from mlsec_jax.base import Algorithm, Info, Key, Known, OuterFn, Threat


def svm_kkt(
    *,
    threat: Threat,
    kernel: trainers.Kernel | None = None,
    C: Any = 1.0,
    step_size: Any = 0.1,
    order: Order | None = None,
    outer: OuterFn | None = None,
) -> Algorithm:
    """Moves training points so that a support vector machine trained on them errs as much as it can.

    `max_{x_c} Σ_k max(0, 1 - y_k f(x_k))` over the rows k of `known.goal`, f trained on the poisoned set:
    `x_c ← Π(x_c + η ∇/‖∇‖)`, the gradient taken through the active set (`bilevel.kkt_svm`).

    Threat: changes - what `threat` says, usually a few appended rows whose labels were flipped; sees - the training set
    and `known.goal`, validation data with true labels; budget - the threat's; assumes - the victim is this machine,
    its kernel and C known.

    Args:
      threat: usually `threat.append_rows(rows, lo=..., hi=...)` on reserved rows that start as copies of training
        points with the other label: such points are support vectors, and only those have a gradient.
      kernel: `bilevel.linear()` (default), `polynomial`, `rbf`, or any differentiable kernel.
      C: of the victim.
      step_size: η, in the data's own units; small enough that the active set changes little in a step.
      order: `joint()` (default), or `greedy(steps_per_point)`, the paper's.
      outer: `(params, data, goal) -> scalar`, minimised; default: minus the mean hinge loss on `known.goal`.
        For an error-specific attack: `losses.goal_loss(losses.hinge(bilevel.svm_apply(kernel)))` and desired labels.

    Returns:
      An `Algorithm` on training `Data`, run by `combine.run`; info as in `attacks.bilevel`. `known.params` is not
      needed. Work in float64. A poison that does not support has no gradient and rests (`alive` counts the others).

    Reference: Biggio, Nelson, Laskov, ICML 2012, algorithm 1. Deviates from the paper in: exact retraining, the
    threat's projection, a fixed number of steps.
    """
    checks.above("step_size", step_size, 0)
    kernel = kernel or trainers.linear()
    goal_outer = outer or losses.availability(losses.hinge(trainers.svm_apply(kernel)))
    victim = trainers.kkt_svm(kernel=kernel, C=C)
    attack = bilevel(goal_outer, victim, threat=threat, optimizer=unit_rows(step_size), order=order or joint())

    def seen(known: Known) -> Known:
        """The machine has no initial parameters."""
        known.require("goal", by="attacks.svm_kkt")
        return known.replace(params=())

    def init(key: Key, subject: Any, known: Known) -> Any:
        return attack.init(key, subject, seen(known))

    def step(key: Key, state: Any, subject: Any, known: Known) -> tuple[Any, Info]:
        return attack.step(key, state, subject, seen(known))

    return attack._replace(init=init, step=step)
