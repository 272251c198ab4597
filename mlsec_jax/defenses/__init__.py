"""Defenses: transforms of batches and parameters, trainers, inspectors and certified ensembles, one method a file."""

from mlsec_jax.defenses._februus import februus
from mlsec_jax.defenses._fills import fill_harmonic, fill_mean, fill_network
from mlsec_jax.defenses._grad_cam import grad_cam, split_at
from mlsec_jax.defenses._weights import clip_weights, noise_weights

__all__ = [
    "clip_weights",
    "februus",
    "fill_harmonic",
    "fill_mean",
    "fill_network",
    "grad_cam",
    "noise_weights",
    "split_at",
]
