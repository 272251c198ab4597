"""All records of a folder as one page that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


def number(value: float) -> str:
    """A figure as people read it: whole numbers whole, others to four digits.

    >>> number(7850), number(0.123456), number(1e-9)
    ('7,850', '0.1235', '1e-09')
    """
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4g}"


def page(records: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The HTML of the records, with the plots found beside them inside it."""
    style = (Path(__file__).parent / "_report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{escape(r["benchmark"])}">{escape(r["benchmark"])}</a>' for r in records)
    sections = "".join(_section(record, sorted(folder.glob(f"{record['benchmark']}.*.png"))) for record in records)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>mlsec_jax: paper and ours</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        "<h1>Paper and ours, side by side</h1>\n"
        f"<p class=\"meta\">{len(records)} benchmark{'s' * (len(records) != 1)} of mlsec_jax. "
        "Every figure was computed by one run; what that run left out is listed beside it.</p>\n"
        f"<nav>{links}</nav>\n<main>\n{sections}</main>\n</body>\n</html>\n"
    )


def _section(record: Mapping[str, Any], plots: Sequence[Path]) -> str:
    """One record."""
    name = escape(record["benchmark"])
    facts = " · ".join(
        [
            f"size {escape(record['size'])}",
            f"seed {record['seed']}",
            f"{record['seconds']:,.1f} s",
            escape(record["device"]),
        ]
    )
    reductions = "".join(f"<li>{escape(text)}</li>" for text in record["reductions"])
    versions = ", ".join(f"{escape(key)} {escape(value)}" for key, value in record["versions"].items())
    return (
        f'<section id="{name}">\n<h2><a href="#{name}">{name}</a></h2>\n<p class="meta">{facts}</p>\n'
        '<div class="scroll"><table>\n<thead><tr><th>figure</th><th class="n">paper</th><th class="n">ours</th>'
        f"<th>source</th></tr></thead>\n<tbody>\n{_rows(record)}</tbody>\n</table></div>\n"
        + (f"<p>Reduced from the paper:</p>\n<ul>{reductions}</ul>\n" if reductions else "")
        + "".join(_plot(path) for path in plots)
        + f"<details><summary>versions</summary><p class=\"meta\">{versions}</p></details>\n</section>\n"
    )


def _rows(record: Mapping[str, Any]) -> str:
    """One table row a figure."""
    rows = []
    for key, value in record["figures"].items():
        published = record["paper"].get(key)
        theirs, source = (number(published["value"]), escape(published["source"])) if published else ("–", "")
        rows.append(
            f'<tr><td><code>{escape(key)}</code></td><td class="n">{theirs}</td>'
            f'<td class="n ours">{number(value)}</td><td class="source">{source}</td></tr>\n'
        )
    return "".join(rows)


def _plot(path: Path) -> str:
    """A plot, inlined."""
    caption = escape(path.name.split(".")[1].replace("_", " ").replace("-", " "))
    image = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{image}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )
