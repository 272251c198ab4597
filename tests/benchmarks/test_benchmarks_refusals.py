"""What the command line refuses, and with which words; with a benchmark made up here, and in this process."""

import pytest
from typer.testing import CliRunner

from benchmarks import _machine, _record
from benchmarks.__main__ import app


@pytest.fixture
def fake(monkeypatch):
    """Registers functions as benchmarks for one test, on a device that needs no start."""
    monkeypatch.setattr(_record, "_registered", {})
    monkeypatch.setattr(_machine, "choose", lambda device, devices: None)
    monkeypatch.setattr(_machine, "start", lambda device: "1 x cpu")
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
