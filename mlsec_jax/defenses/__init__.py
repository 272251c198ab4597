"""Defenses: transforms of batches and parameters, trainers, inspectors and certified ensembles, one method a file."""

from mlsec_jax.defenses._invert_trigger import Inversion, Inverted, invert_trigger
from mlsec_jax.defenses._mitigate import last_layer, prune_trigger, trigger_neurons, unlearn_trigger
from mlsec_jax.defenses._neural_cleanse import neural_cleanse
from mlsec_jax.defenses._tabor import tabor
from mlsec_jax.defenses._weights import clip_weights, noise_weights

__all__ = [
    "Inversion",
    "Inverted",
    "clip_weights",
    "invert_trigger",
    "last_layer",
    "neural_cleanse",
    "noise_weights",
    "prune_trigger",
    "tabor",
    "trigger_neurons",
    "unlearn_trigger",
]
