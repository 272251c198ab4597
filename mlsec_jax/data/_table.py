"""Tables kept as npz files in the folder that MLSEC_JAX_DATA names."""

from __future__ import annotations

import os
import zipfile

import numpy as np

from mlsec_jax.data._folders import DAMAGED, tables_root

_TABLES = {
    "adult": "UCI Adult: X_train [32561, 14] and X_test [16281, 14] integer codes (-1: missing), y_* 1 for >50K, "
    "feature_names, is_categorical, categories_*",
    "spambase": "UCI Spambase: X [4601, 57], y [4601] with 1 for spam, feature_names",
    "att_faces": "the AT&T faces: images [400, 112, 92] uint8, labels [400] in 0..39",
    "gtsrb_subset": "German traffic signs: X_train, X_test [n, 32, 32, 3] uint8, y_*, files_*",
    "speech_commands_logmel": "Speech Commands v0.02: X_train, X_test [n, 32, 32] uint8 log-mel, y_*, speakers_*, "
    "classes",
}
_ROWS = {  # what each file has to hold, those of as many rows together
    "adult": ("X_train y_train", "X_test y_test", "feature_names is_categorical"),
    "spambase": ("X y", "feature_names"),
    "att_faces": ("images labels",),
    "gtsrb_subset": ("X_train y_train files_train", "X_test y_test files_test"),
    "speech_commands_logmel": ("X_train y_train speakers_train", "X_test y_test speakers_test", "classes"),
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
      ValueError: no such table; a file that is no npz of plain arrays, lacks one, or whose rows or numbers are amiss.

    >>> table("wine")
    Traceback (most recent call last):
    ...
    ValueError: name: expected one of adult, spambase, att_faces, gtsrb_subset, speech_commands_logmel, got 'wine'.
    """
    if name not in _TABLES:
        raise ValueError(f"name: expected one of {', '.join(_TABLES)}, got {name!r}.")
    root = tables_root(data_dir)
    if root is None:
        raise FileNotFoundError(
            f"table {name!r}: set MLSEC_JAX_DATA, or pass data_dir, to the folder that holds {name}.npz."
            f" It should hold {_TABLES[name]}."
        )
    path = root / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"table {name!r}: there is no {path} (MLSEC_JAX_DATA or data_dir names the folder). "
            f"Make it with numpy.savez_compressed; it should hold {_TABLES[name]}."
        )
    expected = f"table {name!r}: expected {path} to hold"
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except PermissionError:
        raise
    except DAMAGED as error:
        # numpy's own words advise to unpickle what may be a stranger's
        message = f"{expected} plain arrays as numpy.savez writes them, got a damaged or another file."
        raise ValueError(message) from error
    for group in _ROWS[name]:
        missing = [each for each in group.split() if each not in arrays]
        if missing:
            raise ValueError(f"{expected} {', '.join(missing)} too, got {', '.join(arrays) or 'nothing'}.")
        sizes = {each: arrays[each].shape[:1] for each in group.split()}
        if len(set(sizes.values())) > 1 or () in sizes.values():
            raise ValueError(f"{expected} as many rows in {' as in '.join(sizes)}, got shapes {[*sizes.values()]}.")
    bad = [each for each, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if bad:
        raise ValueError(f"{expected} finite numbers, got others in {', '.join(bad)}.")
    return arrays
