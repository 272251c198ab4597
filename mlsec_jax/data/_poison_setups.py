"""The published set-ups of the poisoning benchmark (Schwarzschild et al., ICML 2021), and its data."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import numpy as np

from mlsec_jax import checks
from mlsec_jax.data._folders import tables_root

_HOLDS = '{"setups": [{"target_class", "target_index", "base_class", "base_indices"}, ...]}'


class PoisonSetup(NamedTuple):
    """One trial of the benchmark.

    Attributes:
      target_index: of the target, in the official CIFAR-10 test order.
      target_class: its true label.
      base_class: the poisons' label, which the target is to be taken for.
      base_indices: `[k]`, of the images that are perturbed, in the official training order.
    """

    target_index: int
    target_class: int
    base_class: int
    base_indices: np.ndarray


def poison_setups(kind: str, *, data_dir: str | os.PathLike | None = None) -> list[PoisonSetup]:
    """The benchmark's 100 set-ups.

    Args:
      kind: "transfer_learning" (25 bases of 2,500 rows) or "from_scratch" (500 of 50,000).
      data_dir: the folder of `poisoning_benchmark_cifar10_{kind}.json`; None for MLSEC_JAX_DATA.

    Raises:
      FileNotFoundError: the folder or the file is missing; the message says what it has to hold.
      ValueError: the file is damaged, or lacks a part.
    """
    checks.one_of("kind", kind, ("transfer_learning", "from_scratch"))
    root = tables_root(data_dir)
    name = f"poisoning_benchmark_cifar10_{kind}.json"
    path = root / name if root else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"set-ups: expected {name} in the folder that MLSEC_JAX_DATA or data_dir names, got {path}. It holds {_HOLDS}, "
            "made from the pickles of github.com/aks2203/poisoning-benchmark."
        )
    content = path.read_bytes()
    try:
        return [_setup(entry) for entry in json.loads(content)["setups"]]
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"set-ups: expected {path} to hold {_HOLDS}, got a damaged or another file ({reason}).") from error


def _setup(entry: dict[str, Any]) -> PoisonSetup:
    """The set-up, if its numbers are whole ones."""
    target_index, target_class, base_class = numbers = [entry[name] for name in ("target_index", "target_class", "base_class")]
    indices = np.asarray(entry["base_indices"])
    if indices.ndim != 1 or indices.dtype.kind != "i" or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"expected whole numbers, got {numbers} and bases of {indices.dtype}{list(indices.shape)}")
    return PoisonSetup(target_index, target_class, base_class, indices)


def fine_tuning_rows(labels: np.ndarray, setup: PoisonSetup, *, num_rows: int = 2500) -> np.ndarray:
    """The rows that the benchmark fine-tunes on: bases first, then the first images of each class in official order.

    Args:
      labels: `[n]` of the official training order.
      setup: whose bases are left out of the clean rows and stand first, in place of as many of their class.
      num_rows: of the result.

    Returns:
      `[num_rows]` row numbers in the official training order; the first `len(base_indices)` are the bases.

    Raises:
      ValueError: num_rows does not divide among the classes, or a class has too few rows, or more bases than its share.
    """
    classes, found = np.unique(labels, return_counts=True)
    each = num_rows // len(classes)
    if each * len(classes) != num_rows or each > found.min() or len(setup.base_indices) > each:
        raise ValueError(
            f"num_rows: expected a multiple of the {len(classes)} classes, for each between the {len(setup.base_indices)} "
            f"bases and the {found.min()} rows that there are, got {num_rows}."
        )
    free = np.ones(len(labels), bool)
    free[setup.base_indices] = False
    parts = [setup.base_indices]
    for label in classes:
        quota = each - (len(setup.base_indices) if label == setup.base_class else 0)
        parts.append(np.flatnonzero((labels == label) & free)[:quota])
    return np.concatenate(parts)
