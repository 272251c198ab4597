"""Every public method, once: its kind, and how to build it on the shared problem. The laws run over these rows."""

from tests.registry import attacks, bilevel, defenses, scores, threat
from tests.registry._row import Row

__all__ = ["HELPERS", "ROWS", "Row", "of"]

ROWS = [*attacks.ROWS, *bilevel.ROWS, *threat.ROWS, *defenses.ROWS, *scores.ROWS]

# Public names that are no methods: orders, starts, goals, pieces.
HELPERS = {
    "defenses.Inversion",
    "defenses.Inverted",
    "defenses.last_layer",
    "defenses.neural_cleanse",
    "defenses.tabor",
    "defenses.Bagged",
    "defenses.Smoothed",
    "defenses.flooding",
    "defenses.unlearning",
    "defenses.fill_harmonic",
    "defenses.fill_mean",
    "defenses.fill_network",
    "defenses.grad_cam",
    "defenses.split_at",
    "defenses.usual_peak",
    "scores.Clusters",
    "scores.cluster_activations",
    "scores.cluster_silhouette",
    "scores.cluster_size",
    "scores.gaussian_threshold",
    "scores.reclassification",
    "scores.silhouettes",
    "scores.taken_elsewhere",
    "scores.within_class",
    "threat.Overlay",
    "threat.Relabel",
    "threat.Trigger",
    "threat.additive",
    "threat.blend",
    "threat.corners",
    "threat.patch",
    "threat.pixel",
    "threat.reserve",
    "threat.stripes",
    "threat.to_class",
    "threat.to_next",
    "threat.triggered",
    "threat.warp",
    "attacks.Transferred",
    "attacks.error_specific_goal",
    "attacks.greedy",
    "attacks.joint",
    "attacks.largest_gradients",
    "attacks.most_influential",
    "attacks.on_features",
    "attacks.on_features_loss",
    "attacks.random_other",
    "attacks.require_alive",
    "attacks.start_points",
    "attacks.swap",
    "attacks.targeted_goal",
    "attacks.unit_rows",
}


def of(kind):
    """The rows of a kind."""
    return [row for row in ROWS if row.kind == kind]
