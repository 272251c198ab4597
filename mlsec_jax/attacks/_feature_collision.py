"""Feature collision, or Poison Frogs: each poison looks like its base and is, to the network, the target."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, losses, tree
from mlsec_jax.attacks import _craft
from mlsec_jax.base import Algorithm, ApplyFn, Data, Info, Key, Known, Params, Threat


class CollisionState(NamedTuple):
    """The state of feature collision: every poison has its own step size.

    Attributes:
      poison: `[k, ...]`, the last accepted inputs.
      trial: `[k, ...]`, what is looked at next.
      base: `[k, ...]`, what each poison is to look like.
      value: `[k]`, the objective at `poison`; infinite before the first step.
      gradient: `[k, ...]`, of the first term at `poison`.
      step_size: `[k]`.
      aim: the target's features.
    """

    poison: jax.Array
    trial: jax.Array
    base: jax.Array
    value: jax.Array
    gradient: jax.Array
    step_size: jax.Array
    aim: Any


def feature_collision(
    features_fn: ApplyFn,
    *,
    threat: Threat,
    beta: Any = 0.0,
    opacity: Any = 0.0,
    step_size: Any = 1.0,
    shrink: Any = 0.5,
    grow: Any = 1.2,
    relative: bool = True,
    optimizer: optax.GradientTransformation | None = None,
    num_draws: int = 0,
) -> Algorithm:
    """Moves each poison onto the target in feature space while it stays near its base in input space.

    `min_x mean_i ‖φ_i(x) - φ_i(t)‖² / ‖φ_i(t)‖² + β ‖x - b‖²` for each poison by itself, by forward-backward splitting:
    `x̂ = x - λ ∇_x(first term)`, `x ← Π((x̂ + 2 λ β b) / (1 + 2 λ β))`. A step that does not lower the objective is taken
    back, and λ of that poison shrinks; otherwise it grows. The base is `b = γ t + (1 - γ) x_clean`, a watermark of
    opacity γ, and the poison starts there.

    Threat: changes - the inputs of the threat's rows, whose labels (the class that the target is to be taken for) stay;
    sees - the target input (`known.goal`; with several, the mean of their features) and the victim's network
    (`known.params`) or networks of its own (`known.surrogates`); budget - as published none but the box and β
    (`perturb_rows(rows)`), or an l-inf radius with β = 0 (Schwarzschild et al. 2021); assumes - the victim retrains its
    head on these features until it fits every row.

    Args:
      features_fn: `(params, x [n, ...], key=None) ->` a pytree of `[n, ...]`; `models.ensemble` for several networks.
      threat: `perturb_rows`.
      beta: β; the paper's is `0.25 (2048 / d)²` with `relative=False`, d the number of values of an image.
      opacity: γ in [0, 1]; 0.3 for victims that train end to end.
      step_size: λ at the start.
      shrink: the factor of a rejected step.
      grow: the factor of an accepted one; 1 for the paper's.
      relative: False leaves out the division by `‖φ_i(t)‖²`, and `step_size` and `beta` have the paper's units.
      optimizer: in place of the splitting, with β = 0 and γ = 0: the baseline of the polytope attacks' papers.
      num_draws: static: features are means of as many dropout draws; only with an optimizer, for the splitting compares
        values from step to step.

    Returns:
      An `Algorithm`; info: `outer` (mean over poisons of the best objective so far), `value [k]`, `accepted [k]`,
      `step_size [k]`; with an optimizer `outer`, `gradient_norm`, `value [k]`.

    References: Shafahi et al., NeurIPS 2018, eq. (1), algorithm 1. Deviates from the paper in: by default the first term
    is relative to the target's features; the backward step is the proximal map of `β ‖x - b‖²`, where the paper's lacks the
    factor 2; every step is checked, not every fortieth; λ may grow again.
    """
    by = "attacks.feature_collision"
    checks.at_least("beta", beta, 0)
    checks.between("opacity", opacity, 0, 1)
    checks.above("step_size", step_size, 0)
    checks.between("shrink", shrink, 0, 1)
    checks.at_least("grow", grow, 1)
    features = _craft.drawn(features_fn, num_draws)
    prepare = _craft.target_features(features_fn, num_draws, relative=relative)

    def distances(key: Key, params: Params, x: jax.Array, aim: list[jax.Array]) -> jax.Array:
        """The first term, for each poison `[k]`."""
        scale = lambda t: _craft.square(t) if relative else 1
        apart = lambda leaf, t: jnp.sum((leaf - t[None]) ** 2, axis=1) / scale(t)
        return _craft.mean_of([apart(leaf, t) for leaf, t in zip(features(key, params, x), aim, strict=True)])

    if optimizer is not None:
        if checks.is_concrete((beta, opacity)) and (beta, opacity) != (0, 0):
            raise ValueError(f"optimizer: expected beta = opacity = 0 beside it, got {beta} and {opacity}.")

        def objective(key: Key, params: Params, poisons: Data, aim: list[jax.Array]) -> tuple[jax.Array, dict]:
            value = distances(key, params, poisons.x, aim)
            return _craft.mean_row(value, poisons.weight > 0), {"value": value}

        return _craft.craft(by, prepare, objective, threat=threat, optimizer=optimizer)
    rows = _craft.rows_of(threat, by)
    if num_draws:
        raise ValueError("num_draws: expected an optimizer beside it: the splitting compares values from step to step.")

    def init(key: Key, subject: Data, known: Known) -> CollisionState:
        checks.data("subject", subject)
        goal = _craft.target(known, by, subject)
        threat_key, aim_key = jax.random.split(key)
        clean = threat.init(threat_key, subject)
        if not isinstance(clean, jax.Array):
            raise ValueError(f"subject.x: expected one array, or an optimizer beside it, got {jax.tree.structure(clean)}.")
        gamma = jnp.asarray(opacity, clean.dtype)
        base = gamma * _craft.mean_row(losses.present(goal).x, goal.weight)[None] + (1 - gamma) * clean
        poison = threat.project(base, subject)
        value = jnp.full(poison.shape[0], jnp.inf, poison.dtype)
        sizes = jnp.full(poison.shape[0], step_size, poison.dtype)
        aim = prepare(aim_key, _craft.networks(known, by), goal)
        return CollisionState(poison, poison, base, value, jnp.zeros_like(poison), sizes, aim)

    def step(key: Key, state: CollisionState, subject: Data, known: Known) -> tuple[CollisionState, Info]:
        _craft.target(known, by, subject)
        params = _craft.networks(known, by)
        penalty = jnp.asarray(beta, state.poison.dtype)

        def collision(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            distance = distances(key, params, x, state.aim)
            return jnp.sum(distance), distance

        (_, distance), gradient = jax.value_and_grad(collision, has_aux=True)(state.trial)
        offset = (state.trial - state.base).reshape(distance.shape[0], -1)
        value = distance + penalty * jnp.sum(offset**2, axis=1)
        accepted = value < state.value
        pick = lambda new, old: jnp.where(tree.per_row(accepted, old), new, old)
        poison, gradient = pick(state.trial, state.poison), pick(gradient, state.gradient)
        change = jnp.where(accepted, jnp.asarray(grow, value.dtype), jnp.asarray(shrink, value.dtype))
        sizes = state.step_size * jnp.where(jnp.isfinite(state.value), change, 1)  # the first only looks at the start
        size = tree.per_row(sizes, poison)
        forward = poison - size * gradient
        pull = 2 * size * penalty
        trial = threat.project((forward + pull * state.base) / (1 + pull), subject)
        value = pick(value, state.value)
        there = threat.embed(state.poison, subject).weight[rows] > 0
        outer = _craft.mean_row(jnp.where(there, value, 0), there)
        report = {"outer": outer, "value": value, "accepted": accepted, "step_size": sizes}
        return CollisionState(poison, trial, state.base, value, gradient, sizes, state.aim), report

    return _craft.unless_empty(rows, Algorithm(init, step, lambda state, subject: threat.embed(state.poison, subject)))
