"""Attacks: assemblies of threats, trainers and losses, one published method a file."""

from mlsec_jax.attacks._badnets import badnets
from mlsec_jax.attacks._bilevel import bilevel, greedy, joint, require_alive, unit_rows
from mlsec_jax.attacks._bullseye_polytope import bullseye_polytope
from mlsec_jax.attacks._convex_polytope import convex_polytope
from mlsec_jax.attacks._feature_collision import feature_collision
from mlsec_jax.attacks._gradient_matching import gradient_matching, largest_gradients
from mlsec_jax.attacks._influence_images import (
    Transferred,
    influence_images,
    most_influential,
    on_features,
    on_features_loss,
)
from mlsec_jax.attacks._kkt_sanitized import kkt_sanitized
from mlsec_jax.attacks._label_flips import flip_alfa, flip_greedy, flip_margin, flip_random
from mlsec_jax.attacks._linear_regression import linear_regression
from mlsec_jax.attacks._metapoison import metapoison
from mlsec_jax.attacks._presets import (
    availability,
    error_specific,
    error_specific_goal,
    random_other,
    start_points,
    swap,
    targeted,
    targeted_goal,
)
from mlsec_jax.attacks._pruning_aware import pruning_aware
from mlsec_jax.attacks._sleeper_agent import sleeper_agent
from mlsec_jax.attacks._svm_kkt import svm_kkt

__all__ = [
    "Transferred",
    "availability",
    "badnets",
    "bilevel",
    "bullseye_polytope",
    "convex_polytope",
    "error_specific",
    "error_specific_goal",
    "feature_collision",
    "flip_alfa",
    "flip_greedy",
    "flip_margin",
    "flip_random",
    "gradient_matching",
    "greedy",
    "influence_images",
    "joint",
    "kkt_sanitized",
    "largest_gradients",
    "linear_regression",
    "metapoison",
    "most_influential",
    "on_features",
    "on_features_loss",
    "pruning_aware",
    "random_other",
    "require_alive",
    "sleeper_agent",
    "start_points",
    "svm_kkt",
    "swap",
    "targeted",
    "targeted_goal",
    "unit_rows",
]
