"""What a person at a terminal reads of a run."""

import io
import re

import pytest
from rich.console import Console

from benchmarks import _record, _run
from benchmarks.__main__ import show
from benchmarks._record import Paper, Result


@pytest.mark.parametrize("width", [30, 200])
def test_what_is_shown_is_no_markup_and_no_name_is_cut(monkeypatch, tmp_path, width):
    name, text = "a_figure_with_the_longest_of_names", "rows of the [/held-out] part"
    console = Console(file=io.StringIO(), width=width, force_terminal=True)

    def function(size, seed, context):
        context.log(text)
        assert list(context.progress([1], text)) == [1]
        return Result({name: 1}, [text], {name: Paper(1, text)})

    monkeypatch.setattr(_record, "_registered", {})
    _record.benchmark(function, name="fake")
    show(_run.run("fake", size="small", seed=0, out=tmp_path, device="1 x cpu", console=console), console)
    said = re.sub(r"\x1b\[[\d;?]*\w", "", console.file.getvalue())  # no colours
    joined = re.sub(r"[\s│]", "", said)
    assert joined.count(re.sub(r"\s", "", text)) >= 2 and "[/held-out]" in said
    column = "".join(line.split("│")[1].strip() for line in said.splitlines() if line.count("│") == 5)
    assert column.endswith(name)
