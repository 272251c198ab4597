"""Clean-label crafting per iteration, beside a bare PyTorch loop and ART 1.20.1: slim ResNet-18, widths 16 and 64.

    MLSEC_JAX_PEERS_PYTHON=peers/bin/python MLSEC_JAX_ART_PYTHON=art/bin/python python -m benchmarks.speed.crafting --out OUT

Everyone gets the same weights (random, group norm), images, radius, optimiser and number of iterations. The features of
the starting points must agree to 1e-4 and a gradient there to 1e-3; from there Adam, whose first steps are signs, leads
different roundings apart. Each contestant is a process of its own, and they take turns, so that a change of load hits
all alike; a ratio is the median over the turns of the quotient within a turn. A turn is one call: the target's
features, then the iterations. Compilation is not in it.

`--cores one` pins every process to the same core and compares processor seconds: the steadier on a shared machine.
`--cores all` compares elapsed seconds with a thread a core; there `ours` is the better of two programs, one device with
all threads and, `spread`, one device a core with the poisons over both. `pass` is one forward pass and the gradient of
the inputs, in a loop as ours is. `targets_4`, `targets_16`: Bullseye Polytope for so many targets as one program.
`layers_9`: aimed at in every block and the features, for victims that train end to end; ART passes forward once a layer.
`art` is ART as it comes, `art_frozen` with parameters that ask for no gradients. Peers without an interpreter are left
out: `pip install torch==2.13.0` in one environment; in another `adversarial-robustness-toolbox==1.20.1 packaging` too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _record
from benchmarks._served import in_turn

RADIUS, LEARNING_RATE, SIDE, TARGETS = 0.1, 0.01, 2048, 16
PEERS = {"torch": "MLSEC_JAX_PEERS_PYTHON", "art": "MLSEC_JAX_ART_PYTHON", "art_frozen": "MLSEC_JAX_ART_PYTHON"}


class Setting(NamedTuple):
    """One attack at one size, how many iterations a call makes, and who else is measured beside ours and PyTorch's."""

    attack: str
    poisons: int
    width: int
    num_steps: int
    others: tuple[str, ...] = ()
    layers: int = 1

    @property
    def name(self) -> str:
        return f"{self.attack}_{self.poisons}_w{self.width}" + (f"_layers_{self.layers}" if self.layers > 1 else "")


def settings(scale: float) -> list[Setting]:
    """What is measured; `scale` multiplies the iterations of a call."""
    art = ("art", "art_frozen")
    plan = [
        Setting("bullseye", 5, 16, 40, ("pass", *art, "targets_4", "targets_16")),
        Setting("bullseye", 5, 16, 20, ("pass", *art), layers=9),
        Setting("bullseye", 20, 16, 12, ("pass",)),
        Setting("collision", 1, 16, 100, art),
        Setting("bullseye", 5, 64, 12, ("pass", *art)),
        Setting("bullseye", 20, 64, 4, ("pass",)),
        Setting("collision", 1, 64, 20, art),
    ]
    return [setting._replace(num_steps=max(1, round(scale * setting.num_steps))) for setting in plan]


def problem(width: int, seed: int, path: Path) -> dict[str, np.ndarray]:
    """What every framework gets, written by a process of its own: this one starts others, and is better off without JAX."""
    spec = {"write": str(path), "width": width, "targets": TARGETS, "seed": seed, "devices": 1}
    subprocess.run([sys.executable, "-m", "benchmarks.speed._crafting_worker", json.dumps(spec)], check=True)
    return dict(np.load(path))


def flops(arrays: dict[str, np.ndarray]) -> float:
    """Of the convolutions of one image, forward and to the inputs' gradient: two a multiply-add, padding counted."""
    total = 0.0
    for name, value in arrays.items():
        if name.startswith("params/") and value.ndim == 4:
            stage = name.split("/")[1].removeprefix("stage").partition("_")[0]
            side = 32 if stage == "stem" else 32 >> int(stage)
            total += 2 * 2 * value.size * side**2
    return total


def command(who: str, spec: dict[str, Any]) -> list[str] | None:
    """How a contestant is started; None without its interpreter."""
    if who not in PEERS:
        return [sys.executable, "-m", "benchmarks.speed._crafting_worker", json.dumps(spec)]
    python = os.environ.get(PEERS[who])
    script = Path(__file__).parent / "peers" / f"craft_with_{who.partition('_')[0]}.py"
    return [python, str(script), json.dumps(spec | {"frozen": who == "art_frozen"})] if python else None


def contestants(setting: Setting, spec: dict[str, Any], cores: str) -> dict[str, list[str]]:
    """The processes of a setting by name."""
    specs = {"matmul": spec | {"attack": "matmul"}, "ours": spec, "torch": spec}
    if cores == "all" and setting.poisons > 1:
        specs["spread"] = spec | {"devices": 2}
    for who in setting.others:
        if who.startswith("targets"):
            specs[who] = spec | {"targets": int(who.removeprefix("targets_")), "devices": 2 if cores == "all" else 1}
        else:
            specs[who] = spec | ({"attack": "pass"} if who == "pass" else {})
    found = {who: command(who, each | {"out": f"{spec['out']}-{who}.npy"}) for who, each in specs.items()}
    return {who: line for who, line in found.items() if line}


def measure(setting: Setting, arrays: dict[str, np.ndarray], path: Path, cores: str, turns: int) -> dict[str, Any]:
    """Starts the contestants of a setting one by one, checks that they compute the same, and times them in turn."""
    spec = {**setting._asdict(), "problem": str(path), "out": str(path.with_name(f"{setting.name}-{cores}"))}
    spec |= {"radius": RADIUS, "learning_rate": LEARNING_RATE, "side": SIDE, "targets": 1, "devices": 1}
    commands = contestants(setting, spec, cores)
    pinned = sorted(os.sched_getaffinity(0))[-1:] if cores == "one" else None
    timed, loads = in_turn(commands, pinned, turns)
    what = "cpu_seconds" if cores == "one" else "seconds"
    times = {who: each[what] for who, each in timed.items()}
    figures = agreement(setting, spec, [who for who in times if who != "matmul"])
    seconds = {}
    for who, values in times.items():
        per = 1 if who == "matmul" else setting.num_steps * int(who.partition("_")[2] if "targets" in who else 1)
        seconds[who] = np.array(values) / per
        figures[f"{what}_{who}"] = float(np.median(seconds[who]))
    best = min((who for who in ("ours", "spread") if who in seconds), key=lambda who: np.median(seconds[who]))
    quotient = lambda a, b: float(np.median(seconds[a] / seconds[b]))
    figures |= {f"over_{who}": quotient(best, who) for who in PEERS if who in seconds}
    figures |= {"over_pass": quotient("ours", "pass")} if "pass" in seconds else {}  # both on one device
    figures |= {f"{who}_over_one": quotient(who, best) for who in seconds if "targets" in who}
    rate = setting.poisons * flops(arrays) / seconds[best]
    figures["gflops"] = float(np.median(rate)) / 1e9
    figures["matmul_gflops"] = float(np.median(2 * SIDE**3 / seconds["matmul"])) / 1e9
    figures["of_matmul"] = float(np.median(rate * seconds["matmul"] / (2 * SIDE**3)))
    return figures | {"best": best, "load": max(loads), "num_steps": setting.num_steps, "turns": turns}


def agreement(setting: Setting, spec: dict[str, Any], names: list[str]) -> dict[str, float]:
    """How far the features of the starting points, and a gradient there, are apart; raises above 1e-4 and 1e-3."""
    figures = {}
    for figure, limit in (("features", 1e-4), ("slopes", 1e-3)):
        each = {who: np.load(f"{spec['out']}-{who}.{figure}.npy") for who in names}
        size = np.linalg.norm(each["ours"])
        apart = {who: float(np.linalg.norm(value - each["ours"]) / size) for who, value in each.items()}
        figures[f"{figure}_apart"] = max(apart.values())
        if figures[f"{figure}_apart"] > limit:
            raise RuntimeError(f"{setting.name}: expected equal {figure}, got relative differences {apart}.")
    return figures


def gates(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What was promised, wherever it was measured."""
    held: dict[str, bool] = {}
    for name, figures in found.items():
        limits = {"over_torch": 1.0 if "_w16" in name else 1.3, "over_art": 1 / 4, "over_pass": 1.3}
        limits |= {"targets_4_over_one": 1.1, "targets_16_over_one": 1.1}  # the clock's own spread
        held |= {f"{name}.{figure}": figures[figure] <= limits[figure] for figure in limits if figure in figures}
    return held


def main() -> None:
    """Runs what was asked for and writes `crafting.json`, after every setting."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="not among the records of `run`")
    parser.add_argument("--cores", nargs="+", default=["one", "all"], choices=["one", "all"])
    parser.add_argument("--only", nargs="+", help="names of settings, such as bullseye_5_w16")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the iterations of a call")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        for cores in args.cores:
            report[cores] = {}
            for setting in settings(args.scale):
                if args.only and setting.name not in args.only:
                    continue
                path = Path(folder, f"w{setting.width}.npz")
                arrays = dict(np.load(path)) if path.exists() else problem(setting.width, args.seed, path)
                report[cores][setting.name] = measure(setting, arrays, path, cores, args.turns)
                report[f"gates_{cores}"] = gates(report[cores])
                _record.replace_file(args.out / "crafting.json", (json.dumps(report, indent=1) + "\n").encode())
                print(cores, setting.name, json.dumps(report[cores][setting.name], indent=1), flush=True)
    print(json.dumps({name: part for name, part in report.items() if name.startswith("gates")}, indent=1))


if __name__ == "__main__":
    main()
