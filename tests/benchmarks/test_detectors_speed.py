"""The detectors' speed benchmark counts detection rightly, starts whom it can, and ours runs."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import _detectors_worker, crafting, detectors, partitions, secml


def test_ours_finds_the_poisons_of_a_small_problem(tmp_path):
    path = tmp_path / "x.npz"
    arrays = detectors.problem(2000, 128, 0)
    np.savez(path, **arrays)
    assert 0.08 < arrays["bad"].mean() < 0.12 and (arrays["x"].max(axis=0) == 0).sum() == 8
    for detector in detectors.LIMITS:
        value = _detectors_worker.call({"detector": detector, "problem": str(path), "centred": False})()
        judged = detectors.detection(detector, value, arrays["y"], arrays["bad"])
        assert judged["found"] > judged["lost"] + 0.2


def test_detection_counts_the_published_number_of_each_class():
    y, bad = np.repeat([0, 1], 10), np.arange(20) % 10 < 2
    score = np.where(bad, 2.0, 0.0) + np.arange(20) / 100
    assert detectors.detection("spectral", score, y, bad) == {"found": 1.0, "lost": 2 / 16, "accuracy": 18 / 20}
    assert detectors.detection("clusters", bad.astype(float), y, bad) == {"found": 1.0, "lost": 0.0, "accuracy": 1.0}


def test_peers_without_an_interpreter_are_left_out_and_gates_ask_what_was_promised(monkeypatch):
    monkeypatch.delenv("MLSEC_JAX_ART_PYTHON", raising=False)
    assert detectors.command("art", {}) is None and detectors.command("ours", {})[2].endswith("_detectors_worker")
    found = {"spectral": {"over_art": 0.05, "accuracy_ours": 0.9, "accuracy_art": 0.91}, "clusters": {}}
    assert detectors.gates(found) == {"spectral.over_art": True, "spectral.accuracy": False}


@pytest.mark.parametrize("program", [crafting, detectors, partitions, secml])
def test_what_is_no_record_is_not_kept_among_the_records(program, monkeypatch):
    class Asked(Exception):
        pass

    def parse_args(self):
        raise Asked(self.get_default("out"))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Asked) as asked:
        program.main()
    assert asked.value.args == (Path("runs/speed"),)
