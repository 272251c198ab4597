"""Every trainer's hypergradient on an MLP and a CNN: its error, time and peak memory, beside PyTorch and TorchOpt.

The gradient of a goal's loss with respect to the inputs of 40 of 1,000 training digits, through T steps of momentum
SGD (batches of 100, learning rate 0.05, momentum 0.9; 0.02 without momentum where an estimator takes none). Compared
to the same training unrolled in float64. Each estimator runs in a process of its own: peak memory is the rise of its
resident set over one warm call, `temp_mb` what XLA reports; times are medians of calls that take turns, and
`start_seconds` is the process's start, its program compiled or read from the persistent cache.

Keys are of the MLP 784-100-10 at T = 1,000; other lengths end in `_t100`, and the CNN's begin with `cnn_`.
Where an estimator gives NaN its errors give way to `is_nan_E = 1`; `approximate_momentum` is the naive reversal.
`stored_spread` is `stored` with the rows of each batch spread over two devices, a core each: elapsed seconds of the CNN.
`forward` is measured on images of 7 x 7 and one poison (49 tangents), and the `implicit` ones on the convex problem of
a regularised head on the MLP's first layer as initialised, against float64 and a dense solve there.

The peers need an environment of their own: `python -m venv peers; peers/bin/pip install torch==2.13.0 torchopt==0.7.3`,
and `MLSEC_JAX_PEERS_PYTHON=peers/bin/python`. Without it their figures are left out. On a machine that others use
compare `one_core_cpu_seconds_*`: PyTorch's threads wait for one another, and elapsed time then says little.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import _hypergradient_worker as worker
from benchmarks._record import Result, UsageError, benchmark
from benchmarks._served import Served
from mlsec_jax import data, loop

PEERS = ("torch", "torchopt")
EXACT = ("unrolled_none", "unrolled_sqrt", "unrolled_log", "stored", "exact")
MOMENTUM = (*EXACT, "truncated", *PEERS)
PLAIN = ("fixed_point", "approximate")
IMPLICIT = ("implicit_cholesky", "implicit_cg", "implicit_neumann", "implicit_nystrom")
TIMED_ON_ONE_CORE = ("unrolled_none", "unrolled_sqrt", "exact", *PEERS)
RATE, PLAIN_RATE, MU = 0.05, 0.02, 0.9
POINTS, ROWS, BATCH, GOAL = 40, 1000, 100, 500


class Setting(NamedTuple):
    """One problem, the estimators that it is given to, and how many timed calls each makes."""

    net: str
    num_steps: int
    estimators: tuple[str, ...]
    rounds: int
    one_core: bool = False
    momentum: float = MU
    points: int = POINTS
    prefix: str = ""

    @property
    def name(self) -> str:
        return f"{self.net}-{self.num_steps}-{self.momentum:g}" + ("-one-core" if self.one_core else "")

    def key(self, figure: str, estimator: str) -> str:
        length = "" if self.net != "cnn" and self.num_steps in (0, 1000) else f"_t{self.num_steps}"
        return f"{self.prefix}{figure}_{estimator}{length}"


def settings(size: str) -> list[Setting]:
    """What a size runs."""
    if size == "small":
        return [
            Setting("mlp", 100, ("unrolled_none", "unrolled_sqrt", "exact", "torch"), 3),
            Setting("mlp", 100, ("approximate",), 3, momentum=0.0),
        ]
    lengths = (100, 300, 1000, 2000)
    few = [Setting("mlp", t, MOMENTUM, 3) for t in lengths]
    few += [Setting("mlp", t, PLAIN, 3, momentum=0.0) for t in lengths]
    few += [
        Setting("mlp", 1000, ("approximate_momentum",), 0),
        Setting("mlp", 1000, TIMED_ON_ONE_CORE, 3, one_core=True, prefix="one_core_"),
        Setting("cnn", 100, (*MOMENTUM, "stored_spread"), 3, prefix="cnn_"),
        Setting("cnn", 100, PLAIN, 1, momentum=0.0, prefix="cnn_"),
        Setting("cnn", 100, ("unrolled_none", "unrolled_sqrt", "torch"), 3, one_core=True, prefix="cnn_one_core_"),
        Setting("small_images", 100, ("forward", "unrolled_none"), 3, points=1, prefix="small_images_"),
        Setting("head", 0, IMPLICIT, 3, momentum=0.0),
    ]
    if size == "paper":
        lean = ("unrolled_sqrt", "unrolled_log", "exact")
        few += [Setting("cnn", t, lean, 1, prefix="cnn_") for t in lengths[1:]]
    return few


def problem(key: jax.Array, setting: Setting, path: Path, rows: int = ROWS) -> dict[str, Any]:
    """Writes the digits, the weights and the batches that every framework shares; returns what only some need."""
    split_key, init_key, batch_key = jax.random.split(key, 3)
    x, y = data.mnist5k()
    if setting.net == "small_images":
        x = x.reshape(-1, 7, 4, 7, 4).mean((2, 4)) / 255
    whole = data.to_data(x, y, flatten=setting.net != "cnn", channel=setting.net == "cnn")
    train, goal = data.split(split_key, whole, (rows, GOAL))
    params = worker.network(setting.net).init(init_key, train.x[:1])
    schedule = loop.shuffled(BATCH)(batch_key, rows, max(setting.num_steps, 1))
    assert schedule is not None
    leaves = {f"params/{layer}/{name}": leaf for layer, part in params.items() for name, leaf in part.items()}
    arrays = {"x": train.x, "y": train.y, "goal_x": goal.x, "goal_y": goal.y, "rows": schedule.rows, **leaves}
    plain: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(path, **plain)
    if setting.net != "head":
        return {}
    hidden = np.asarray(worker.network("mlp").features(params, train.x), np.float64)
    hidden = np.hstack([hidden, np.ones((rows, 1))])
    curvature = np.linalg.eigvalsh(hidden.T @ hidden / rows)[-1] / 2 + worker.L2  # softmax's Hessian is at most 1/2
    return {"scale": 1 / curvature}


def command(spec: dict[str, Any], peers: str | None) -> list[str]:
    """How the process of an estimator is started."""
    if spec["estimator"] in PEERS:
        assert peers is not None
        return [peers, str(Path(__file__).parent / "peers" / "torch_unroll.py"), json.dumps(spec)]
    return [sys.executable, "-m", "benchmarks._hypergradient_worker", json.dumps(spec)]


def measure(key: jax.Array, setting: Setting, folder: Path, peers: str | None, rows: int = ROWS) -> dict[str, Any]:
    """Runs the estimators of a setting: all are started one by one, then timed in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{setting.name}.npz"
    base = {
        "problem": str(path.resolve()),
        "net": setting.net,
        "num_steps": setting.num_steps,
        "momentum": setting.momentum,
        "learning_rate": RATE if setting.momentum else PLAIN_RATE,
        "points": setting.points,
        "x64": False,
        "tolerance": 1e-6,
        "devices": 1,
        **problem(key, setting, path, rows),
    }
    out = lambda name: folder / f"{setting.name}-{name}.npy"
    cores = sorted(os.sched_getaffinity(0))[:1] if setting.one_core and hasattr(os, "sched_setaffinity") else None
    chosen = [name for name in setting.estimators if peers or name not in PEERS]
    processes: dict[str, Served] = {}
    try:
        for name in chosen:
            estimator = name.removesuffix("_momentum").removesuffix("_spread")
            spec = {**base, "estimator": estimator, "out": str(out(name).resolve())}
            spec["devices"] = 2 if name.endswith("_spread") else 1
            processes[name] = Served(command(spec, peers), cores)
        times = [{name: processes[name].time() for name in chosen} for _ in range(setting.rounds)]
        facts = {name: processes[name].facts for name in chosen}
    finally:
        for process in processes.values():
            process.close()
    found: dict[str, Any] = {}
    for name in chosen:
        for figure, value in facts[name].items():
            found[setting.key(figure, name)] = value
        for figure in ("seconds", "cpu_seconds"):
            if times:
                found[setting.key(figure, name)] = np.median([turn[name][figure] for turn in times])
    gradients = {name: np.load(out(name)).ravel().astype(np.float64) for name in chosen}
    if setting.one_core:  # errors are those of the same call on all cores
        return {key: value for key, value in found.items() if "cpu_seconds" in key}
    if "approximate_momentum" in chosen:  # asked for nothing else
        return {"approximate_momentum_is_nan": int(np.isnan(gradients["approximate_momentum"]).any())}
    estimator = "implicit_cholesky" if setting.net == "head" else "unrolled_sqrt"
    exact = {"estimator": estimator, "x64": True, "tolerance": 1e-10, "out": str(out("reference").resolve())}
    Served(command({**base, **exact}, None)).close()
    truth = np.load(out("reference")).ravel()
    for name, gradient in gradients.items():
        if not np.isfinite(gradient).all():
            found[setting.key("is_nan", name)] = 1
            continue
        size = np.linalg.norm(gradient) * np.linalg.norm(truth)
        found[setting.key("cosine", name)] = gradient @ truth / size
        found[setting.key("rel_error", name)] = np.linalg.norm(gradient - truth) / np.linalg.norm(truth)
    return found


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """The quotients that the figures are there for, where both parts were measured."""
    of = lambda part, whole: {} if {part, whole} - set(figures) else {"": figures[part] / figures[whole]}
    wanted = {
        "memory_sqrt_over_none": ("peak_mb_unrolled_sqrt", "peak_mb_unrolled_none"),
        "memory_exact_over_none": ("peak_mb_exact", "peak_mb_unrolled_none"),
    }
    for name in ("stored", "stored_spread"):
        wanted[f"cnn_time_{name}_over_torch_t100"] = (f"cnn_seconds_{name}_t100", "cnn_seconds_torch_t100")
    for name in ("unrolled_none", "unrolled_sqrt", "exact"):
        wanted[f"time_{name}_over_torch"] = (f"seconds_{name}", "seconds_torch")
        wanted[f"time_{name}_over_torch_t2000"] = (f"seconds_{name}_t2000", "seconds_torch_t2000")
        wanted[f"time_{name}_over_torch_one_core"] = (f"one_core_cpu_seconds_{name}", "one_core_cpu_seconds_torch")
        wanted[f"cnn_time_{name}_over_torch_t100"] = (f"cnn_seconds_{name}_t100", "cnn_seconds_torch_t100")
        one_core = (f"cnn_one_core_cpu_seconds_{name}_t100", "cnn_one_core_cpu_seconds_torch_t100")
        wanted[f"cnn_time_{name}_over_torch_one_core_t100"] = one_core
    return {name: value for name, pair in wanted.items() for value in of(*pair).values()}


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Runs every setting of the size in turn."""
    peers = os.environ.get("MLSEC_JAX_PEERS_PYTHON")
    if peers and not Path(peers).is_file():
        raise UsageError(f"MLSEC_JAX_PEERS_PYTHON: expected a Python interpreter, got {peers}, which is no file.")
    folder = context.out / f"{context.name}.parts" / "problems"
    figures: dict[str, Any] = {}
    for setting in context.progress(settings(size), "settings"):
        item = setting.name + ("" if peers else "-no-peers")
        item += "-" + "-".join(name for name in setting.estimators if name == "approximate_momentum")
        one = lambda setting=setting: measure(context.key, setting, folder, peers)
        figures |= context.once(item.rstrip("-").replace(".", "_"), one)
    reductions = ["1,000 digits, 40 of them differentiated, batches of 100", "float32; compared to float64"]
    if not peers:
        reductions.append("PyTorch and TorchOpt left out: MLSEC_JAX_PEERS_PYTHON names no interpreter that has them")
    if size == "small":
        reductions.append("T = 100 on the MLP and five estimators only; T to 2,000 and the CNN are left to --size full")
    elif size == "full":
        reductions.append("the CNN at T = 100 only; T to 2,000 is left to --size paper")
    shutil.rmtree(folder, ignore_errors=True)  # a run that takes every item over makes none
    (draw_bars if size == "small" else draw)(context, figures)
    return Result({**figures, **ratios(figures)}, reductions)


def draw(context: Any, figures: dict[str, Any], lengths: Sequence[int] = (100, 300, 1000, 2000)) -> None:
    """Memory and time against T."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, what, label in zip(axes, ("peak_mb", "seconds"), ("peak memory (MiB)", "seconds")):
        for name in MOMENTUM:
            keys = [Setting("mlp", t, (), 0).key(what, name) for t in lengths]
            if all(key in figures for key in keys):
                axis.loglog(lengths, [figures[key] for key in keys], marker="o", label=name)
        axis.set(xlabel="steps T", ylabel=label)
    axes[0].legend(fontsize=8)
    context.save_figure(figure, "memory_and_time")


def draw_bars(context: Any, figures: dict[str, Any]) -> None:
    """Memory and time of every estimator of the MLP at T = 100."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, what, label in zip(axes, ("peak_mb", "seconds"), ("peak memory (MiB)", "seconds")):
        of = {name: Setting("mlp", 100, (), 0).key(what, name) for name in (*MOMENTUM, *PLAIN)}
        shown = {name: figures[key] for name, key in of.items() if key in figures}
        axis.barh(list(shown), list(shown.values()))
        axis.set(xlabel=label)
    context.save_figure(figure, "memory_and_time")
