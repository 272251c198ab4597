"""Training the models of a partition ensemble, beside a PyTorch loop: softmax regression, and a network of 64 units.

    MLSEC_JAX_PEERS_PYTHON=peers/bin/python python -m benchmarks.speed.partitions --out OUT

Both get the same rows, 50 a partition (what MNIST gives in 1,200), of 784 inputs in 10 classes, the same starting
weights, and the same steps: gradient descent with momentum 0.9 on all rows of the partition. The logits of the trained
models on 20 other rows must agree to 1e-3. Ours is `partition_aggregation` of `train.row_space(bilevel.unrolled(...))`
as one program: hashing and sorting the rows is in its time, and compilation, as ever, is not. PyTorch's loop is what
one writes: a model, an optimiser and `backward` for each partition; its rows are handed to it already in partitions.
`ours_plain` is without `row_space`.

Each contestant is a process of its own on the same core, compared in processor seconds, and they take turns; a ratio is
the median over the turns of the quotient within a turn. `--partitions` scales the run, for all of them cost the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _record
from benchmarks._served import in_turn

ROWS, INPUTS, CLASSES, WIDTH, TESTS = 50, 784, 10, 64, 20
LEARNING_RATE, MOMENTUM = 0.05, 0.9
PEER = "MLSEC_JAX_PEERS_PYTHON"
GATES = {"linear": 4.0, "mlp": 3.0}


class Setting(NamedTuple):
    """One kind of model, how many partitions, and how many steps each."""

    kind: str
    partitions: int
    num_steps: int = 100


def write(path: Path, partitions: int, seed: int) -> None:
    """Blurred class templates under noise, in no order; which partition each row falls in is left to ours to say."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, ROWS * partitions)
    templates = rng.uniform(size=(CLASSES, INPUTS))
    draw = lambda y: (0.3 * templates[y] + 0.7 * rng.uniform(size=(len(y), INPUTS))).astype(np.float32)
    normal = lambda *shape: (rng.normal(size=shape) * np.sqrt(2 / shape[0])).astype(np.float32)
    tests = draw(rng.integers(0, CLASSES, TESTS))
    arrays = {"x": draw(labels), "y": labels.astype(np.int32), "tests": tests}
    arrays |= {"hidden": normal(INPUTS, WIDTH), "out": normal(WIDTH, CLASSES)}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def command(who: str, spec: dict[str, Any]) -> list[str] | None:
    """How a contestant is started; None without its interpreter."""
    if who == "torch":
        python = os.environ.get(PEER)
        return [python, str(Path(__file__).parent / "peers" / "partitions_with_torch.py"), json.dumps(spec)] if python else None
    return [sys.executable, "-m", "benchmarks.speed._partitions_worker", json.dumps(spec | {"plain": who == "ours_plain"})]


def measure(setting: Setting, problem: Path, turns: int) -> dict[str, Any]:
    """Starts the contestants one by one, checks that they trained the same models, and times them in turn."""
    spec = {**setting._asdict(), "problem": str(problem), "learning_rate": LEARNING_RATE, "momentum": MOMENTUM}
    spec["dealt"] = str(problem.with_suffix(f".{setting.kind}.dealt.npz"))
    out = lambda who: problem.with_suffix(f".{setting.kind}.{who}.npy")
    core = sorted(os.sched_getaffinity(0))[-1:]
    found = {who: command(who, spec | {"out": str(out(who))}) for who in ("ours", "ours_plain", "torch")}
    timed, _ = in_turn({who: line for who, line in found.items() if line}, core, turns)
    times = {who: each["cpu_seconds"] for who, each in timed.items()}
    logits = {who: np.load(out(who)) for who in times}
    apart = {who: float(np.abs(value - logits["ours"]).max()) for who, value in logits.items()}
    if max(apart.values()) > 1e-3:
        raise RuntimeError(f"{setting.kind}: expected equal logits, got differences {apart}.")
    figures: dict[str, Any] = {f"cpu_seconds_{who}": float(np.median(values)) for who, values in times.items()}
    ratio = lambda who: float(np.median(np.array(times[who]) / np.array(times["ours"])))
    figures |= {f"over_{who}": ratio(who) for who in times if who != "ours"}
    return {**setting._asdict(), **figures, "logits_apart": max(apart.values()), "turns": turns, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="not among the records of `run`")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--partitions", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        problem = Path(folder, "problem.npz")
        write(problem, args.partitions, args.seed)
        for kind, gate in GATES.items():
            report[kind] = measure(Setting(kind, args.partitions), problem, args.turns)
            if "over_torch" in report[kind]:
                report[kind]["gate"] = bool(report[kind]["over_torch"] >= gate)
            _record.replace_file(args.out / "partitions.json", (json.dumps(report, indent=1) + "\n").encode())
            print(kind, json.dumps(report[kind], indent=1), flush=True)


if __name__ == "__main__":
    main()
