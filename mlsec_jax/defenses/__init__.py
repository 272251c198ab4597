"""Defenses: transforms of batches and parameters, trainers, inspectors and certified ensembles, one method a file."""

from mlsec_jax.defenses._weights import clip_weights, noise_weights

__all__ = ["clip_weights", "noise_weights"]
