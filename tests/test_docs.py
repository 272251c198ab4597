"""The documentation is true: it runs, it names everything, its tables are the catalogue's.

`python tests/test_docs.py` writes the tables anew.
"""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mlsec_jax
from mlsec_jax import catalogue

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BEGIN, END = "<!-- catalogue: begin -->\n", "<!-- catalogue: end -->\n"
MODULES = ["mlsec_jax", *(m.name for m in pkgutil.walk_packages(mlsec_jax.__path__, "mlsec_jax."))]
DIRECTIVES = re.findall(r"^::: ([\w.]+)$", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M)
SLOW = {"index.md", "gallery.md", "sharp-edges.md"}  # above 15 s on a busy core


def short_table():
    """The README's table: what fits on a screen of the catalogue's."""
    lines = ["| method | goal | knows | changes |", "| --- | --- | --- | --- |"]
    for row in catalogue.rows():
        lines.append(f"| {row.title} (`{row.name}`) | {', '.join(row.goal)} | {row.knowledge} box | {row.changes} |")
    return "\n".join(lines) + "\n"


TABLES = {ROOT / "README.md": short_table, DOCS / "threat-models.md": catalogue.markdown}


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_tables_are_the_catalogue(page):
    table = page.read_text().partition(BEGIN)[2].partition(END)[0]
    assert table == TABLES[page](), f"{page.name} is behind the catalogue: run `python tests/test_docs.py`"


@pytest.mark.parametrize("name", [name for name in MODULES if "._" not in name])
def test_every_public_name_is_in_the_api(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None)
    if names is None or name == "mlsec_jax":  # a single file stands there whole; the top re-exports `base`
        assert (name if names is None else "mlsec_jax.base") in DIRECTIVES
    else:
        assert [each for each in names if f"{name}.{each}" not in DIRECTIVES] == []


def test_the_api_names_nothing_twice_and_nothing_that_is_not_there():
    assert sorted(set(DIRECTIVES)) == sorted(DIRECTIVES)
    for name in DIRECTIVES:
        room, _, last = name.rpartition(".")
        assert name in MODULES or last in importlib.import_module(room).__all__, name


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def blocks(page):
    """The Python of a page; a block that includes a file is that file."""
    found = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [re.sub(r'^--8<-- "(.+)"$', lambda m: (DOCS / m[1]).read_text(), block, flags=re.M) for block in found]


PAGES = [page for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))] if "```python" in page.read_text()]
PAGES = [pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in SLOW else ()) for page in PAGES]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, capsys):
    scope = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec", dont_inherit=True), scope)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in MODULES if name.rpartition(".")[2] != "__main__"])
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


if __name__ == "__main__":
    for page, table in TABLES.items():
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
