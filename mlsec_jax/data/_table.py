"""Tables kept as npz files in the folder that MLSEC_JAX_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

_TABLES = {
    "adult": "UCI Adult: X_train [32561, 14] and X_test [16281, 14] integer codes (-1: missing), y_* 1 for >50K, "
    "feature_names, is_categorical, categories_*",
    "spambase": "UCI Spambase: X [4601, 57], y [4601] with 1 for spam, feature_names",
    "att_faces": "the AT&T faces: images [400, 112, 92] uint8, labels [400] in 0..39",
    "gtsrb_subset": "German traffic signs: X_train, X_test [n, 32, 32, 3] uint8, y_*, files_*",
    "speech_commands_logmel": "Speech Commands v0.02: X_train, X_test [n, 32, 32] uint8 log-mel, y_*, speakers_*, "
    "classes",
}


def table(name: str, *, data_dir: str | os.PathLike | None = None) -> dict[str, np.ndarray]:
    """Loads the arrays of a table by their own names.

    Args:
      name: `adult`, `spambase`, `att_faces`, `gtsrb_subset` or `speech_commands_logmel`.
      data_dir: the folder of the npz files; None for MLSEC_JAX_DATA.

    Returns:
      The arrays by name, with the dtypes they are stored in.

    Raises:
      FileNotFoundError: the folder or the file is missing; the message says what the file has to hold.

    >>> table("wine")
    Traceback (most recent call last):
    ...
    ValueError: name: expected one of adult, spambase, att_faces, gtsrb_subset, speech_commands_logmel, got 'wine'.
    """
    if name not in _TABLES:
        raise ValueError(f"name: expected one of {', '.join(_TABLES)}, got {name!r}.")
    root = data_dir or os.environ.get("MLSEC_JAX_DATA")
    if not root:
        raise FileNotFoundError(
            f"table {name!r}: set MLSEC_JAX_DATA, or pass data_dir, to the folder that holds {name}.npz."
            f" It should hold {_TABLES[name]}."
        )
    path = Path(root).expanduser() / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"table {name!r}: there is no {path} (MLSEC_JAX_DATA or data_dir names the folder). "
            f"Make it with numpy.savez_compressed; it should hold {_TABLES[name]}."
        )
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
