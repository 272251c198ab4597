"""How rows of the catalogue are found and shown."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from mlsec_jax.catalogue._attacks import ATTACKS
from mlsec_jax.catalogue._defenses import DEFENSES
from mlsec_jax.catalogue._method import Capability, Goal, Knowledge, Method, Stage, Trigger, one_of


def one_a_name(rows: Iterable[Method]) -> tuple[Method, ...]:
    """The rows, if no name has two."""
    rows = tuple(rows)
    twice = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)}: expected one row a method, got two.")
    return rows


_ROWS = one_a_name((*ATTACKS, *DEFENSES))


def rows() -> tuple[Method, ...]:
    """All rows, attacks first."""
    return _ROWS


def find(**filters: Any) -> tuple[Method, ...]:
    """The rows whose fields have the given values; `goal` matches any of a row's goals.

    >>> [method.title for method in find(name="attacks.metapoison")]
    ['MetaPoison']
    """
    known = {field.name for field in dataclasses.fields(Method)}
    unknown = sorted(set(filters) - known)
    if unknown:
        raise ValueError(f"filters: expected fields of a row ({', '.join(sorted(known))}), got {unknown}.")
    for field, words in (("goal", Goal), ("capability", Capability), ("knowledge", Knowledge), ("stage", Stage)):
        if field in filters:
            one_of("filters", field, filters[field], words)
    for field in {"train_trigger", "test_trigger"} & set(filters):
        one_of("filters", field, filters[field], Trigger)

    def matches(row: Method) -> bool:
        return all(
            value in row.goal if field == "goal" else getattr(row, field) == value for field, value in filters.items()
        )

    return tuple(row for row in rows() if matches(row))


def markdown(chosen: Iterable[Method] | None = None) -> str:
    """The rows as a Markdown table, for the documentation; all of them unless some are given."""
    head = ("method", "goal", "holds", "knows", "trigger (training / test)", "when", "changes", "budget", "reference")
    lines = [head, ("---",) * len(head)]
    for row in rows() if chosen is None else chosen:
        trigger = f"{row.train_trigger} / {row.test_trigger}"
        what = f"{row.title} (`{row.name}`)"
        which = (", ".join(row.goal), row.capability, row.knowledge, trigger, row.stage)
        lines.append((what, *which, row.changes, row.budget, row.reference))
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
