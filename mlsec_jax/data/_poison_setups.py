"""The published set-ups of the poisoning benchmark (Schwarzschild et al., ICML 2021), and its data."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import numpy as np

from mlsec_jax import checks
from mlsec_jax.data._folders import tables_root


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
    """
    checks.one_of("kind", kind, ("transfer_learning", "from_scratch"))
    root = tables_root(data_dir)
    name = f"poisoning_benchmark_cifar10_{kind}.json"
    path = root / name if root else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"set-ups: expected {name} in the folder that MLSEC_JAX_DATA or data_dir names, got {path}. It holds "
            '{"setups": [{"target_class", "target_index", "base_class", "base_indices"}, ...]}, made from the pickles of '
            "github.com/aks2203/poisoning-benchmark."
        )
    setups = json.loads(path.read_text())["setups"]
    return [
        PoisonSetup(s["target_index"], s["target_class"], s["base_class"], np.asarray(s["base_indices"])) for s in setups
    ]


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
