"""The folders of tables, TFDS data sets and the cache; arrays kept there as plain npz files, written atomically."""

from __future__ import annotations

import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

# What reading a damaged npz can raise; a RuntimeError where a flipped bit asks for a password or a newer zip.
DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError)


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder for everything that can be made again: the argument, MLSEC_JAX_CACHE, or `mlsec_jax` in the user's.

    The user's cache folder is XDG_CACHE_HOME, or `~/.cache`. Nothing is created.

    >>> cache_root("/tmp/cache").as_posix()
    '/tmp/cache'
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if os.environ.get("MLSEC_JAX_CACHE"):
        return Path(os.environ["MLSEC_JAX_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlsec_jax"


def tables_root(data_dir: str | os.PathLike | None = None) -> Path | None:
    """The folder of tables and set-ups: the argument, or MLSEC_JAX_DATA; None where neither names one.

    >>> tables_root("/data").as_posix()
    '/data'
    """
    root = data_dir or os.environ.get("MLSEC_JAX_DATA")
    return Path(root).expanduser() if root else None


def tfds_root(data_dir: str | os.PathLike | None = None) -> Path:
    """The folder of prepared TFDS data sets: the argument, TFDS_DATA_DIR, or `~/tensorflow_datasets`, as TFDS has it.

    >>> tfds_root("/data").as_posix()
    '/data'
    """
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, so that `path` never holds half of it: under a temporary name beside it, renamed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # mkstemp's would be readable by its owner only
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays, whole or not at all."""
    with replacing(path) as file:
        # np.savez's own parameters are `file` and `allow_pickle`; no array here is called so.
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_npz(path: Path, names: Sequence[str] = ()) -> dict[str, np.ndarray] | None:
    """The arrays of the file; None where there is no such file, or one that was cut off (it can be made again).

    So it is, with a warning, where the file is damaged within or lacks one of the names.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except DAMAGED as error:
        warnings.warn(f"{path} is damaged, and what it held is made again: {error}.", stacklevel=3)
        return None
    return arrays


def keep(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays into the cache; a cache that cannot be written costs time, not the arrays: it only warns."""
    try:
        write_npz(path, arrays)
    except OSError as error:
        warnings.warn(
            f"the cache cannot be written, so the next load will be as slow as this one: {error}. "
            "Pass cache_dir=, or set MLSEC_JAX_CACHE, to a folder that can.",
            stacklevel=3,
        )
