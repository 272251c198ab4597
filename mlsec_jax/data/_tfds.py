"""Data sets prepared by tensorflow-datasets, read without TensorFlow and cached as plain arrays."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mlsec_jax.data._folders import cache_root, keep, read_npz, tfds_root

_CHUNK = 1024  # records decoded at a time: the decoded records of a chunk are all that is held twice
_OFFICIAL = {  # md5 of the files of images that these data sets were made from, whose records carry no id
    "mnist": {"train": "6bbc9ace898e44ae57da46a324031adb", "test": "2646ac647ad5339dbf082846283269ea"},
    "fashion_mnist": {"train": "f4a8712d7a061bf5bd6d2ca38dc4d50a", "test": "8181f5470baa50b63fa0f6fddb340f0a"},
}


def load(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    index: bool = False,
) -> tuple[np.ndarray, ...]:
    """Loads one split of a prepared data set: inputs as they are stored (uint8 images), labels as int32.

    The first call decodes every record through `tfds`'s random-access data source, which needs no TensorFlow; the
    arrays are then cached, so that later calls only read them (60,000 MNIST images: a few hundredths of a second).
    The cache knows the data set by its name, version, split *and* description, so that another copy of the same
    version (CIFAR-10 through JPEG, say) is never mistaken for it. Rows come in the order of the records. Nothing is
    ever downloaded.

    Args:
      name: as tfds spells it: `"mnist"`, `"cifar10:3.0.2"`, `"dataset/config"`. Without a version, the latest there.
      split: `"train"`, `"test"`, `"train[:1000]"`, ….
      data_dir: where the data sets are prepared; None for TFDS_DATA_DIR, or `~/tensorflow_datasets`.
      cache_dir: None for `cache_root()`.
      index: also return each row's number in the official order (that of torchvision and Keras), read from the record's
        id (`b"train_16399"` is 16399: CIFAR-10). The records of MNIST and Fashion-MNIST have none: there the order is
        recovered for a whole split, and held to the official file of images.

    Returns:
      `(x [n, ...], y [n])`, or `(x, y, index [n])`.

    Raises:
      FileNotFoundError: the data set is not prepared there; the message says how to prepare it.
      ValueError: no such split; an index that the records don't tell, or whose order is not the official one.
    """
    folder = _folder(name, data_dir)
    description = (folder / "dataset_info.json").read_bytes()
    stamp = hashlib.sha256(b"\0".join([folder.name.encode(), split.encode(), description])).hexdigest()[:16]
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name.split(':')[0]}-{folder.name}-{split}").strip("-")
    path = cache_root(cache_dir) / "data" / f"{stem}-{stamp}.npz"
    arrays = read_npz(path, ("x", "y"))
    if arrays is None:
        arrays = _decode(folder, split)
        keep(path, arrays)
    if not index:
        return arrays["x"], arrays["y"]
    numbers = arrays["index"] if "index" in arrays else _official_order(folder.parent.name, split, arrays["x"])
    return arrays["x"], arrays["y"], numbers


def _hashed_order(split: str, num_rows: int) -> np.ndarray:
    """The numbers of a split's rows `[n]` as tfds stores them: by the md5 of the split's name and the row's key, its number."""
    keys = [hashlib.md5(f"{split}{row}".encode(), usedforsecurity=False).digest() for row in range(num_rows)]
    return np.asarray(sorted(range(num_rows), key=keys.__getitem__), np.int32)


def _official_order(name: str, split: str, x: np.ndarray) -> np.ndarray:
    """Each stored row's official number `[n]`; raises unless the images so ordered are, byte for byte, the official file."""
    files = _OFFICIAL.get(name)
    if files is None:
        raise ValueError(f"index: expected records with ids such as 'train_16399', and those of {name!r} have none.")
    if split not in files:
        raise ValueError(f"index: expected a whole split of {name!r}, one of {sorted(files)}, got {split!r}.")
    numbers = _hashed_order(split, len(x))
    ordered = np.empty_like(x)
    ordered[numbers] = x
    found = hashlib.md5(struct.pack(">4I", 2051, *x.shape[:3]), usedforsecurity=False)  # the header of an IDX file
    found.update(ordered.data)
    if found.hexdigest() != files[split]:
        raise ValueError(
            f"index: the images of {name!r}, {split!r}, sorted back from the order of tfds's hash, are not the official "
            f"file (md5 {files[split]}, got {found.hexdigest()}): other pixels, or prepared with another hash."
        )
    return numbers


def _folder(name: str, data_dir: str | os.PathLike | None) -> Path:
    """The folder of the named version, or of the latest one that is prepared."""
    root = tfds_root(data_dir)
    path, _, version = name.partition(":")
    found = {
        tuple(map(int, info.parent.name.split("."))): info.parent
        for info in (root / path).glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name) and version in ("", info.parent.name)
    }
    if not found:
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {root}. Prepare it once, where there are TensorFlow and a network:\n"
            f"  pip install tensorflow-datasets tensorflow && "
            f"tfds build {path} --file_format=array_record --data_dir=DIR\n"
            "then set TFDS_DATA_DIR=DIR, or pass data_dir=DIR."
        )
    return found[max(found)]


def _decode(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Reads every record of the split into arrays."""
    import tensorflow_datasets as tfds  # half a second to import, and not needed once the arrays are cached

    builder = tfds.builder_from_directory(folder)
    unknown = set(re.findall(r"(?:^|\+)\s*(\w+)", split)) - set(builder.info.splits)
    if unknown or not split:
        raise ValueError(f"split: expected one of {sorted(builder.info.splits)} or a slice of it, got {split!r}.")
    if builder.info.supervised_keys is None:
        raise ValueError(f"name: expected a data set of inputs and labels, and {folder} names no supervised keys.")
    input_key, label_key = builder.info.supervised_keys
    source = builder.as_data_source(split=split)
    columns: dict[str, Any] = {}
    for start in range(0, len(source), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(source)))
        records = source.__getitems__(list(rows))
        named = {"x": [r[input_key] for r in records], "y": [r[label_key] for r in records]}
        if re.fullmatch(rb"[a-z]+_\d+", records[0].get("id", b"")):
            named["index"] = [int(record["id"].split(b"_")[1]) for record in records]
        for key, values in named.items():
            if len({np.shape(value) for value in values}) > 1:
                raise ValueError(f"name: expected inputs of one shape, and those in {folder} differ.")
            dtype = np.asarray(values[0]).dtype if key == "x" else np.int32
            column = columns.setdefault(key, np.empty((len(source), *np.shape(values[0])), dtype))
            column[rows.start : rows.stop] = values
    if not columns:
        raise ValueError(f"split: expected at least one record, got none in {split!r} of {folder}.")
    return columns
