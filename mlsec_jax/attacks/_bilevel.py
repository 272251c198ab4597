"""Poisoning by differentiating through training: the generic attack, from which the presets are assembled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Required, TypedDict

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, linalg, loop, tree
from mlsec_jax.base import Algorithm, Data, Info, Key, Known, OuterFn, Threat

Order = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]  # (step, k) -> (present [k], moving [k]) bools


def joint() -> Order:
    """All poisons are there from the start and move together."""
    return lambda step, k: (jnp.ones(k, bool), jnp.ones(k, bool))


def greedy(steps_per_point: int, *, passes: int = 1) -> Order:
    """One point after another: optimise it, keep it, go on to the next (Muñoz-González et al. 2017; Biggio et al. 2012).

    Args:
      steps_per_point: static; k points take `passes · k · steps_per_point` steps.
      passes: after the first pass all points are present, and each moves again while the others rest.
    """
    checks.count("steps_per_point", steps_per_point, 1)
    checks.count("passes", passes, 1)

    def order(step: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        point = step // steps_per_point
        points = jnp.arange(k, dtype=step.dtype)
        return points <= point, (points == point % max(k, 1)) & (point < passes * k)

    return order


def unit_rows(step_size: Any) -> optax.GradientTransformation:
    """An optax transformation: each poison moves by `step_size` along its own unit gradient, `-η g_i / ‖g_i‖`.

    The step of Biggio et al. (2012) and Muñoz-González et al. (2017); a row with zero gradient rests.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        over = lambda leaf: tuple(range(1, leaf.ndim))
        peaks = [jnp.max(jnp.abs(leaf), axis=over(leaf), initial=0) for leaf in jax.tree.leaves(updates)]
        exponent = jnp.frexp(functools.reduce(jnp.maximum, peaks))[1]  # by a power of two: no bit changes, nothing underflows
        updates = jax.tree.map(lambda leaf: jnp.ldexp(leaf, -tree.per_row(exponent, leaf)), updates)
        squares = [jnp.sum(jnp.square(leaf), axis=over(leaf)) for leaf in jax.tree.leaves(updates)]
        inverse = linalg.inverse_root(functools.reduce(jnp.add, squares))
        scale = lambda leaf: -jnp.asarray(step_size, leaf.dtype) * leaf * tree.per_row(inverse, leaf)
        return jax.tree.map(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class Options(TypedDict, total=False):
    """What every preset passes on to `bilevel`, which documents it."""

    threat: Required[Threat]
    optimizer: Required[optax.GradientTransformation]
    order: Order | None
    fixed_key: bool


class BilevelState(NamedTuple):
    """The state of a bilevel attack.

    Attributes:
      poison: what the threat lets the attacker choose.
      optimizer: the outer optimiser's state.
      step: how many steps were taken.
    """

    poison: Any
    optimizer: Any
    step: jax.Array


def first_poison(threat: Threat, key: Key, subject: Data) -> tuple[Any, Data]:
    """Where the poisons start, projected, and the data with them (as far as values can be seen, else the subject).

    Raises unless the poisons are floating, and finite in the data.
    """
    poison = threat.init(key, subject)
    for leaf in jax.tree.leaves(poison):
        if not tree.is_float(leaf):
            raise ValueError(f"subject.x: expected floating inputs, which an attack can move, got poisons of {leaf.dtype}.")
    poison = threat.project(poison, subject)
    data = threat.embed(poison, subject)
    data = data if checks.is_concrete(data) else subject
    checks.data("subject", data)
    return poison, data


def bilevel(
    outer: OuterFn,
    trainer: Any,
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    order: Order | None = None,
    fixed_key: bool = True,
) -> Algorithm:
    """Optimises training data by differentiating through the victim's training.

    `min_poison outer(θ*(D), D, goal)`, `θ*(D) = trainer(key, θ₀, D)`, `D = threat.embed(poison, clean)`, by projected
    steps of any optax optimizer on the total derivative (the direct term `∂outer/∂D` included).

    Threat: changes - what `threat` says; sees - the training set, the trainer, θ₀ (`known.params`) and its goal
    (`known.goal`); budget - the threat's; assumes - the trainer given is the victim's or a surrogate of it.

    Args:
      outer: `(params, data, goal) -> scalar`, minimised.
      trainer: `(key, params, data) -> (params, info)`, differentiable in `data`; `combine.defended` makes it adaptive.
      threat: the attacker's reach.
      optimizer: on the poison; `unit_rows(η)` is the literature's.
      order: `joint()` (default) or `greedy(steps_per_point)`; greedy needs a threat with rows that are appended.
      fixed_key: train with `jax.random.key(0)` in every step, whatever the attack's key (w₀ and batch order fixed, or the
        objective jumps); False draws a fresh key every step, for victims whose randomness is unknown.

    Returns:
      An `Algorithm` on training `Data`, whose `init` raises on NaN or labels out of range in the training set, the reserved
      rows with the poisons in them, or the goal; info: `outer`, `gradient_norm`, `step_norm`, `alive` (poison rows of positive
      training weight whose gradient is not zero; 1 or 0 for a threat without rows), `finite` (whether the gradient is finite:
      where it is not, because training diverged, the poison and the optimizer's state stay as they were), `train` (the
      trainer's info).

    References: Muñoz-González et al., AISec 2017, eq. (3)-(4), algorithm 1. Deviates from the paper in: the
    projection is the threat's, and all points may move together.
    """
    order = joint() if order is None else order

    def needed(known: Known) -> tuple[Any, Any]:
        return known.require("goal", by="attacks.bilevel"), known.require("params", by="attacks.bilevel")

    def points(poison: Any) -> int:
        return jax.tree.leaves(poison)[0].shape[0] if threat.rows is not None else 1

    def with_present(poison: Any, subject: Data, present: jax.Array) -> Data:
        """The training set with the poisons that are present; what another one will replace is still as it was."""
        data = threat.embed(poison, subject)
        if threat.rows is None:
            return data
        there = jnp.ones(data.num_rows, bool).at[jnp.asarray(threat.rows)].set(present)
        pick = lambda new, old: new if new is old else jnp.where(tree.per_row(there, new), new, old)
        return jax.tree.map(pick, data, subject)

    def init(key: Key, subject: Data, known: Known) -> BilevelState:
        checks.data("subject", subject)
        goal, params = needed(known)
        if isinstance(goal, Data):
            checks.data("known.goal", goal)
        poison, data = first_poison(threat, key, subject)
        if checks.is_concrete((subject, known)):  # the host border: what loss and trainer check of concrete data
            with checks.naming("subject"):
                trained = jax.eval_shape(lambda start: trainer(jax.random.key(0), start, data)[0], params)
            with checks.naming("known.goal"):
                jax.eval_shape(lambda trained: outer(trained, data, goal), trained)
        return BilevelState(poison, optimizer.init(poison), jnp.zeros((), jnp.int32))

    def step(key: Key, state: BilevelState, subject: Data, known: Known) -> tuple[BilevelState, Info]:
        goal, params = needed(known)
        train_key = jax.random.key(0) if fixed_key else key

        present, moving = order(state.step, points(state.poison))

        def objective(poison: Any) -> tuple[jax.Array, Any]:
            data = with_present(poison, subject, present)
            trained, info = trainer(train_key, params, data)
            return outer(trained, data, goal), (info, data.weight)

        (value, (info, weight)), gradient = jax.value_and_grad(objective, has_aux=True)(state.poison)
        kept: Any = True
        if threat.rows is not None:
            gradient = jax.tree.map(lambda g: jnp.where(tree.per_row(moving, g), g, 0), gradient)
            kept = (info.get("weight", weight) if isinstance(info, dict) else weight)[jnp.asarray(threat.rows)] > 0
        own = 0 if threat.rows is None else 1  # the axes of a leaf that are the poisons', not one poison's
        nonzero = [jnp.any(jnp.isfinite(g) & (g != 0), axis=tuple(range(own, g.ndim))) for g in jax.tree.leaves(gradient)]
        alive = jnp.sum(jnp.any(jnp.stack(nonzero), axis=0) & kept)
        moved, opt_state = loop.apply_optimizer(optimizer, gradient, state.optimizer, state.poison)
        moved = threat.project(moved, subject)
        if threat.rows is not None:
            moved = jax.tree.map(lambda new, old: jnp.where(tree.per_row(moving, new), new, old), moved, state.poison)
        # Training that diverges has a gradient that is not finite, which no projection brings back into the threat.
        finite = tree.all_finite(gradient)
        moved, opt_state = tree.choose(finite, (moved, opt_state), (state.poison, state.optimizer))
        report = {
            "outer": value,
            "gradient_norm": tree.norm(gradient),
            "step_norm": tree.norm(jax.tree.map(jnp.subtract, moved, state.poison)),
            "alive": alive,
            "finite": finite,
            "train": info,
        }
        return BilevelState(moved, opt_state, state.step + 1), report

    def read(state: BilevelState, subject: Data) -> Data:
        return threat.embed(state.poison, subject)

    return Algorithm(init, step, read)


def require_alive(infos: Any) -> None:
    """Raises when no poison had a finite gradient in any step: the host's check after a run of `bilevel`.

    A hard filter has a true derivative of zero for a removed poison, so an attack through it can stand still.

    Args:
      infos: what `combine.run` returned.
    """
    if jnp.size(infos.get("finite", ())) and not jnp.any(infos["finite"]):
        raise ValueError(
            "attacks.bilevel: no step had a finite gradient: training diverges, or its optimizer has no derivative where a "
            "parameter never moves (optax.adam with eps_root = 0)."
        )
    if int(jnp.max(infos["alive"], initial=0)) == 0:
        raise ValueError(
            "attacks.bilevel: no poison row had a gradient in any step: the defense removed them all, or the outer loss "
            "does not depend on the trained parameters. Attack through filter_top(gradient=soft(t)) or "
            "straight_through(t), and judge against the hard filter."
        )
