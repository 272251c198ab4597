"""Defenses: transforms of batches and parameters, trainers, inspectors and certified ensembles, one method a file."""

from mlsec_jax.defenses._bagging import Bagged, bagging
from mlsec_jax.defenses._label_flip_smoothing import Smoothed, label_flip_smoothing
from mlsec_jax.defenses._partition_aggregation import partition_aggregation
from mlsec_jax.defenses._weights import clip_weights, noise_weights

__all__ = [
    "Bagged",
    "Smoothed",
    "bagging",
    "clip_weights",
    "label_flip_smoothing",
    "noise_weights",
    "partition_aggregation",
]
