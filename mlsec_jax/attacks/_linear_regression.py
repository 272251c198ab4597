"""Poisoning of ridge, LASSO and elastic net (Xiao et al., ICML 2015)."""

from __future__ import annotations

from typing import Any

import jax
import optax

from mlsec_jax import losses
from mlsec_jax.attacks._bilevel import Order, bilevel
from mlsec_jax.base import Algorithm, ApplyFn, Data, Threat
from mlsec_jax.bilevel import implicit


def linear_regression(
    apply_fn: ApplyFn,
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    l1: Any = 0.0,
    l2: Any = 0.0,
    solver: Any = None,
    linear_solve: Any = None,
    order: Order | None = None,
) -> Algorithm:
    """Poisons a regularised linear regression, to raise the learner's own objective on the attacker's data.

    `max_poison W = mean ½(f(x̂) - ŷ)² + l2/2 ‖w‖² + l1 ‖w‖₁` at the learner's optimum of the same functional on the
    poisoned set. Ridge: `l2=λ`. LASSO: `l1=λ` (scikit-learn's `alpha`). Elastic net: `l1=λρ, l2=λ(1-ρ)`. With an L1
    part every object is restricted to the active set `{j : w_j ≠ 0}`.

    Threat: changes - what `threat` says; sees - the training set, the learner's λ and start (`known.params`), data of
    its own (`known.goal`, true targets); budget - the threat's; assumes - the learner reaches its optimum.

    Args:
      apply_fn: `(params, x, key=None) -> [n]` or `[n, 1]`; leaves named `b` or `bias` are not penalised.
      threat: the attacker's reach; `append_rows` is the paper's.
      optimizer: on the poison; `unit_rows(η)` normalises as the paper does.
      l1: weight of ‖w‖₁, on the scale of the mean loss.
      l2: weight of ½‖w‖².
      solver: of the learner (`bilevel.implicit`).
      linear_solve: of the implicit system. Ridge and elastic net are positive definite; LASSO is on its active set if
        no two active features are collinear, else pass `bilevel.lu()` or `normal_cg`.
      order: `greedy(steps_per_point, passes=…)` is the paper's cycling over points.

    Returns:
      An `Algorithm` on training `Data` with real labels. In float32 the active set near λ is uncertain: use float64.

    References: Xiao et al., ICML 2015, eq. (3)-(9), algorithm 1. Deviates from the paper in: any optax step in place of
    the backtracking line search.
    """
    objective = losses.regularised(losses.squared(apply_fn), l1=l1, l2=l2)

    def outer(params: Any, data: Data, goal: Data) -> jax.Array:
        return -objective.value(params, goal)

    trainer = implicit(objective, solver=solver, linear_solve=linear_solve)
    return bilevel(outer, trainer, threat=threat, optimizer=optimizer, order=order)
