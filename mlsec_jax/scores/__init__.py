"""Scores: one number a row, higher = more suspicious or more likely a member."""

from mlsec_jax.scores._influence import influence
from mlsec_jax.scores._spectral import spectral
from mlsec_jax.scores._sphere_slab import slab, sphere, within_class

__all__ = ["influence", "slab", "spectral", "sphere", "within_class"]
