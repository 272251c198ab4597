"""What the command line refuses, and with which words, and what a run does not take over; all in this process."""

import json
import runpy

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import _machine, _record, just_how_toxic
from benchmarks.__main__ import app
from benchmarks._record import Result
from mlsec_jax import data


@pytest.fixture
def fake(monkeypatch):
    """Registers functions as benchmarks for one test, on a device that needs no start."""
    monkeypatch.setattr(_record, "_registered", {})
    monkeypatch.setattr(_machine, "choose", lambda device, devices: None)
    monkeypatch.setattr(_machine, "start", lambda device: "1 x cpu")
    monkeypatch.setattr(_machine, "versions", lambda: {"jax": "0"})  # seconds a run
    monkeypatch.setattr(_machine, "fingerprint", lambda device: "code")
    return lambda function, name="fake", **options: _record.benchmark(function, name=name, **options)


def cli(*arguments):
    """The exit status, and all that was said, as one line."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    return done, " ".join(done.output.split())


def test_missing_data_are_said_without_a_traceback(fake, tmp_path):
    def function(size, seed, context):
        raise FileNotFoundError("data set 'mnist' is not prepared: it should hold X [n, 32, 32] and mlsec_jax[bench].")

    fake(function)
    done, said = cli("run", "fake", "--out", tmp_path)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert said.endswith("error: data set 'mnist' is not prepared: it should hold X [n, 32, 32] and mlsec_jax[bench].")
    fake(lambda size, seed, context: (tmp_path / "not there").read_text())  # a mistake of the benchmark's own keeps its traceback
    assert isinstance(cli("run", "fake", "--out", tmp_path)[0].exception, FileNotFoundError)


def test_a_record_of_another_size_or_seed_is_replaced_only_by_force(fake, tmp_path):
    fake(lambda size, seed, context: Result({"x": seed}))
    fake(lambda size, seed, context: pytest.fail("computed"), name="never")
    run = lambda *arguments: cli("run", *arguments, "--out", tmp_path)
    path = tmp_path / "fake.json"
    assert run("fake", "--size", "full")[0].exit_code == 0
    first = path.read_bytes()
    for arguments in (("fake",), ("fake", "--size", "full", "--seed", 1), ("never", "fake")):
        done, said = run(*arguments)
        assert done.exit_code == 2 and path.read_bytes() == first, said
        assert "fake.json is a record of size full and seed 0" in said and "pass --force, or another --out." in said
    assert run("fake", "--size", "full")[0].exit_code == 0  # the same again, as `make demo`
    assert run("fake", "--seed", 1, "--force")[0].exit_code == 0 and path.read_bytes() != first
    path.write_text("{")
    assert run("fake")[0].exit_code == 0  # a damaged one is no loss


WHOLE = {"benchmark": "fake", "size": "small", "seed": 0, "device": "1 x cpu", "versions": {"jax": "0"}, "seconds": 1.5}
WHOLE |= {"reductions": ["tiny"], "figures": {"x": 1}, "paper": {"x": {"value": 1, "source": "here"}}}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "Expecting value"),
        (json.dumps(WHOLE)[:50].encode(), "line 1 column"),
        (b"\xff\xfe", "decode"),
        (b"null", "expected an object, got NoneType"),
        (b"[]", "expected an object, got list"),
        (b"{}", "it lacks benchmark, size"),
        *[
            (json.dumps({**WHOLE, key: value}).encode(), message)
            for key, value, message in [
                ("size", 3, "size: expected str, got 3"),
                ("benchmark", "/abs", "benchmark: expected letters, digits, underscores and dashes, got '/abs'"),
                ("benchmark", "", "benchmark: expected letters"),
                ("seed", "x", "seed: expected int, got 'x'"),
                ("seconds", None, "seconds: expected a finite number, got None"),
                ("versions", {"jax": 1}, "versions: expected strings"),
                ("figures", [1], "figures: expected dict"),
                ("figures", {"x": None}, "figures['x']: expected a finite number"),
                ("reductions", [1], "reductions: expected a list of sentences"),
                ("paper", {"x": 1}, "paper: expected a value and a source each, got others for x"),
                ("paper", {"x": {"value": 1}}, "got others for x"),
                ("paper", {"x": {"value": "1", "source": "here"}}, "expected a finite number"),
            ]
        ],
        (b"[" * 200_000, "recursion"),
    ],
)
def test_report_names_a_damaged_record(tmp_path, content, message):
    (tmp_path / "good.json").write_text(json.dumps(WHOLE))
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(_record.UsageError, match=r"x\.json is not a benchmark's record: .*[^.]\.$") as raised:
        _record.read_all(tmp_path)
    assert message in str(raised.value)


def test_report_shows_text_that_no_file_can_hold_as_its_escape(fake, tmp_path):
    (tmp_path / "fake.json").write_text(json.dumps({**WHOLE, "reductions": ["half \ud800 a pair"]}))
    assert cli("report", "--out", tmp_path)[0].exit_code == 0
    assert r"half \ud800 a pair" in (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "fake.json").write_text("[" * 200_000)
    fake(lambda size, seed, context: Result({"x": 1}))
    assert cli("run", "fake", "--out", tmp_path)[0].exit_code == 0  # a damaged one is no loss


@pytest.mark.parametrize("given", ["nothing", "no folder", "no set-ups", "a damaged folder"])
def test_scoring_poisons_without_the_data_ends_in_one_sentence(monkeypatch, tmp_path, capsys, given):
    poisons = data.PoisonFolder(np.zeros((1, 32, 32, 3)), np.zeros(1, int), np.zeros(1, int), np.zeros((32, 32, 3)), 1)
    folder = data.write_poisons(tmp_path / "poisons", poisons) or tmp_path / "poisons"
    if given == "a damaged folder":
        for path in folder.iterdir():
            path.write_bytes(b"no pickle")
    arguments = {"nothing": [], "no folder": [tmp_path / "missing"]}.get(given, [folder])
    monkeypatch.setenv("MLSEC_JAX_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(_record, "_registered", {})
    monkeypatch.setattr(_machine, "choose", lambda device, devices: None)
    monkeypatch.setattr(_machine, "start", lambda device: "1 x cpu")
    monkeypatch.setattr("sys.argv", ["just_how_toxic", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(just_how_toxic.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_report_makes_no_folder(tmp_path):
    done, said = cli("report", "--out", tmp_path / "missing")
    assert done.exit_code == 2 and "error: --out: no record in" in said and not list(tmp_path.iterdir())
    (tmp_path / "fake.json").write_text(json.dumps(WHOLE))
    assert cli("report", "--out", tmp_path)[0].exit_code == 0 and (tmp_path / "report.html").is_file()


def test_bf16_is_refused_before_anything_computes(fake, tmp_path):
    fake(lambda size, seed, context: pytest.fail("computed"), name="fit", bfloat16=True)
    fake(lambda size, seed, context: Result({"x": 1}))
    done, said = cli("run", "fit", "fake", "--bf16", "--out", tmp_path)
    assert done.exit_code == 2 and "error: --bf16: expected benchmarks that heed it, got fake," in said


def test_seeds_that_jax_would_wrap_are_refused(fake, tmp_path):
    fake(lambda size, seed, context: Result({"x": seed}))
    assert cli("run", "fake", "--seed", 2**32, "--out", tmp_path)[0].exit_code == 2
    assert cli("run", "fake", "--seed", 2**32 - 1, "--out", tmp_path)[0].exit_code == 0
    assert json.loads((tmp_path / "fake.json").read_text())["figures"] == {"x": 2**32 - 1}


def test_items_of_other_data_are_not_taken_over(monkeypatch, tmp_path):
    monkeypatch.setattr(_machine, "versions", lambda: {"jax": "0"})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.delenv("MLSEC_JAX_DATA", raising=False)
    seen = [_machine.fingerprint("cpu")]

    def changed():
        seen.append(_machine.fingerprint("cpu"))
        return seen[-1] not in seen[:-1] and seen[-1] == _machine.fingerprint("cpu")

    for variable, file in (("TFDS_DATA_DIR", "mnist/3.0.1/dataset_info.json"), ("MLSEC_JAX_DATA", "spambase.npz")):
        path = tmp_path / variable / file
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert changed()
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert changed()
        path.write_text("{ }")
        assert changed()
    path = tmp_path / "home" / "tensorflow_datasets" / "mnist" / "3.0.1" / "dataset_info.json"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert changed()
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert changed()
