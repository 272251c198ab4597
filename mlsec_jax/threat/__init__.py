"""Who may change what: constructors of `Threat`, and of the triggers that one of them stamps."""

from mlsec_jax.threat._labels import flip_labels, reweigh
from mlsec_jax.threat._overlay import Overlay
from mlsec_jax.threat._rows import append_rows, perturb_rows, reserve
from mlsec_jax.threat._triggers import (
    Relabel,
    Trigger,
    additive,
    backdoor,
    blend,
    corners,
    patch,
    pixel,
    stripes,
    to_class,
    to_next,
    triggered,
    warp,
)

__all__ = [
    "Overlay",
    "Relabel",
    "Trigger",
    "additive",
    "append_rows",
    "backdoor",
    "blend",
    "corners",
    "flip_labels",
    "patch",
    "perturb_rows",
    "pixel",
    "reserve",
    "reweigh",
    "stripes",
    "to_class",
    "to_next",
    "triggered",
    "warp",
]
