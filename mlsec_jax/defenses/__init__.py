"""Defenses: transforms of batches and parameters, trainers, inspectors and certified ensembles, one method a file."""

from mlsec_jax.defenses._abl import abl, flooding, unlearning
from mlsec_jax.defenses._bagging import Bagged, bagging
from mlsec_jax.defenses._channel_lipschitz import channel_lipschitz
from mlsec_jax.defenses._cutmix import cutmix
from mlsec_jax.defenses._cutout import cutout
from mlsec_jax.defenses._februus import februus
from mlsec_jax.defenses._fills import fill_harmonic, fill_mean, fill_network
from mlsec_jax.defenses._fine_prune import fine_prune
from mlsec_jax.defenses._grad_cam import grad_cam, split_at, usual_peak
from mlsec_jax.defenses._gradient_shaping import gradient_shaping
from mlsec_jax.defenses._invert_trigger import Inversion, Inverted, invert_trigger
from mlsec_jax.defenses._label_flip_smoothing import Smoothed, label_flip_smoothing
from mlsec_jax.defenses._max_up import max_up
from mlsec_jax.defenses._mitigate import last_layer, prune_trigger, trigger_neurons, unlearn_trigger
from mlsec_jax.defenses._mixup import mixup
from mlsec_jax.defenses._neural_cleanse import neural_cleanse
from mlsec_jax.defenses._partition_aggregation import partition_aggregation
from mlsec_jax.defenses._reclassified import reclassified
from mlsec_jax.defenses._tabor import tabor
from mlsec_jax.defenses._weights import clip_weights, noise_weights

__all__ = [
    "Bagged",
    "Inversion",
    "Inverted",
    "Smoothed",
    "abl",
    "bagging",
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
    "invert_trigger",
    "label_flip_smoothing",
    "last_layer",
    "max_up",
    "mixup",
    "neural_cleanse",
    "noise_weights",
    "partition_aggregation",
    "prune_trigger",
    "reclassified",
    "split_at",
    "tabor",
    "trigger_neurons",
    "unlearn_trigger",
    "unlearning",
    "usual_peak",
]
