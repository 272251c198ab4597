"""Bullseye Polytope: the poisons' mean feature meets the target's (Aghakhani et al., EuroS&P 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import linalg
from mlsec_jax.attacks import _craft
from mlsec_jax.base import Algorithm, ApplyFn, Data, Key, Params, Threat


def bullseye_polytope(
    features_fn: ApplyFn,
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    num_draws: int = 0,
    squared: bool = False,
) -> Algorithm:
    """Moves the centre of the poisons' features onto the target's features.

    `min mean_i ‖φ_i(t) - (1/k) Σ_j φ_i(x_j)‖ / ‖φ_i(t)‖` over the leaves i of the features: networks (an ensemble) and
    layers (for victims that train end to end). With several goal rows t is the mean of their features (multi-target).

    Threat: changes - the inputs of the threat's rows, whose labels (the class that the target is to be taken for) stay;
    sees - the target inputs (`known.goal`), and the victim's network (`known.params`) or networks of its own
    (`known.surrogates`); budget - the threat's, 0.1 in l-inf and 5 of 500 rows in the paper; assumes - the victim
    retrains on features like these.

    Args:
      features_fn: `(params, x [n, ...], key=None) ->` a pytree of `[n, ...]`; `models.ensemble` for several networks.
      threat: `perturb_rows(rows, radius=…)`.
      optimizer: on the poisons; Adam is the paper's (0.04 on inputs in units of their standard deviation).
      num_draws: R, static: features are means of R dropout draws, new ones every step; 0 for evaluation mode.
      squared: `½ ‖·‖² / ‖·‖²`, as the paper prints it, in place of the ratio of its code.

    Returns:
      An `Algorithm`; info: `outer`, `gradient_norm`, `distance [leaves]`.

    References: Aghakhani et al., EuroS&P 2021, eq. (3)-(5). Deviates from the paper in: a layer's features are one
    vector, not a mean over positions; the target's features are drawn as the poisons' are, once.
    """
    features = _craft.drawn(features_fn, num_draws)

    def objective(key: Key, params: Params, poisons: Data, aim: list[jax.Array]) -> tuple[jax.Array, dict]:
        centres = [_craft.mean_row(leaf, poisons.weight > 0) for leaf in features(key, params, poisons.x)]
        distances = [_relative(t - c, t) for t, c in zip(aim, centres, strict=True)]
        terms = [d**2 / 2 for d in distances] if squared else distances
        return _craft.mean_of(terms), {"distance": jnp.stack(distances)}

    prepare = _craft.target_features(features_fn, num_draws)
    return _craft.craft("attacks.bullseye_polytope", prepare, objective, threat=threat, optimizer=optimizer)


def _relative(difference: jax.Array, target: jax.Array) -> jax.Array:
    """`‖difference‖ / ‖target‖`, whose derivative at zero is zero."""
    return linalg.root(jnp.sum(difference**2)) / jnp.sqrt(_craft.square(target))
