"""Scores: one number a row, higher = more suspicious or more likely a member."""

from mlsec_jax.scores._activation_clusters import (
    Clusters,
    activation_clusters,
    cluster_activations,
    cluster_silhouette,
    cluster_size,
    reclassification,
    silhouettes,
    taken_elsewhere,
)
from mlsec_jax.scores._deep_knn import deep_knn
from mlsec_jax.scores._influence import influence
from mlsec_jax.scores._low_loss import low_loss
from mlsec_jax.scores._roni import roni
from mlsec_jax.scores._spectral import spectral
from mlsec_jax.scores._sphere_slab import slab, sphere, within_class
from mlsec_jax.scores._strip import gaussian_threshold, strip

__all__ = [
    "Clusters",
    "activation_clusters",
    "cluster_activations",
    "cluster_silhouette",
    "cluster_size",
    "deep_knn",
    "gaussian_threshold",
    "influence",
    "low_loss",
    "reclassification",
    "roni",
    "silhouettes",
    "slab",
    "spectral",
    "sphere",
    "strip",
    "taken_elsewhere",
    "within_class",
]
