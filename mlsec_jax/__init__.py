"""Machine-learning security in JAX: what attackers and defenders do, as functions to compose and differentiate."""

from mlsec_jax.base import Algorithm, Data, Known, Threat, Trainer, dataset

__version__ = "0.1.0"
__all__ = ["Algorithm", "Data", "Known", "Threat", "Trainer", "dataset"]
