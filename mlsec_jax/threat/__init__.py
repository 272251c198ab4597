"""Who may change what: constructors of `Threat`."""

from mlsec_jax.threat._labels import flip_labels, reweigh
from mlsec_jax.threat._rows import append_rows, perturb_rows, reserve

__all__ = ["append_rows", "flip_labels", "perturb_rows", "reserve", "reweigh"]
