"""Our attack beside secml 0.15.6: 8 against 3, logistic regression, 400 training points, 10 poisons, the same starts.

    sh benchmarks/speed/secml_env.sh PYTHON3.8 FOLDER
    OPENBLAS_NUM_THREADS=1 python -m benchmarks.speed.secml --env FOLDER --out OUT

Both attackers get the same training and validation rows, starting points, labels, box [0, 1] and victim's C, and
maximise the mean validation log-loss. The test set is every 3 and 8 of MNIST (through TFDS; without it, of the 5,000
embedded digits) that is in neither: about 13,300. Neither attacker's process is given it: poisons are scored after the
clock has stopped, by the same exact victim (and by liblinear's, secml's own). secml's time is its `run` without
imports. Ours is the Gram matrix, a clean fit, the steps: warm (median of the repeats) and cold (first call in the
process, compilation included, no persistent cache). Wall-clock and processor seconds are both kept: on a shared
machine the second are the steadier. What secml found is kept in OUT, and taken over by the next run.

How to read it: our steps were chosen by the validation loss at their end on splits 100 to 103 (`--choose` shows it),
never by a test error; they decay along a cosine, for a constant step oscillates. The last poisons are the attack's
result. "Reached" is the first crossing of a test curve that goes up and down, which no attacker could see: read the
errors at the end beside it, whose standard errors are over test points, paired.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import _machine

NUM_TRAIN, NUM_VAL, POINTS, C = 400, 300, 10, 1.0
STEP_SIZE, MOMENTUM, NUM_STEPS = 0.4, 0.9, 100
CHOICES = (
    *((step_size, 0.0, num_steps) for step_size in (0.5, 1.0, 2.0, 4.0) for num_steps in (60, 150)),
    *((step_size, 0.9, num_steps) for step_size in (0.2, 0.4) for num_steps in (60, 100)),
)
CHOICE_SPLITS = (100, 101, 102, 103)
NUM_SPLITS, SPLIT_STEPS = 16, 15
SETTINGS = {  # the values of secml's own poisoning tutorial, then two with longer steps
    "tutorial": {"distance": "l2", "passes": 1, "solver": {"eta": 0.05, "eta_min": 0.05, "max_iter": 100, "eps": 1e-6}},
    "half_step": {"distance": "l2", "passes": 1, "solver": {"eta": 0.5, "max_iter": 100, "eps": 1e-4}},
    "long_step": {"distance": "l2", "passes": 1, "solver": {"eta": 0.25, "eta_min": 2.0, "max_iter": 100, "eps": 1e-6}},
}


def problem(seed: int) -> dict[str, Any]:
    """One split of the 1,000 embedded 3s (label 0) and 8s (label 1), and ten flipped training points, as float64.

    The test rows are all other 3s and 8s there are, told apart by their pixels.
    """
    import numpy as np

    from mlsec_jax import data

    x, y = data.select_classes(*data.mnist5k(), (3, 8))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    x, y = x[order], y[order].astype(np.int32)
    last = NUM_TRAIN + NUM_VAL
    seen = {image.tobytes() for image in x[:last]}
    try:
        pool = [data.load("mnist", split=split) for split in ("train", "test")]
    except FileNotFoundError:  # not prepared here; the report says how many test rows there were
        pool = [data.mnist5k()]
    x_all, y_all = map(np.concatenate, zip(*pool))
    x_pool, y_pool = data.select_classes(x_all, y_all, (3, 8))
    fresh = np.array([image.tobytes() not in seen for image in x_pool])
    flat = lambda images: images.reshape(len(images), -1) / 255.0
    arrays = {"x_train": flat(x[:NUM_TRAIN]), "x_val": flat(x[NUM_TRAIN:last]), "x_test": flat(x_pool[fresh])}
    arrays |= {"y_train": y[:NUM_TRAIN], "y_val": y[NUM_TRAIN:last], "y_test": y_pool[fresh]}
    chosen = rng.choice(NUM_TRAIN, POINTS, replace=False)
    return arrays | {"x_start": arrays["x_train"][chosen], "y_start": 1 - y[chosen], "C": C}


def peer(
    env: Path, arrays: dict[str, Any], setting: dict[str, Any], threads: int, limit: float, out: Path
) -> dict[str, Any]:
    """secml's history of poisons with its seconds, from a process of its own environment, or kept from an earlier run.

    The process is given no test row.
    """
    import numpy as np

    arrays = {name: value for name, value in arrays.items() if not name.endswith("_test")}
    digest = hashlib.sha256(json.dumps([setting, threads]).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + np.asarray(arrays[name]).tobytes())
    kept = out / f"secml-{digest.hexdigest()[:16]}.npz"
    if kept.is_file():
        return dict(np.load(kept))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(source, **arrays)
        script = Path(__file__).parent / "peers" / "poison_with_secml.py"  # apart: beside it, this file is `secml`
        command = [str(part) for part in (env / "bin" / "python", script, source, target, json.dumps(setting))]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "HOME": folder}
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            began = time.perf_counter()
            while process.poll() is None and time.perf_counter() - began < limit:
                time.sleep(0.5)
            if process.poll() is None:
                process.kill()  # what it had written stays, marked as unfinished
            elif process.returncode:
                raise RuntimeError(f"{script.name} ended with status {process.returncode}.")
        found = dict(np.load(target))
    if found["finished"]:
        np.savez(kept, **found)
    return found


def ours(
    step_size: float = STEP_SIZE, momentum: float = MOMENTUM, num_steps: int = NUM_STEPS
) -> tuple[Callable, Callable]:
    """`begin(data, goal) -> (state, gram, params)` and `step(state, gram, params, data, goal) -> (state, outer)`."""
    import jax
    import jax.numpy as jnp
    import optax

    import mlsec_jax as mj
    from mlsec_jax import attacks, bilevel, losses, threat

    loss_fn = losses.logistic(bilevel.glm_apply)
    l2 = 1 / (C * (NUM_TRAIN + POINTS))
    key, rows = jax.random.key(0), jnp.arange(NUM_TRAIN, NUM_TRAIN + POINTS)

    def attack(gram: Any) -> mj.Algorithm:
        trainer = bilevel.glm(losses.logistic, l2=l2, known_gram=gram, rows=rows, tolerance=1e-6)
        reach = threat.append_rows(POINTS, lo=0.0, hi=1.0)
        return attacks.bilevel(
            losses.availability(loss_fn),
            trainer,
            threat=reach,
            optimizer=optax.chain(
                attacks.unit_rows(step_size),
                optax.trace(momentum),
                optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, num_steps)),
            ),
        )

    def begin(data: mj.Data, goal: mj.Data) -> Any:
        gram = bilevel.gram(data.x)
        zero = {"w": jnp.zeros(data.x.shape[1], data.x.dtype), "b": jnp.zeros((), data.x.dtype)}
        params, _ = bilevel.glm(losses.logistic, l2=l2, known_gram=gram, rows=rows)(key, zero, data)
        known = mj.Known(params=params, goal=goal)
        return attack(gram).init(key, data, known), gram, params

    def step(state: Any, gram: Any, params: Any, data: mj.Data, goal: mj.Data) -> Any:
        state, info = attack(gram).step(key, state, data, mj.Known(params=params, goal=goal))
        return state, info["outer"]

    return begin, step


def as_data(arrays: dict[str, Any]) -> tuple[Any, Any]:
    """The training set with reserved poisons, and the attacker's validation set."""
    import mlsec_jax as mj
    from mlsec_jax import threat

    train, val, start = (mj.dataset(arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in ("train", "val", "start"))
    return threat.reserve(train, start), val


def run_ours(arrays: dict[str, Any], begin: Callable, step: Callable) -> dict[str, Any]:
    """One run, step by step: the poisons with wall and processor seconds."""
    import jax
    import numpy as np

    data, goal = as_data(arrays)
    jax.block_until_ready((data, goal))
    began = time.perf_counter(), time.process_time()
    state, gram, params = begin(data, goal)
    history = []
    for _ in range(NUM_STEPS):
        state, _ = step(state, gram, params, data, goal)
        jax.block_until_ready(state)
        history.append((time.perf_counter() - began[0], time.process_time() - began[1], state.poison))
    seconds, cpu_seconds, poisons = zip(*history)
    return {"seconds": np.array(seconds), "cpu_seconds": np.array(cpu_seconds), "poisons": np.array(poisons)}


def choice() -> dict[str, list[float]]:
    """The attacker's own validation loss at the end of each of the CHOICES on splits that are not compared."""
    import jax

    found: dict[str, list[float]] = {}
    splits = [as_data(problem(seed)) for seed in CHOICE_SPLITS]
    for step_size, momentum, num_steps in CHOICES:
        begin, step = map(jax.jit, ours(step_size, momentum, num_steps))
        losses = found[f"step {step_size}, momentum {momentum}, {num_steps} steps"] = []
        for data, goal in splits:
            state, gram, params = begin(data, goal)
            for _ in range(num_steps + 1):  # a step reports the loss of the poisons that it starts from
                state, outer = step(state, gram, params, data, goal)
            losses.append(-float(outer))
    return found


def mistakes(arrays: dict[str, Any], poisons: Any, solver: str) -> Any:
    """The victim's mistakes on the test rows `[sets, n]` for each set of poisons.

    `newton-cholesky` is exact, `liblinear` secml's own.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    found = []
    for points in poisons:
        x = np.concatenate([arrays["x_train"], points])
        y = np.concatenate([arrays["y_train"], arrays["y_start"]])
        options = {"tol": 1e-8} if solver == "newton-cholesky" else {}
        victim = LogisticRegression(C=C, solver=solver, max_iter=200, **options).fit(x, y)
        found.append(victim.predict(arrays["x_test"]) != arrays["y_test"])
    return np.array(found)


def compare(
    seed: int, env: Path, settings: list[str], repeats: int, threads: int, limit: float, out: Path
) -> dict[str, Any]:
    """One split: the curves of both, and how long ours takes to reach the other's final error."""
    import jax
    import numpy as np

    arrays = problem(seed)
    begin, step = map(jax.jit, ours())
    cold = run_ours(arrays, begin, step)
    warm = [run_ours(arrays, begin, step) for _ in range(repeats)]
    wrong = mistakes(arrays, cold["poisons"], "newton-cholesky")
    errors = wrong.mean(1)
    mine = {
        "cold_seconds": cold["seconds"],
        "cold_cpu_seconds": cold["cpu_seconds"],
        "seconds": np.median([run["seconds"] for run in warm], axis=0),
        "cpu_seconds": np.median([run["cpu_seconds"] for run in warm], axis=0),
        "error": errors,
        "error_liblinear": mistakes(arrays, cold["poisons"], "liblinear").mean(1),
    }
    peers: dict[str, Any] = {}
    for name in settings:
        theirs = peer(env, arrays, SETTINGS[name], threads, limit, out)
        entry = {key: theirs[key] for key in ("seconds", "cpu_seconds", "finished")}
        their_wrong = mistakes(arrays, theirs["poisons"], "newton-cholesky")
        entry |= {"error": their_wrong.mean(1)}
        entry |= {"error_liblinear": mistakes(arrays, theirs["poisons"], "liblinear").mean(1)}
        more = wrong[-1].astype(float) - their_wrong[-1]
        entry |= {"ours_minus_theirs": more.mean(), "standard_error": more.std(ddof=1) / np.sqrt(more.size)}
        reached = np.flatnonzero(errors >= entry["error"][-1])
        if reached.size:
            at = reached[0]
            entry["reached_at_step"] = int(at) + 1
            entry["times_faster_warm"] = entry["seconds"][-1] / mine["seconds"][at]
            entry["times_faster_warm_cpu"] = entry["cpu_seconds"][-1] / mine["cpu_seconds"][at]
            entry["times_faster_cold"] = entry["seconds"][-1] / mine["cold_seconds"][at]
            entry["times_faster_cold_cpu"] = entry["cpu_seconds"][-1] / mine["cold_cpu_seconds"][at]
        peers[name] = entry
    tested = len(arrays["y_test"])
    return {"seed": seed, "test_rows": tested, "ours": mine, "secml": peers, "load": os.getloadavg()[0]}


def many_splits(repeats: int) -> dict[str, float]:
    """Seconds of 16 splits as one program over those of one split.

    The inner axis is `map`: under `vmap` XLA's CPU backend seems to leave LAPACK for batched triangular solves, and one run of
    16 splits had not ended after 100 s.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mlsec_jax import parallel

    begin, step = ours()

    def attack(data: Any, goal: Any) -> Any:
        state, gram, params = begin(data, goal)
        body = lambda state, _: step(state, gram, params, data, goal)
        return jax.lax.scan(body, state, None, length=SPLIT_STEPS)[0].poison

    splits = [as_data(problem(seed)) for seed in range(NUM_SPLITS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *splits)
    programs = {"one": (jax.jit(attack), splits[0])}
    programs["sixteen"] = (jax.jit(parallel.spread(attack, inner="map")), stacked)
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in programs}
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    for name, (program, args) in programs.items():
        began = time.perf_counter()
        jax.block_until_ready(program(*args))
        first[name] = time.perf_counter() - began
    for _ in range(repeats):  # interleaved, so that the machine's mood is shared
        for name, (program, args) in programs.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*args))
            times[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
    middle = {name: float(np.median(values)) for name, values in times.items()}
    report = {f"seconds_{name}": value for name, value in middle.items()}
    report |= {f"cpu_seconds_{name}": float(np.median(values)) for name, values in cpu.items()}
    report |= {f"first_seconds_{name}": value for name, value in first.items()}
    report |= {
        "ratio": middle["sixteen"] / middle["one"],
        "best_ratio": min(times["sixteen"]) / min(times["one"]),
        "cpu_ratio": report["cpu_seconds_sixteen"] / report["cpu_seconds_one"],
        "first_ratio": first["sixteen"] / first["one"],
    }
    return report | {"devices": jax.device_count(), "load": os.getloadavg()[0]}


def main() -> None:
    """Runs what was asked for and writes `secml.json`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", type=Path, help="secml's environment; without it only the splits are measured")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="not among the records of `run`")
    parser.add_argument("--settings", nargs="+", default=["tutorial", "half_step"], choices=SETTINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--choose", action="store_true", help="show what our steps were chosen by, and end")
    parser.add_argument("--threads", type=int, default=1, help="of secml's OpenBLAS")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that one run of secml may take")
    args = parser.parse_args()
    _machine.choose("cpu", 2)

    import jax
    import numpy as np

    jax.config.update("jax_enable_x64", True)
    report: dict[str, Any] = {"cores": os.cpu_count(), "versions": {"jax": jax.__version__, "secml": "0.15.6"}}
    args.out.mkdir(parents=True, exist_ok=True)
    if args.choose:
        print(json.dumps(choice(), indent=1))
        return
    if args.env:
        run = lambda seed: compare(seed, args.env, args.settings, args.repeats, args.threads, args.limit, args.out)
        report["splits"] = [run(seed) for seed in args.seeds]
    report["sixteen_splits"] = many_splits(args.repeats)
    plain = lambda value: value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
    text = json.dumps(report, indent=1, default=plain)
    Path(args.out, "secml.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
