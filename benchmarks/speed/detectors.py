"""Spectral signatures and activation clustering on 60,000 rows of 512 features, beside ART 1.20.1.

    MLSEC_JAX_ART_PYTHON=art/bin/python python -m benchmarks.speed.detectors --out OUT

Both get the same features, and are timed from features to scores: ART by its own functions, as it comes. The features
are drawn: ten classes of rectified mixtures of skewed factors with dead units, in which a tenth of the rows of each
class are poisons, moved along a direction of the class's own. `found` is the share of poisons that are among the
`1.5 ε n_y` rows of each class that score highest, for clusters the share that the rule of relative size (35 %) removes;
`lost` the share of clean rows that go with them; `accuracy` the share of all rows rightly kept or removed. ART doesn't
centre its spectral scores: nor does `ours` here, for like is timed with like; `centred` is the paper's score.

Each contestant is a process of its own, and they take turns; a ratio is the median over the turns of the quotient
within a turn. `--cores one` pins every process to the same core and compares processor seconds, the steadier on a
shared machine; `--cores all` compares elapsed seconds. `art_pca` is ART's default, which leaves out the ICA. The
ICA steps of a class differ from start to start, and ART draws its own. Compilation is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _record
from benchmarks._served import in_turn

EPSILON, CLASSES = 0.1, 10
LIMITS = {"spectral": 1 / 10, "clusters": 1 / 3}


def problem(num_rows: int, num_features: int, seed: int) -> dict[str, np.ndarray]:
    """Features `x [n, d]`, labels `y [n]`, and which rows are poisons, `bad [n]`."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, num_rows)
    bad = rng.random(num_rows) < EPSILON
    factors = rng.gamma(1.0, size=(num_rows, 20)).astype(np.float32) - 1
    x = factors @ rng.normal(size=(20, num_features)).astype(np.float32) / np.sqrt(20, dtype=np.float32)
    x += rng.normal(size=(CLASSES, num_features)).astype(np.float32)[y]
    x += 0.5 * rng.normal(size=x.shape).astype(np.float32)
    x[bad] += rng.normal(size=(CLASSES, num_features)).astype(np.float32)[y[bad]]
    x = np.maximum(x, 0)
    x[:, rng.permutation(num_features)[: num_features // 16]] = 0  # dead units
    return {"x": x, "y": y, "bad": bad}


def detection(detector: str, value: np.ndarray, y: np.ndarray, bad: np.ndarray) -> dict[str, float]:
    """What a detector's output finds and what it costs."""
    removed = value > 0.5
    if detector == "spectral":
        removed = np.zeros(len(y), bool)
        for label in range(int(y.max()) + 1):
            own = np.flatnonzero(y == label)
            count = round(1.5 * bad[own].sum())
            removed[own[np.argsort(-value[own], kind="stable")[:count]]] = True
    right = removed == bad
    return {"found": removed[bad].mean(), "lost": removed[~bad].mean(), "accuracy": right.mean()}


def command(who: str, spec: dict[str, Any]) -> list[str] | None:
    """How a contestant is started; None without its interpreter."""
    if not who.startswith("art"):
        return [sys.executable, "-m", "benchmarks.speed._detectors_worker", json.dumps(spec)]
    python = os.environ.get("MLSEC_JAX_ART_PYTHON")
    script = Path(__file__).parent / "peers" / "detect_with_art.py"
    return [python, str(script), json.dumps(spec)] if python else None


def measure(detector: str, arrays: dict[str, np.ndarray], path: Path, cores: str, turns: int) -> dict[str, float]:
    """Starts the contestants one by one, times them in turn, and judges what they found."""
    spec = {"detector": detector, "problem": str(path), "reduce": "FastICA", "centred": False}
    specs = {"ours": spec, "art": spec}
    specs |= {"art_pca": spec | {"reduce": "PCA"}} if detector == "clusters" else {"centred": spec | {"centred": True}}
    out = {who: path.with_name(f"{detector}-{cores}-{who}.npy") for who in specs}
    found = {who: command(who, each | {"out": str(out[who])}) for who, each in specs.items()}
    pinned = sorted(os.sched_getaffinity(0))[-1:] if cores == "one" else None
    what = "cpu_seconds" if cores == "one" else "seconds"
    timed, loads = in_turn({who: line for who, line in found.items() if line}, pinned, turns)
    times = {who: each[what] for who, each in timed.items()}
    figures: dict[str, float] = {}
    for who, values in times.items():
        figures[f"{what}_{who}"] = float(np.median(values))
        if who.startswith("art"):
            figures[f"over_{who}"] = float(np.median(np.array(times["ours"]) / np.array(values)))
        judged = detection(detector, np.load(out[who]), arrays["y"], arrays["bad"])
        figures |= {f"{figure}_{who}": float(value) for figure, value in judged.items()}
    return figures | {"load": max(loads), "turns": turns}


def gates(found: dict[str, dict[str, float]]) -> dict[str, bool]:
    """What was promised: so much faster than ART, at equal or better detection."""
    held: dict[str, bool] = {}
    for name, figures in found.items():
        if "over_art" in figures:
            held[f"{name}.over_art"] = figures["over_art"] <= LIMITS[name]
            held[f"{name}.accuracy"] = figures["accuracy_ours"] >= figures["accuracy_art"]
    return held


def main() -> None:
    """Runs what was asked for and writes `detectors.json`, after every detector."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="not among the records of `run`")
    parser.add_argument("--cores", nargs="+", default=["one", "all"], choices=["one", "all"])
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"cores": os.cpu_count(), "rows": args.rows, "features": args.features}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "features.npz")
        arrays = problem(args.rows, args.features, args.seed)
        np.savez(path, **arrays)  # type: ignore[arg-type]
        for cores in args.cores:
            report[cores] = {}
            for detector in args.only:
                report[cores][detector] = measure(detector, arrays, path, cores, args.turns)
                report[f"gates_{cores}"] = gates(report[cores])
                _record.replace_file(args.out / "detectors.json", (json.dumps(report, indent=1) + "\n").encode())
                print(cores, detector, json.dumps(report[cores][detector], indent=1), flush=True)
    print(json.dumps({name: part for name, part in report.items() if name.startswith("gates")}, indent=1))


if __name__ == "__main__":
    main()
