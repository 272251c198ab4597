"""Convex Polytope: poisons that surround the target in feature space (Zhu et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import linalg
from mlsec_jax.attacks import _craft
from mlsec_jax.base import Algorithm, ApplyFn, Data, Key, Params, Threat


def convex_polytope(
    features_fn: ApplyFn,
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    num_draws: int = 0,
    coefficients_fn: Callable[[jax.Array], jax.Array] = linalg.nearest_in_hull,
) -> Algorithm:
    """Makes the target's features a convex combination of the poisons', in every network and layer.

    `min_x mean_i min_{c_i ∈ Δ_k} ½ ‖φ_i(t) - Σ_j c_ij φ_i(x_j)‖² / ‖φ_i(t)‖²` over the leaves i of the features. The
    coefficients are found on the k×k Gram matrix of `φ(x_j) - φ(t)`, and held fixed in the derivative (which is then the
    derivative of the minimum, by the envelope theorem, if they are exact).

    Threat: changes - the inputs of the threat's rows, whose labels (the class that the target is to be taken for) stay;
    sees - the target inputs (`known.goal`), and the victim's network (`known.params`) or networks of its own
    (`known.surrogates`); budget - the threat's, 0.1 in l-inf and 5 of 500 rows in the paper; assumes - the victim
    retrains on features like these.

    Args:
      features_fn: `(params, x [n, ...], key=None) ->` a pytree of `[n, ...]`; `models.ensemble` for several networks.
      threat: `perturb_rows(rows, radius=…)`.
      optimizer: on the poisons; Adam is the paper's (0.04 on inputs in units of their standard deviation).
      num_draws: static: features are means of as many dropout draws, new ones every step (the paper draws once); 0 for
        evaluation mode. Without dropout the poisons of a few networks transfer badly to others.
      coefficients_fn: `gram [k, k] -> c [k]` on the simplex. The exact ones are sparse, and a poison without weight stays
        where it is; `linalg.descend_in_hull` of a few steps moves them all, and of no steps is `bullseye_polytope`'s mean.

    Returns:
      An `Algorithm`; info: `outer`, `gradient_norm`, `coefficients [leaves, k]`.

    References: Zhu et al., ICML 2019, eq. (2)-(3), algorithm 1. Deviates from the paper in: the coefficients are solved
    anew in every step, by default exactly, rather than by warm-started forward-backward splitting; the loss is the mean
    over networks, not their sum.
    """
    features = _craft.drawn(features_fn, num_draws)

    def objective(key: Key, params: Params, poisons: Data, aim: list[jax.Array]) -> tuple[jax.Array, dict]:
        terms, coefficients = [], []
        there = poisons.weight > 0  # an absent poison stands where another one does, whose coefficient it shares
        stand = jnp.where(there, jnp.arange(there.size), jnp.argmax(there))
        for leaf, t in zip(features(key, params, poisons.x), aim, strict=True):
            difference = (leaf - t[None])[stand]
            c = coefficients_fn(jax.lax.stop_gradient(difference @ difference.T))
            terms.append(jnp.sum((c @ difference) ** 2) / (2 * _craft.square(t)))
            coefficients.append(c)
        return _craft.mean_of(terms), {"coefficients": jnp.stack(coefficients)}

    prepare = _craft.target_features(features_fn, num_draws)
    return _craft.craft("attacks.convex_polytope", prepare, objective, threat=threat, optimizer=optimizer)
