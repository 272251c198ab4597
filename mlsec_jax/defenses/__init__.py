"""Defenses: transforms of batches and parameters, trainers, inspectors and certified ensembles, one method a file."""

from mlsec_jax.defenses._channel_lipschitz import channel_lipschitz
from mlsec_jax.defenses._fine_prune import fine_prune
from mlsec_jax.defenses._weights import clip_weights, noise_weights

__all__ = ["channel_lipschitz", "clip_weights", "fine_prune", "noise_weights"]
