"""Machine-learning security in JAX: what attackers and defenders do, as functions to compose and differentiate."""

import importlib
import pkgutil
from types import ModuleType

from mlsec_jax.base import Algorithm, Data, Known, Threat, Trainer, dataset

__version__ = "0.1.0"
__all__ = ["Algorithm", "Data", "Known", "Threat", "Trainer", "dataset"]


def _rooms() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def __getattr__(name: str) -> ModuleType:
    """A room is imported when it is first named, so that `import mlsec_jax` stays fast."""
    if name not in _rooms():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", *_rooms()])
