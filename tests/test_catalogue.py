"""The catalogue: its words are closed, its filters filter, its table is a table."""

import dataclasses

import pytest

from mlsec_jax import catalogue
from mlsec_jax.catalogue import _find

ISSUE = ["availability", "targeted", "error_specific", "svm_kkt", "influence_images", "kkt_sanitized", "metapoison"]
ISSUE += ["bilevel", "linear_regression", "flip_random", "flip_margin", "flip_greedy", "flip_alfa"]
ROW = catalogue.rows()[0]


def test_holds_the_methods_of_the_main_job_once_each():
    names = [row.name for row in catalogue.rows()]
    assert {f"attacks.{name}" for name in ISSUE} <= set(names) and len(names) == len(set(names))
    assert all(row.goal == tuple(dict.fromkeys(row.goal)) for row in catalogue.rows())


@pytest.mark.parametrize(
    "field, value",
    [
        ("goal", ("fame",)),
        ("goal", "integrity"),
        ("goal", ()),
        ("capability", "telepathy"),
        ("knowledge", "blue"),
        ("train_trigger", "loud"),
        ("test_trigger", None),
        ("stage", "never"),
        ("budget", ""),
        ("reference", None),
    ],
)
def test_words_are_closed(field, value):
    with pytest.raises(ValueError, match=rf"{ROW.name}: expected {field} to be"):
        dataclasses.replace(ROW, **{field: value})


def test_a_second_row_of_a_name_is_refused():
    with pytest.raises(ValueError, match="expected one row a method"):
        _find.one_a_name((ROW, ROW))


def test_find_filters_and_refuses_typos():
    assert catalogue.find() == catalogue.rows()
    found = catalogue.find(goal="integrity", knowledge="white")
    assert set(found) == {row for row in catalogue.rows() if "integrity" in row.goal and row.knowledge == "white"}
    assert 0 < len(found) < len(catalogue.rows())
    assert catalogue.find(goal="privacy") == ()
    for filters in ({"goals": "integrity"}, {"goal": "Integrity"}, {"stage": "later"}, {"test_trigger": "maybe"}):
        with pytest.raises(ValueError, match="filters: expected"):
            catalogue.find(**filters)


def test_markdown_has_a_line_a_row_and_as_many_cells_in_each():
    piped = dataclasses.replace(ROW, title="a | b")
    lines = catalogue.markdown([piped, *catalogue.rows()]).splitlines()
    assert len(lines) == len(catalogue.rows()) + 3
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "a \\| b" in lines[2] and catalogue.markdown(()).count("\n") == 2
