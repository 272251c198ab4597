"""Defenses: transforms of batches and parameters, trainers, inspectors and certified ensembles, one method a file."""

from mlsec_jax.defenses._abl import abl, flooding, unlearning
from mlsec_jax.defenses._channel_lipschitz import channel_lipschitz
from mlsec_jax.defenses._cutmix import cutmix
from mlsec_jax.defenses._cutout import cutout
from mlsec_jax.defenses._februus import februus
from mlsec_jax.defenses._fills import fill_harmonic, fill_mean, fill_network
from mlsec_jax.defenses._fine_prune import fine_prune
from mlsec_jax.defenses._grad_cam import grad_cam, split_at
from mlsec_jax.defenses._gradient_shaping import gradient_shaping
from mlsec_jax.defenses._max_up import max_up
from mlsec_jax.defenses._mixup import mixup
from mlsec_jax.defenses._weights import clip_weights, noise_weights

__all__ = [
    "abl",
    "channel_lipschitz",
    "clip_weights",
    "cutmix",
    "cutout",
    "februus",
    "fill_harmonic",
    "fill_mean",
    "fill_network",
    "fine_prune",
    "flooding",
    "grad_cam",
    "gradient_shaping",
    "max_up",
    "mixup",
    "noise_weights",
    "split_at",
    "unlearning",
]
