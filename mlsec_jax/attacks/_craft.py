"""What clean-label attacks share: a loss between poisons and a target in a network that is not retrained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, loop, losses, tree
from mlsec_jax.base import Algorithm, ApplyFn, Data, Info, Key, Known, Params, Threat

Prepare = Callable[[Key, Params, Data], Any]  # (key, params, goal) -> what is aimed at
Objective = Callable[[Key, Params, Data, Any], tuple[jax.Array, dict]]  # (key, params, poisons [k], aim) -> (loss, info)


class CraftState(NamedTuple):
    """The state of a clean-label attack.

    Attributes:
      poison: the poisons' inputs, `[k, ...]`.
      optimizer: the optimiser's state.
      aim: what the poisons are to match: the target's features, or its gradient.
    """

    poison: Any
    optimizer: Any
    aim: Any


def networks(known: Known, by: str) -> Params:
    """The networks that poisons are crafted in: `known.surrogates`, or the victim's own `known.params` (white box)."""
    return known.require("params", by) if known.surrogates is None else known.surrogates


def target(known: Known, by: str, subject: Data) -> Data:
    """The goal's rows: target inputs like the subject's, labelled as the attacker wants them."""
    goal = known.require("goal", by)
    checks.data("known.goal", goal)
    expected, got = ([jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(data.x)] for data in (subject, goal))
    if expected != got:
        raise ValueError(f"known.goal.x: expected rows like the subject's, {expected}, got {got}.")
    return goal


def rows_of(threat: Threat, by: str) -> jax.Array:
    """The rows that the poisons stand for."""
    if threat.rows is None:
        raise ValueError(f"{by}: expected a threat with rows, such as threat.perturb_rows, got one without.")
    return jnp.asarray(threat.rows)


def poisons_of(threat: Threat, poison: Any, subject: Data, rows: jax.Array) -> Data:
    """The poisons as rows; those that are absent (weight 0) are zeros."""
    return losses.present(tree.take(threat.embed(poison, subject), rows))


def craft(
    by: str, prepare: Prepare, objective: Objective, *, threat: Threat, optimizer: optax.GradientTransformation
) -> Algorithm:
    """Projected steps of any optax optimizer on `objective`; `prepare` is asked once for what it aims at."""
    rows = rows_of(threat, by)

    def init(key: Key, subject: Data, known: Known) -> CraftState:
        checks.data("subject", subject)
        threat_key, aim_key = jax.random.split(key)
        aim = prepare(aim_key, networks(known, by), target(known, by, subject))
        poison = threat.project(threat.init(threat_key, subject), subject)
        return CraftState(poison, optimizer.init(poison), aim)

    def step(key: Key, state: CraftState, subject: Data, known: Known) -> tuple[CraftState, Info]:
        target(known, by, subject)
        params = networks(known, by)

        def loss(poison: Any) -> tuple[jax.Array, dict]:
            return objective(key, params, poisons_of(threat, poison, subject, rows), state.aim)

        (value, info), gradient = jax.value_and_grad(loss, has_aux=True)(state.poison)
        moved, opt_state = loop.apply_optimizer(optimizer, gradient, state.optimizer, state.poison)
        moved = threat.project(moved, subject)
        report = {"outer": value, "gradient_norm": tree.norm(gradient), **info}
        return CraftState(moved, opt_state, state.aim), report

    return unless_empty(rows, Algorithm(init, step, lambda state, subject: threat.embed(state.poison, subject)))


def unless_empty(rows: jax.Array, algorithm: Algorithm) -> Algorithm:
    """The algorithm; for no rows at all, the empty attack, one that leaves everything as it is."""
    if rows.shape[0]:
        return algorithm
    nothing = {"outer": jnp.zeros(()), "gradient_norm": jnp.zeros(())}
    return Algorithm(lambda key, subject, known: (), lambda key, state, *_: (state, nothing), lambda state, subject: subject)


def drawn(features_fn: ApplyFn, num_draws: int) -> Callable[[Key, Params, Any], list[jax.Array]]:
    """`(key, params, x) -> [n, d]` for every leaf of the features: in evaluation mode, or the mean of dropout draws."""
    checks.count("num_draws", num_draws)

    def features(key: Key, params: Params, x: Any) -> list[jax.Array]:
        if num_draws == 0:
            found = features_fn(params, x, None)
        else:
            draws = jax.vmap(lambda k: features_fn(params, x, k))(jax.random.split(key, num_draws))
            found = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), draws)
        return [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(found)]

    return features


def target_features(features_fn: ApplyFn, num_draws: int = 0, *, relative: bool = True) -> Prepare:
    """Prepares the target's features, `[d]` for every leaf: the weighted mean over the goal's rows (multi-target).

    Relative distances have no meaning where they are all zero, which raises unless they are traced.
    """
    features = drawn(features_fn, num_draws)

    def prepare(key: Key, params: Params, goal: Data) -> list[jax.Array]:
        found = features(key, params, losses.present(goal).x)
        aim = [mean_row(leaf, goal.weight) for leaf in found]
        if relative and checks.is_concrete(aim) and not all(jnp.any(leaf != 0) for leaf in aim):
            sizes = [float(jnp.linalg.norm(leaf)) for leaf in aim]
            raise ValueError(f"known.goal: expected features that are not all zero in every layer, got norms {sizes}.")
        return aim

    return prepare


def square(aim: jax.Array) -> jax.Array:
    """`‖t‖²`, what squared distances are divided by; 1 where it is zero."""
    total = jnp.sum(aim**2)
    return jnp.where(total > 0, total, 1)


def mean_row(values: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted mean over rows, `[n, ...] -> [...]`; 0 if none has weight."""
    weight = weight.astype(values.dtype)
    total = jnp.sum(weight)
    return jnp.tensordot(weight / jnp.where(total > 0, total, 1), values, axes=1)


def mean_of(values: list[jax.Array]) -> jax.Array:
    """The mean over networks and layers."""
    return jnp.mean(jnp.stack(values), axis=0)
