"""The hypergradient benchmark: its processes measure what they say, and its keys are those promised."""

import io
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import _served, hypergradients
from benchmarks._run import Context
from benchmarks.hypergradients import Setting

KEY = jax.random.key(0)


def test_peak_is_what_a_call_lifts_it_by():
    def call(mib):
        block = np.ones(mib * 2**17)
        return block.sum()

    call(4)
    small, large = _served.rise_of_peak(lambda: call(4))[1], _served.rise_of_peak(lambda: call(64))[1]
    assert abs(large - small - 60) < 4
    if sys.platform.startswith("linux"):
        again = _served.rise_of_peak(lambda: call(4))[1]  # an earlier, higher peak hides nothing
        assert abs(again - small) < 4


def test_a_process_answers_once_and_then_for_every_call(tmp_path):
    code = f"""
import numpy as np
from pathlib import Path
from benchmarks._served import serve
serve(lambda: np.arange(3.0), Path({str(tmp_path / "out.npy")!r}), temp_mb=7.0)
"""
    process = _served.Served([sys.executable, "-c", code])
    try:
        assert process.facts["temp_mb"] == 7.0 and process.facts["peak_mb"] >= 0
        turns = [process.time() for _ in range(2)]
    finally:
        process.close()
    assert all(turn.keys() == {"seconds", "cpu_seconds"} and turn["seconds"] < 1 for turn in turns)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.arange(3.0))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux only")
def test_a_process_gets_the_cores_it_is_given_and_this_one_keeps_its_own():
    mine = os.sched_getaffinity(0)
    core = max(mine)
    code = "import os, json, sys; print(json.dumps({'cores': sorted(os.sched_getaffinity(0))}), flush=True); sys.stdin.read()"
    process = _served.Served([sys.executable, "-c", code], [core])
    try:
        assert process.facts["cores"] == [core]
    finally:
        process.close()
    assert os.sched_getaffinity(0) == mine


def test_a_process_that_dies_says_so():
    with pytest.raises(RuntimeError, match="ended with code 3 and no answer"):
        _served.Served([sys.executable, "-c", "raise SystemExit(3)"])


def test_keys_of_the_mlp_at_a_thousand_steps_are_bare():
    key = lambda net, t, prefix="": Setting(net, t, (), 0, prefix=prefix).key("cosine", "exact")
    assert key("mlp", 1000) == "cosine_exact" and key("mlp", 100) == "cosine_exact_t100"
    assert key("cnn", 1000, "cnn_") == "cnn_cosine_exact_t1000"


@pytest.mark.parametrize("size", ["small", "full", "paper"])
def test_no_figure_is_measured_twice(size):
    keys = [
        setting.key(figure, name)
        for setting in hypergradients.settings(size)
        for name in setting.estimators
        for figure in (("cpu_seconds",) if setting.one_core else ("cosine", "rel_error", "seconds", "peak_mb"))
    ]
    assert len(keys) == len(set(keys))


def test_settings_have_names_of_their_own():
    names = [(s.name, "approximate_momentum" in s.estimators) for s in hypergradients.settings("paper")]
    assert len(names) == len(set(names))


def test_problem_is_the_same_for_every_framework(tmp_path):
    setting = Setting("cnn", 3, (), 0)
    hypergradients.problem(KEY, setting, tmp_path / "p.npz", rows=100)
    arrays = dict(np.load(tmp_path / "p.npz"))
    assert arrays["x"].shape == (100, 28, 28, 1) and arrays["rows"].shape == (3, 100)
    assert sum(value.size for name, value in arrays.items() if name.startswith("params/")) == 54_314


def test_a_run_that_was_killed_at_its_very_end_goes_on(monkeypatch, tmp_path):
    def measure(key, setting, folder, peers, rows=1000):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "problem.npz").write_bytes(b"")
        return {setting.key(what, name): 1.0 for what in ("peak_mb", "seconds") for name in setting.estimators}

    context = lambda: Context("hypergradients", "small", 0, tmp_path, "code", Console(file=io.StringIO()))
    monkeypatch.setattr(hypergradients, "measure", measure)
    first = hypergradients.run("small", 0, context())
    monkeypatch.setattr(hypergradients, "measure", lambda *args: pytest.fail("measured again"))
    assert hypergradients.run("small", 0, context()) == first and not list(tmp_path.rglob("problem*"))
    assert [path.name for path in tmp_path.glob("*.png")] == ["hypergradients.memory_and_time.png"]


@pytest.mark.slow  # starts three processes
def test_figures_of_a_tiny_setting(tmp_path):
    setting = Setting("small_images", 6, ("unrolled_none", "exact", "torch"), 1, points=2, prefix="tiny_")
    found = hypergradients.measure(KEY, setting, tmp_path, peers=None, rows=100)
    for name in ("unrolled_none", "exact"):
        assert found[f"tiny_cosine_{name}_t6"] > 0.99999 and found[f"tiny_rel_error_{name}_t6"] < 1e-4
        assert found[f"tiny_seconds_{name}_t6"] > 0 and found[f"tiny_temp_mb_{name}_t6"] > 0
    assert not [key for key in found if "torch" in key]
    assert all(np.isfinite(value) for value in found.values()) and json.dumps({k: float(v) for k, v in found.items()})
    assert Path(tmp_path / f"{setting.name}.npz").is_file()
