"""Tiny validators: they say what was expected, what came, and the argument's name. They skip tracers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_concrete(value: Any) -> bool:
    """Whether the value can be looked at now: no tracer, and no array of which other processes hold a part."""
    seen = lambda leaf: not isinstance(leaf, jax.core.Tracer) and getattr(leaf, "is_fully_addressable", True)
    return all(map(seen, jax.tree.leaves(value)))


def at_least(name: str, value: Any, low: float) -> None:
    """Raises unless `value >= low`; NaN fails. Tracers pass."""
    if is_concrete(value) and not np.all(np.asarray(value) >= low):
        raise ValueError(f"{name}: expected at least {low}, got {value}.")


def above(name: str, value: Any, low: float) -> None:
    """Raises unless `value > low`; NaN fails. Tracers pass."""
    if is_concrete(value) and not np.all(np.asarray(value) > low):
        raise ValueError(f"{name}: expected more than {low}, got {value}.")


def between(name: str, value: Any, low: float, high: float) -> None:
    """Raises unless `low <= value <= high`; NaN fails. Tracers pass."""
    if is_concrete(value):
        array = np.asarray(value)
        if not np.all((array >= low) & (array <= high)):
            raise ValueError(f"{name}: expected between {low} and {high}, got {value}.")


def floating(name: str, value: Any) -> None:
    """Raises unless the inputs are floating: raw bytes are neither scaled nor differentiable."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating inputs, got {value.dtype}: scale images to [0, 1] first (x / 255).")


def integer_labels(name: str, y: Any) -> None:
    """Raises unless the labels are integers, one a row."""
    if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integer labels [n], got {y.dtype}{y.shape}.")


def single_labels(name: str, y: Any) -> None:
    """Raises unless there is one label a row, `[n]`, of whatever kind: -1 and 1 may be floats."""
    if y.ndim != 1:
        raise ValueError(f"{name}: expected one label a row, [n], got shape {y.shape}.")


def box(lo: Any, hi: Any) -> None:
    """Raises unless `lo <= hi`; NaN fails. Tracers pass."""
    if is_concrete((lo, hi)) and not np.all(np.asarray(lo) <= np.asarray(hi)):
        raise ValueError(f"lo: expected at most hi, got {lo} and {hi}.")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """What is raised about `data` in this context is told of the argument that the caller gave.

    >>> with naming("known.goal"):
    ...     labels("data.y", np.array([7]), np.ones(1), 2)
    Traceback (most recent call last):
    ...
    ValueError: known.goal.y: expected labels in [0, 2), got 7 to 7.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("data."):
            raise
        raise ValueError(name + str(error).removeprefix("data")) from error


def one_of(name: str, value: Any, options: tuple[Any, ...]) -> None:
    """Raises unless the value is one of the options."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}.")


def count(name: str, value: Any, low: int = 0) -> None:
    """Raises unless the value is a Python integer of at least `low` (counts are static)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}.")


def rows(name: str, value: Any) -> Any:
    """The rows `[k]` that an argument names: of an integer k the last k, as `[-k, ..., -1]`. Tracers pass as they are.

    >>> rows("rows", 2), rows("rows", [])
    (array([-2, -1], dtype=int32), array([], dtype=int32))
    """
    if isinstance(value, (int, np.integer)):
        count(name, value)
        return np.arange(-int(value), 0, dtype=np.int32)
    if not is_concrete(value):
        return jnp.asarray(value)
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected integer rows [k] or a Python integer, got {array.dtype}{array.shape}.")
    return array if array.size else array.astype(np.int32)


def rows_within(name: str, chosen: Any, num_rows: int, *, repeated: bool = False) -> None:
    """Raises unless what `rows` gave are rows of data of `num_rows` rows, each once or `repeated`. Tracers pass."""
    if not is_concrete(chosen):
        return
    if chosen.size > num_rows and not repeated:
        raise ValueError(f"{name}: expected at most the {num_rows} rows of the data, got {chosen.size}.")
    bad = chosen[(chosen < -num_rows) | (chosen >= num_rows)].tolist()
    if bad:
        raise ValueError(
            f"{name}: expected rows of the data, {-num_rows} to {num_rows - 1} (threat.reserve appends some), got {bad}."
        )
    found, times = np.unique(np.asarray(chosen, np.int64) % max(num_rows, 1), return_counts=True)
    if np.any(times > 1) and not repeated:
        raise ValueError(f"{name}: expected each row once, got {found[times > 1].tolist()} more than once.")


def reserved(name: str, chosen: Any, weight: Any) -> None:
    """Raises unless the chosen rows are absent, so that poisons may fill them. Tracers pass."""
    if is_concrete((chosen, weight)):
        taken = int(np.sum(np.asarray(weight)[np.asarray(chosen)] > 0))
        if taken:
            raise ValueError(
                f"{name}: expected {np.size(chosen)} reserved rows (weight 0), got {taken} that are in "
                "use: the poison budget is larger than the reserve (threat.reserve)."
            )


def num_present(value: Any) -> int:
    """How many rows of a `Data` have positive weight; traced, as many as there are."""
    return int((np.asarray(value.weight) > 0).sum()) if is_concrete(value.weight) else value.num_rows


def labels(name: str, y: Any, weight: Any, num_classes: int) -> None:
    """Raises if a row of positive weight has an integer label outside `[0, num_classes)`. Tracers pass."""
    if is_concrete((y, weight)):
        seen = np.asarray(y)[np.asarray(weight) > 0]
        if seen.size and seen.dtype.kind in "iu" and (seen.min() < 0 or seen.max() >= num_classes):
            raise ValueError(f"{name}: expected labels in [0, {num_classes}), got {seen.min()} to {seen.max()}.")


def binary(name: str, y: Any, weight: Any) -> None:
    """Raises unless the labels of present rows are in {0, 1}, or in {-1, +1}. Tracers pass."""
    if is_concrete((y, weight)):
        found = np.unique(np.asarray(y)[np.asarray(weight) > 0]).tolist()
        if y.ndim != 1 or not (set(found) <= {0, 1} or set(found) <= {-1, 1}):
            raise ValueError(f"{name}: expected labels {{0, 1}} or {{-1, +1}}, [n], got {found[:5]} of shape {y.shape}.")


def finite(name: str, value: Any, weight: Any) -> None:
    """Raises if a row of positive weight holds NaN or infinity, in any leaf `[n, ...]`. Tracers pass."""
    if not is_concrete((value, weight)):
        return
    present = np.flatnonzero(np.asarray(weight) > 0)
    for leaf in jax.tree.leaves(value):
        array = np.asarray(leaf)
        bad = present[~np.isfinite(array[present]).all(axis=tuple(range(1, array.ndim)))]
        if bad.size:
            raise ValueError(f"{name}: expected finite values, got NaN or infinity in {bad.size} rows (first: {bad[0]}).")


def data(name: str, value: Any, num_classes: int | None = None) -> None:
    """Raises on NaN, labels out of range, negative weights, or no row of positive weight. Host border only.

    Rows of weight 0 may hold anything: they are absent.

    Args:
      name: the argument's name, for the message.
      value: a `Data`.
      num_classes: if given, integer labels must lie in `[0, num_classes)` and each class must have a row.
    """
    if not is_concrete(value):
        return
    weight = np.asarray(value.weight)
    if not np.all(np.isfinite(weight)) or np.any(weight < 0):
        raise ValueError(f"{name}.weight: expected finite and non-negative, got {weight.min()} to {weight.max()}.")
    present = weight > 0
    if not present.any():
        raise ValueError(f"{name}: expected at least one row of positive weight, got none in {weight.size} rows.")
    finite(f"{name}.x", value.x, weight)
    seen = np.asarray(value.y)[present]
    if seen.dtype.kind == "f" and not np.isfinite(seen).all():
        raise ValueError(f"{name}.y: expected finite values, got NaN or infinity.")
    if num_classes is not None and seen.dtype.kind in "iu":
        labels(f"{name}.y", value.y, value.weight, num_classes)
        empty = np.setdiff1d(np.arange(num_classes), seen)
        if empty.size:
            raise ValueError(f"{name}.y: expected at least one row of each class, got none of {empty.tolist()}.")
