"""Hidden trigger backdoor: poisons that look like the target class and are, in features, patched sources (Saha et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.assignment import hungarian_algorithm

from mlsec_jax import checks, loop, losses, tree
from mlsec_jax.attacks import _craft
from mlsec_jax.base import Algorithm, ApplyFn, Data, Info, Key, Known, Threat

PAIRINGS = ("greedy", "optimal", "faithful")


def hidden_trigger(
    features_fn: ApplyFn,
    trigger_fn: Callable[[Key, Any], Any],
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    pairing: str = "greedy",
    redraw: bool = False,
) -> Algorithm:
    """Moves target-class images onto patched source images in feature space; the trigger is in none of them.

    `min_z Σ_j ‖φ(z_j) - φ(s_{a(j)} ⊕ trigger)‖²  s.t. ‖z - t‖_∞ ≤ ε`, where a pairs every poison with a source, one to one,
    anew in every step: `greedy` takes the closest pair left, again and again; `optimal` has the least sum of squared distances
    (the Hungarian algorithm).

    `faithful` is what the published code does. It takes the k smallest entries of the whole matrix of distances, so that one
    source may win several poisons; poisons that win none keep the partner they had; and the table of source features is
    overwritten by the pairing, so that sources which lose are gone for good.

    Threat: changes - the inputs of the threat's rows, whose label, the class that triggered sources are to be taken for,
    stays; sees - source images without trigger, labelled as the attacker wants them (`known.goal`), and the victim's network
    (`known.params`) or networks of its own (`known.surrogates`); budget - the threat's, 16/255 in l-inf in the paper; assumes -
    the victim retrains its head on these features; a training from scratch forgets the collisions.

    Args:
      features_fn: `(params, x [n, ...], key=None) ->` a pytree of `[n, ...]`; `models.ensemble` for several networks.
      trigger_fn: `(key, x) -> x`, stamps the trigger; `threat.patch(…, at=None)` for a place drawn for each image, without
        which the attack works in the one place only.
      threat: `perturb_rows(rows, radius=…)` on k rows of the target class.
      optimizer: on the poisons; the paper's is plain gradient descent, 0.01 halved every 1,000 of 5,000 steps.
      pairing: `"greedy"` (what the paper describes), `"optimal"` or `"faithful"`.
      redraw: static: stamp the sources anew in every step, as the paper has it; its code stamps them once. Not with
        `faithful`, whose table of sources is its state.

    Returns:
      An `Algorithm`; info: `outer`, `gradient_norm`, `distance [k]` (squared, by which the paper chooses the poisons it uses),
      `source [k]`, each one's partner among the goal's rows (of the table as it stands, if `faithful`). The pairing counts as
      constant in the derivative.

    References: Saha et al., AAAI 2020, eq. (2), algorithm 1. Deviates from the paper in: no early stop at a distance of 10.
    """
    by = "attacks.hidden_trigger"
    checks.one_of("pairing", pairing, PAIRINGS)
    if redraw and pairing == "faithful":
        raise ValueError("redraw: expected False beside pairing='faithful', whose table of sources is its state.")
    rows = _craft.rows_of(threat, by)
    features = _craft.drawn(features_fn, 0)

    def stamped(key: Key, known: Known, subject: Data) -> list[jax.Array]:
        goal = _craft.target(known, by, subject)
        equal, num_poisons = pairing == "faithful", len(rows)
        num_present = checks.num_present(goal)
        if num_present < num_poisons or (equal and goal.num_rows != num_poisons):
            how = "exactly" if equal else "at least"
            raise ValueError(f"known.goal: expected {how} {num_poisons} sources, one a poison, got {num_present} rows.")
        return features(key, _craft.networks(known, by), trigger_fn(key, losses.present(goal).x))

    def init(key: Key, subject: Data, known: Known) -> _craft.CraftState:
        checks.data("subject", subject)
        threat_key, trigger_key = jax.random.split(key)
        poison = threat.project(threat.init(threat_key, subject), subject)
        return _craft.CraftState(poison, optimizer.init(poison), stamped(trigger_key, known, subject))

    def step(key: Key, state: _craft.CraftState, subject: Data, known: Known) -> tuple[_craft.CraftState, Info]:
        present = _craft.target(known, by, subject).weight > 0
        params = _craft.networks(known, by)
        sources = stamped(key, known, subject) if redraw else state.aim

        def collision(poison: Any) -> tuple[jax.Array, tuple]:
            poisons = _craft.poisons_of(threat, poison, subject, rows)
            found = features(key, params, poisons.x)
            cost = jax.lax.stop_gradient(_squared_distances(found, sources))
            partner = _PAIR[pairing](_behind(cost, present))
            apart = [jnp.sum(jnp.square(f - s[partner]), axis=1) for f, s in zip(found, sources, strict=True)]
            distance = jnp.sum(jnp.stack(apart), axis=0)
            distance = jnp.where(present[partner] & (poisons.weight > 0), distance, 0)
            return jnp.sum(distance), (distance, partner)

        (value, (distance, partner)), gradient = jax.value_and_grad(collision, has_aux=True)(state.poison)
        moved, opt_state = loop.apply_optimizer(optimizer, gradient, state.optimizer, state.poison)
        table = [leaf[partner] for leaf in sources] if pairing == "faithful" else state.aim
        report = {"outer": value, "gradient_norm": tree.norm(gradient), "distance": distance, "source": partner}
        return _craft.CraftState(threat.project(moved, subject), opt_state, table), report

    return _craft.unless_empty(rows, Algorithm(init, step, lambda state, subject: threat.embed(state.poison, subject)))


def _squared_distances(found: list[jax.Array], sources: list[jax.Array]) -> jax.Array:
    """`[k, m]`, summed over networks and layers."""
    one = lambda f, s: jnp.sum(f**2, axis=1)[:, None] + jnp.sum(s**2, axis=1)[None] - 2 * f @ s.T
    return jnp.sum(jnp.stack([one(f, s) for f, s in zip(found, sources, strict=True)]), axis=0)


def _behind(cost: jax.Array, present: jax.Array) -> jax.Array:
    """Sources that are absent cost more than all the others together."""
    return jnp.where(present[None], cost, jnp.sum(jnp.max(jnp.abs(cost), axis=1)) + 1)


def _greedy(cost: jax.Array) -> jax.Array:
    """`[k]`: the closest pair, then the closest of those left, and so on."""

    def take(carry: tuple[jax.Array, jax.Array], _: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        left, partner = carry
        i, j = jnp.unravel_index(jnp.argmin(left), left.shape)
        left = left.at[i].set(jnp.inf).at[:, j].set(jnp.inf)
        return (left, partner.at[i].set(j.astype(partner.dtype))), None

    start = (cost, jnp.zeros(cost.shape[0], jnp.int32))
    return jax.lax.scan(take, start, length=cost.shape[0])[0][1]


def _optimal(cost: jax.Array) -> jax.Array:
    """`[k]`: the assignment of least total cost."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        i, j = hungarian_algorithm(cost)
    return jnp.zeros(cost.shape[0], jnp.int32).at[i].set(j.astype(jnp.int32))


def _faithful(cost: jax.Array) -> jax.Array:
    """`[k]`: of the k smallest entries of the square matrix the largest in each row; else what stands there."""
    size = cost.shape[0]
    _, smallest = jax.lax.top_k(-cost.T.ravel(), size)  # ascending; rows of the transpose are sources, as in the code
    overwrite = lambda partner, entry: (partner.at[entry % size].set((entry // size).astype(partner.dtype)), None)
    return jax.lax.scan(overwrite, jnp.arange(size, dtype=jnp.int32), smallest)[0]


_PAIR: dict[str, Callable[[jax.Array], jax.Array]] = {"greedy": _greedy, "optimal": _optimal, "faithful": _faithful}
