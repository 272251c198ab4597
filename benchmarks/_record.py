"""What a benchmark is, what it returns, and the record that is written. Nothing here imports JAX."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape

SIZES = ("small", "full", "paper")
FIELDS = ("benchmark", "size", "seed", "device", "versions", "seconds", "reductions", "figures", "paper")
KINDS = {"benchmark": str, "size": str, "seed": int, "device": str, "versions": dict}
KINDS |= {"reductions": list, "figures": dict, "paper": dict}
STARTUP = ("seconds_starting", "seconds_compiling")  # beside `seconds`; records made before they existed lack them


class UsageError(Exception):
    """Something the caller can put right: the command line shows its message alone."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Ends the process with status 2 and the message, without a traceback, of what the caller can put right."""
    try:
        yield
    except (UsageError, FileNotFoundError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, not the words of a loader that says how to prepare the data
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from error


class Paper(NamedTuple):
    """A published number, and where it stands."""

    value: float
    source: str


@dataclass(frozen=True)
class Result:
    """What a benchmark returns.

    Attributes:
      figures: finite numbers by key.
      reductions: every way in which this run is smaller than the paper's, one sentence each.
      paper: the published number for some of the keys.
    """

    figures: Mapping[str, Any]
    reductions: Sequence[str] = ()
    paper: Mapping[str, Paper] = field(default_factory=dict)


class Benchmark(NamedTuple):
    """A registered benchmark: `run(size, seed, context) -> Result`; whether it heeds `context.bfloat16`."""

    name: str
    run: Callable[[str, int, Any], Result]
    bfloat16: bool = False


_registered: dict[str, Benchmark] = {}


def benchmark(run: Callable | None = None, *, name: str | None = None, bfloat16: bool = False) -> Any:
    """Registers `run(size, seed, context) -> Result` under its file's name, or another."""
    if run is None:
        return lambda function: benchmark(function, name=name, bfloat16=bfloat16)
    name = name or run.__module__.rpartition(".")[2]
    _registered[name] = Benchmark(name, run, bfloat16)
    return run


def summaries() -> dict[str, str]:
    """Every benchmark's name and the first line of its file's docstring; nothing is imported."""
    folder = Path(__file__).parent
    found = {name: (entry.run.__doc__ or "").partition("\n")[0] for name, entry in _registered.items()}
    for module in pkgutil.iter_modules([str(folder)]):
        if not module.ispkg and not module.name.startswith("_"):
            text = (folder / f"{module.name}.py").read_text(encoding="utf-8")
            found[module.name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return dict(sorted(found.items()))


def check_names(names: Sequence[str]) -> None:
    """Raises on a name that no benchmark has; nothing is imported."""
    unknown = [name for name in names if name not in summaries()]
    if unknown:
        raise UsageError(f"unknown benchmark {', '.join(unknown)}; there are: {', '.join(summaries()) or 'none'}.")


def find(name: str) -> Benchmark:
    """The benchmark of that name; imports its file."""
    check_names([name])
    if name not in _registered:
        importlib.import_module(f"benchmarks.{name}")
    if name not in _registered:
        raise UsageError(f"benchmarks/{name}.py registers no benchmark: decorate its run function with @benchmark.")
    return _registered[name]


def check_bfloat16(names: Sequence[str]) -> None:
    """Raises on a benchmark that cannot compute in bfloat16; imports their files."""
    unfit = [name for name in names if not find(name).bfloat16]
    if unfit:
        raise UsageError(f"--bf16: expected benchmarks that heed it, got {', '.join(unfit)}, which do not.")


def checked(result: Result) -> dict[str, Any]:
    """The result's part of the record: plain numbers, all finite; raises naming what is not."""
    figures = {key: _number(f"figures[{key!r}]", value) for key, value in result.figures.items()}
    if not figures:
        raise ValueError("figures: expected at least one, got none.")
    bad = [key for key in figures if not re.fullmatch(r"\w+", key)]
    if bad:
        raise ValueError(f"figures: expected keys of letters, digits and underscores, got {bad}.")
    unknown = sorted(set(result.paper) - set(figures))
    if unknown:
        raise ValueError(f"paper: expected keys that are figures too, got {unknown}.")
    if isinstance(result.reductions, str) or not all(isinstance(text, str) for text in result.reductions):
        raise ValueError(f"reductions: expected a list of sentences, got {result.reductions!r}.")
    paper = {}
    for key, published in result.paper.items():
        value, source = published
        if not isinstance(source, str) or not source:
            raise ValueError(f"paper[{key!r}]: expected a source, got {source!r}.")
        paper[key] = {"value": _number(f"paper[{key!r}]", value), "source": source}
    return {"reductions": list(result.reductions), "figures": figures, "paper": paper}


def _number(name: str, value: Any) -> int | float:
    """The value as a plain number, if it is a finite one."""
    array = np.asarray(value)
    if array.ndim != 0 or array.dtype.kind not in "iuf" or not np.isfinite(array):
        raise ValueError(f"{name}: expected a finite number, got {value!r}.")
    return array.item()


def writable(folder: Path) -> None:
    """Raises unless files can be made in the folder, which is created: asked before hours of computing, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--out: cannot write to {folder}: {error}.") from error


def check_replaceable(folder: Path, names: Sequence[str], size: str, seed: int) -> None:
    """Raises where a run would replace a record of another size or seed, which may have taken hours."""
    for name in names:
        path = folder / f"{name}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # none, or damaged: nothing is lost
        there = (record.get("size"), record.get("seed")) if isinstance(record, dict) else (size, seed)
        if there != (size, seed):
            raise UsageError(
                f"--out: {path} is a record of size {there[0]} and seed {there[1]}, which size {size} and seed {seed} "
                "would replace: pass --force, or another --out."
            )


def replace_file(path: Path, content: bytes) -> None:
    """Writes the file so that it is never half there: to a temporary name beside it, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # mkstemp's would be readable by its owner only
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(folder: Path, record: Mapping[str, Any]) -> Path:
    """Writes `NAME.json`."""
    path = folder / f"{record['benchmark']}.json"
    replace_file(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    return path


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder by name; files that are no records raise."""
    records = [_read(path) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise UsageError(f"--out: no record in {folder}; `python -m benchmarks run NAME --out {folder}` makes one.")
    return records


def _read(path: Path) -> dict[str, Any]:
    """The record of a file; raises naming the file and what is wrong with it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"expected an object, got {type(record).__name__}")
        missing = [key for key in FIELDS if key not in record]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for key, kind in KINDS.items():
            if not isinstance(record[key], kind) or isinstance(record[key], bool):
                raise ValueError(f"{key}: expected {kind.__name__}, got {record[key]!r}")
        if not re.fullmatch(r"[\w-]+", record["benchmark"]):
            raise ValueError(f"benchmark: expected letters, digits, underscores and dashes, got {record['benchmark']!r}")
        if not all(isinstance(text, str) for text in record["versions"].values()):
            raise ValueError(f"versions: expected strings, got {record['versions']!r}")
        published = record["paper"].items()
        bad = [key for key, each in published if not isinstance(each, dict) or {*each} != {"value", "source"}]
        if bad:
            raise ValueError(f"paper: expected a value and a source each, got others for {', '.join(bad)}")
        _number("seconds", record["seconds"])
        paper = {key: Paper(each["value"], each["source"]) for key, each in published}
        checked(Result(record["figures"], record["reductions"], paper))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a benchmark's record: {str(error).rstrip('.')}.") from error
    return record
