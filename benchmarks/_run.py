"""Running one benchmark: its context, its record, its plots, and the items that survive an interruption."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from benchmarks import _machine, _record
from mlsec_jax.data import _folders

_SECONDS = "seconds_of_item"


class Context:
    """What a benchmark is handed beside its size and seed.

    Attributes:
      name: the benchmark's.
      size: `small`, `full` or `paper`.
      seed: the run's.
      key: the run's key, made from the seed.
      out: the folder of the record, for what `save_figure` does not cover.
      bfloat16: whether networks compute in bfloat16.
      restored_seconds: what the items taken over from an interrupted run took there.
    """

    def __init__(
        self,
        name: str,
        size: str,
        seed: int,
        out: Path,
        fingerprint: str,
        console: Console | None = None,
        bfloat16: bool = False,
    ):
        self.name, self.size, self.seed, self.out, self.bfloat16 = name, size, seed, out, bfloat16
        self.key = jax.random.key(seed)
        self.restored_seconds = 0.0
        self._parts = out / f"{name}.parts" / f"{size}-{seed}-{fingerprint}"
        self._console = console or Console(stderr=True)
        self._figures: set[str] = set()

    def log(self, message: str) -> None:
        """Says something to the person who waits."""
        self._console.print(message, highlight=False, markup=False)

    def progress(self, items: Iterable, label: str) -> Iterator:
        """The items, with a progress bar on a terminal."""
        quiet = not self._console.is_terminal
        yield from track(items, description=escape(f"{self.name}: {label}"), console=self._console, disable=quiet)

    def once(self, item: str, fn: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Computes an item unless an interrupted run of the same size, seed, code, device and data has finished it.

        Args:
          item: its name, different for each (`"split-3"`).
          fn: `() -> dict` of numbers, strings or arrays.

        Returns:
          The dict with NumPy arrays, and plain numbers for scalars: the same whether computed or taken over.
        """
        _check_name("item", item)
        path = self._parts / f"{item}.npz"
        stored = _folders.read_npz(path, (_SECONDS,))
        if stored is None:
            start = time.perf_counter()
            arrays = {key: np.asarray(value) for key, value in fn().items()}
            bad = [key for key, value in arrays.items() if value.dtype.kind not in "biufU" or key == _SECONDS]
            if bad:
                raise ValueError(f"{item}: expected numbers, strings or arrays of them, got something else in {bad}.")
            stored = {**arrays, _SECONDS: np.asarray(time.perf_counter() - start)}
            _folders.write_npz(path, stored)
        else:
            self.restored_seconds += float(stored[_SECONDS])
        return {k: v if v.ndim else v.item() for k, v in stored.items() if k != _SECONDS}

    def save_figure(self, figure: Any, name: str) -> Path:
        """Writes a matplotlib figure as `BENCHMARK.NAME.png`, and closes it."""
        import matplotlib.pyplot as plt

        _check_name("name", name)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=144, bbox_inches="tight")
        plt.close(figure)
        path = self.out / f"{self.name}.{name}.png"
        _record.replace_file(path, image.getvalue())
        self._figures.add(path.name)
        return path

    def finish(self) -> None:
        """Removes what the written record makes needless: this run's items, and plots that an earlier run left."""
        shutil.rmtree(self._parts, ignore_errors=True)
        if self._parts.parent.is_dir() and not any(self._parts.parent.iterdir()):
            self._parts.parent.rmdir()
        for path in self.out.glob(f"{self.name}.*.png"):
            if path.name not in self._figures:
                path.unlink()


def run(
    name: str,
    *,
    size: str,
    seed: int,
    out: Path,
    device: str,
    console: Console | None = None,
    started: float | None = None,
    bfloat16: bool = False,
) -> dict[str, Any]:
    """Runs a benchmark and writes its record and plots.

    Args:
      name: the benchmark's.
      size: `small`, `full` or `paper`.
      seed: the run's.
      out: where the record goes; asked for writing first.
      device: the device's name, for the record.
      console: for what is said meanwhile; None for standard error.
      started: `time.perf_counter()` when the command began; None for now.
      bfloat16: compute networks in bfloat16, which not every benchmark can; the record says so with the device.

    Returns:
      The record. `seconds` is the benchmark's own time, `seconds_starting` what came before it (imports, the device),
      and `seconds_compiling` the part of `seconds` in which this process traced and compiled, or read the cache.
    """
    started = time.perf_counter() if started is None else started
    entry = _record.find(name)
    _record.writable(out)
    if bfloat16:
        _record.check_bfloat16([name])
        device = f"{device}, networks in bfloat16"
    context = Context(name, size, seed, out, _machine.fingerprint(device), console, bfloat16)
    start = time.perf_counter()
    with _machine.compiling() as seconds_compiling:
        result = entry.run(size, seed, context)
    seconds = time.perf_counter() - start + context.restored_seconds
    head = {"benchmark": name, "size": size, "seed": seed, "device": device, "versions": _machine.versions()}
    spent = (seconds, start - started, seconds_compiling())
    times = {key: round(value, 3) for key, value in zip(("seconds", *_record.STARTUP), spent)}
    record = {**head, **times, **_record.checked(result)}
    _record.write(out, record)
    context.finish()
    return record


def _check_name(what: str, name: str) -> None:
    """File names are made of these: letters, digits, underscores and dashes."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{what}: expected letters, digits, underscores and dashes, got {name!r}.")
