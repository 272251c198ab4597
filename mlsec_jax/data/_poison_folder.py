"""Poisons as the published benchmark exchanges them (Schwarzschild et al., ICML 2021): three pickles in a folder.

`poisons.pickle` is a list of (PIL image, label), `base_indices.pickle` the rows that they replace, and `target.pickle`
an (image, label), or (image, label, patch, [x, y]) where a trigger is pasted at test time. They are read by an
unpickler that knows images and arrays only, so that a folder from a stranger cannot run code; tensors of PyTorch's become
arrays, without it.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mlsec_jax.data._folders import replacing

_ALLOWED = {("PIL.Image", "Image"), ("_codecs", "encode"), ("collections", "OrderedDict")}


class PoisonFolder(NamedTuple):
    """The content of a folder of poisons.

    Attributes:
      x: `[k, h, w, c]` uint8.
      y: `[k]` int32, the poisons' labels.
      base_indices: `[k]`, the rows of the official training set that they replace.
      target_x: `[h, w, c]` uint8.
      target_y: the target's true label.
      patch: `[c, h', w']` float in [0, 1], or None.
      corner: `(x, y)` of the patch's upper left corner, or None.
    """

    x: np.ndarray
    y: np.ndarray
    base_indices: np.ndarray
    target_x: np.ndarray
    target_y: int
    patch: np.ndarray | None = None
    corner: tuple[int, int] | None = None


_STORAGES = {"FloatStorage": "f4", "DoubleStorage": "f8", "ByteStorage": "u1", "LongStorage": "i8"}  # PyTorch's


class _Dtype:
    """A dtype of a stream: a number's, in one byte order or the other. NumPy's own would take fields and flags from it."""

    def __init__(self, name: str, *rest: Any):
        self.dtype = np.dtype(name)
        if not isinstance(name, str) or self.dtype.kind not in "biuf":
            raise ValueError(f"{name}: expected numbers only in a folder of poisons: refused.")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array of a stream, filled from its bytes."""

    array = np.zeros(0)

    def __init__(self, *rest: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        self.array = _numbers(content, dtype, shape, "F" if by_columns else "C")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array.astype(dtype or self.array.dtype)


def _numbers(content: Any, dtype: _Dtype, shape: Any = (), order: Any = "C", axes: Any = None) -> np.ndarray:
    flat = np.frombuffer(content, dtype.dtype)
    return flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)


class _Restricted(pickle.Unpickler):
    """Builds images, arrays and plain containers; any other name in the stream is refused."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy.core.", "numpy._core."), name:
            case "PIL.PngImagePlugin", "PngImageFile":
                return Image.Image  # it takes the same state, and opens no file
            case "numpy", "dtype":
                return _Dtype
            case ("numpy", "ndarray") | ("numpy._core.multiarray", "_reconstruct"):
                return _Array
            case "numpy._core.multiarray", "scalar":
                return lambda dtype, content: _numbers(content, dtype)
            case "numpy._core.numeric", "_frombuffer":
                return lambda content, *rest: _numbers(content, *rest)
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda *args: _tensor(*args)
            case "torch.storage", "_load_from_bytes":
                return lambda content: _storage(content)
            case "torch", storage if storage in _STORAGES:
                return _STORAGES[storage]
        if (module, name) not in _ALLOWED:
            raise ValueError(f"{module}.{name}: expected images and arrays only in a folder of poisons: refused.")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Of a storage of PyTorch's: its dtype."""
        return pid[1]


def _storage(content: bytes) -> np.ndarray:
    """The numbers of a storage of PyTorch's in its older format, which is how a tensor is pickled; without PyTorch.

    Five pickles (a magic number, a version, facts on the machine, the storage, its keys), the count in 8 bytes, the numbers.
    """
    stream = io.BytesIO(content)
    parts = [_Restricted(stream).load() for _ in range(5)]
    return np.frombuffer(stream.read()[8:], parts[3])


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> np.ndarray:
    """The array that a tensor shows of its storage."""
    places = np.full(size, offset)
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        places += step * np.arange(length).reshape(-1, *[1] * (len(size) - axis - 1))
    return storage[places]


def read_poisons(folder: str | os.PathLike) -> PoisonFolder:
    """Reads a folder of poisons; nothing in it is executed.

    Args:
      folder: holds `poisons.pickle`, `base_indices.pickle` and `target.pickle`.

    Raises:
      FileNotFoundError: one of the three is missing.
      ValueError: a file is no such pickle or names anything but images and arrays, or the parts do not belong together.
    """
    folder = Path(folder)
    x, y = _read(folder / "poisons.pickle", _poisons)
    indices = _read(folder / "base_indices.pickle", _indices)
    target = _read(folder / "target.pickle", _target)
    if len(x) != len(indices):
        raise ValueError(f"folder: expected a base for each of {len(x)} poisons, got {len(indices)}.")
    return PoisonFolder(x, y, indices, *target)


def _read(path: Path, parse: Callable[[Any], Any]) -> Any:
    """What the file holds, parsed; one error for all that a damaged pickle, or one of something else, can raise."""
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected {path}, one of the three files of a folder of poisons.")
    content = path.read_bytes()
    try:
        return parse(_Restricted(io.BytesIO(content)).load())
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise ValueError(f"folder: expected {path} as the published benchmark writes it, got another file ({reason}).") from error


def _poisons(content: Any) -> tuple[np.ndarray, np.ndarray]:
    """The images and the labels."""
    images = [_pixels(image) for image, _ in content]
    x = np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)
    return x, np.asarray([_label(label) for _, label in content], np.int32)


def _pixels(image: Any) -> np.ndarray:
    """An image as RGB bytes `[h, w, 3]`, PIL's or an array of bytes."""
    if not isinstance(image, Image.Image):
        image = _image(image)
    return np.asarray(image.convert("RGB"))


def _label(label: Any) -> int:
    """A label, also one that stands in an array of its own."""
    return int(np.asarray(label).reshape(()))


def _indices(content: Any) -> np.ndarray:
    """The rows."""
    indices = np.asarray(content).astype(np.int64)
    if indices.ndim != 1:
        raise ValueError(f"expected a list of rows, got shape {indices.shape}")
    return indices


def _target(content: Any) -> tuple[Any, ...]:
    """The image, its label, and the patch with its corner where there is one."""
    image, label, *trigger = content
    if not trigger or trigger[0] is None:
        return _pixels(image), _label(label)
    patch, (left, top) = trigger
    return _pixels(image), _label(label), np.asarray(patch), (int(left), int(top))


def write_poisons(folder: str | os.PathLike, poisons: PoisonFolder) -> None:
    """Writes a folder of poisons that the published benchmark scores.

    Args:
      folder: made if it is not there.
      poisons: floats in [0, 1] are rounded to the nearest of 256 levels, bytes are kept. Grey images, with one channel
        or no axis for it, are read back as RGB.
    """
    if len(poisons.x) != len(poisons.y) or len(poisons.x) != len(poisons.base_indices):
        sizes = [len(poisons.x), len(poisons.y), len(poisons.base_indices)]
        raise ValueError(f"poisons: expected as many images as labels and bases, got {sizes}.")
    if (poisons.patch is None) != (poisons.corner is None):
        raise ValueError(f"poisons: expected a patch with its corner, or neither, got corner {poisons.corner}.")
    images = [_image(x) for x in poisons.x]
    target: tuple = (_image(poisons.target_x), int(poisons.target_y))
    if poisons.patch is not None and poisons.corner is not None:
        target += (np.asarray(poisons.patch), [int(place) for place in poisons.corner])
    contents = {
        "poisons": [(image, int(label)) for image, label in zip(images, poisons.y, strict=True)],
        "base_indices": [int(row) for row in poisons.base_indices],
        "target": target,
    }
    for name, content in contents.items():
        with replacing(Path(folder) / f"{name}.pickle") as file:
            pickle.dump(content, file, protocol=4)


def _image(x: Any) -> Image.Image:
    """PIL's image, which has no axis for a single channel."""
    pixels = to_bytes(x)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def to_bytes(x: Any) -> np.ndarray:
    """Images in [0, 1] as uint8, rounded to the nearest; bytes stay bytes.

    A radius of whole levels (8/255) around an image of whole levels survives: rounding never crosses a level.

    >>> to_bytes(np.array([0.0, 0.5, 1.0])).tolist()
    [0, 128, 255]
    """
    x = np.asarray(x)
    if x.dtype == np.uint8:
        return x
    if not np.isfinite(x).all() or x.min(initial=0) < 0 or x.max(initial=0) > 1:
        raise ValueError("x: expected images in [0, 1].")
    return np.rint(np.asarray(x, np.float64) * 255).astype(np.uint8)
