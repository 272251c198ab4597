"""Backdoor learning curves: what regularises a linear model also slows the learning of a backdoor (MNIST 7 against 1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import bilevel, data, losses, measure, models, scores, threat

PAPER = "Cinà et al., arXiv:2106.07214, computed from the pickles and CSVs of the authors' repository (one seed, 999)"
SWEPT = "Cinà et al., arXiv:2106.07214, from the slope CSV of the authors' repository (mean of 5 seeds, trigger 3x3)"
AUTHORS, SWEPT_SEEDS = 999, (1, 10, 11, 100, 101)  # the authors' seeds: of rows and of the table, and of the sweep
POISONED = 0.1
STEP = 1e-7  # in β, of the differences that the slope is held to: over 1e-6 a machine's margin set can change
BETAS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 19, 24, 29, 36, 44, 54, 66, 81, 99)  # per cent
FEW = (0, 3, 10, 24, 54, 99)  # for the machines, whose fits don't profit from the last one
SWEEP = np.geomspace(1e-4, 1e2, 10)
TOP = 7  # influential training images drawn
EXPLAINED, NUM_TESTS = {"lc_10": "λ = 10", "lc_001": "λ = 0.01"}, 5
COLUMNS = ("backdoor_0", "backdoor_10", "backdoor_99", "clean_0", "clean_99", "backdoor_accuracy", "nu", "rho_0", "rho")
LOSSES = COLUMNS[:5]
TABLE = {  # name: kind, C, the published row
    "lc_10": ("lc", 0.1, (5.08, 2.42, 0.271, 0.052, 0.087, 0.940, 0.289, 2.57, 4.30)),
    "lc_001": ("lc", 100.0, (16.4, 0.099, 0.053, 0.046, 0.062, 0.986, 0.228, 14.1, 23.2)),
    "svm_100": ("svm", 0.01, (2.66, 2.21, 0.493, 0.064, 0.092, 0.782, 0.283, 0.879, 1.55)),
    "svm_01": ("svm", 10.0, (3.91, 0.056, 0.056, 0.036, 0.052, 0.980, 0.204, 2.89, 4.91)),
    "rc_1000": ("rc", 1e-3, (3.30, 2.89, 1.39, 0.139, 0.176, 0.398, 0.193, 0.384, 0.538)),
    "rc_1": ("rc", 1.0, (3.85, 0.110, 0.107, 0.118, 0.115, 0.998, 0.075, 3.41, 3.74)),
}
SWEPT_AT = {0: (0.944, 0.056), 7: (0.985, 0.950)}  # the published (clean, backdoor) accuracy where the two grids meet
RBF = {"rbf_g0005_c1": (5e-4, 1.0), "rbf_g0005_c100": (5e-4, 100.0), "rbf_g005_c1": (5e-3, 1.0), "rbf_g005_c100": (5e-3, 100.0)}


class Rows(NamedTuple):
    """One split: poisoned training rows, which of them those are, clean test rows, and the same rows triggered."""

    train: mj.Data
    poisoned: jax.Array
    clean: mj.Data
    triggered: mj.Data


class Victim(NamedTuple):
    """A learner: its start, its decision function, its per-example loss, what ν and ρ look at, and whether it warms up."""

    trainer: Any
    start: Any
    apply_fn: Callable
    loss_fn: Callable
    weights_fn: Callable
    warm_start: bool


def liblinear(a: jax.Array, b: jax.Array) -> jax.Array:
    """The linear kernel with a bias that is penalised like a weight."""
    return a @ b.T + 1


def squared(apply_fn: Callable) -> Callable:
    """`(1 - y f)²` for labels ±1."""
    half = losses.squared(apply_fn)
    return lambda params, rows, key=None: 2 * half(params, rows, key)


def victim(kind: str, C: Any, gamma: Any = None) -> Victim:
    """scikit-learn's learner of that name and C: logistic (liblinear), linear SVM (liblinear), ridge, RBF SVM; a net."""
    start = {"w": jnp.zeros(784), "b": jnp.zeros(())}
    flat = lambda params: params["w"]
    newton = bilevel.newton(tolerance=1e-8)
    if kind == "lc":
        loss_fn = losses.logistic(bilevel.glm_apply)
        objective = losses.summed(loss_fn, C=C, penalise=None)
        return Victim(bilevel.implicit(objective, solver=newton), start, bilevel.glm_apply, loss_fn, flat, True)
    if kind == "rc":
        loss_fn = squared(bilevel.glm_apply)
        objective = losses.summed(loss_fn, C=C)
        return Victim(bilevel.implicit(objective, solver=newton), start, bilevel.glm_apply, loss_fn, flat, True)
    if kind == "net":
        net = models.mlp(widths=(16,), num_classes=1)
        loss_fn = losses.logistic(net.apply)
        decay = optax.chain(optax.add_decayed_weights(C), optax.sgd(0.05, momentum=0.9))
        begin = net.init(jax.random.key(0), jnp.zeros((1, 784)))
        as_row = lambda params: jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])
        return Victim(bilevel.unrolled(loss_fn, decay, 100), begin, net.apply, loss_fn, as_row, False)
    kernel = liblinear if kind == "svm" else bilevel.rbf(gamma)
    apply_fn = bilevel.svm_apply(kernel)
    trainer = bilevel.kkt_svm(kernel=kernel, bias=kind == "rbf", C=C)
    weights_fn = (lambda params: params.coef @ params.support) if kind == "svm" else (lambda params: params.coef)
    return Victim(trainer, None, apply_fn, losses.hinge(apply_fn), weights_fn, False)


def poisoned_rows(train: mj.Data, test: mj.Data, poisoned: jax.Array, side: int, seed: int) -> Rows:
    """Each class has a trigger of its own, drawn by the seed as the authors draw it; labels become ±1."""
    patterns = jnp.asarray(np.random.RandomState(seed).rand(2, side, side, 1), train.x.dtype)
    per_image = lambda mask: mask[:, None, None, None]

    def stamped(rows: mj.Data) -> mj.Data:
        first, second = (threat.patch(pattern)(None, rows.x) for pattern in patterns)
        return mj.Data(jnp.where(per_image(rows.y == 0), first, second), threat.to_next(2)(rows.y), rows.weight)

    bad = stamped(train)
    mixed = mj.Data(jnp.where(per_image(poisoned), bad.x, train.x), jnp.where(poisoned, bad.y, train.y), train.weight)
    as_rows = lambda rows: rows._replace(x=rows.x.reshape(rows.num_rows, -1), y=2 * rows.y - 1)
    return Rows(as_rows(mixed), poisoned, as_rows(test), as_rows(stamped(test)))


def draw_rows(key: jax.Array, pools: tuple[mj.Data, mj.Data], sizes: tuple[int, int], side: int) -> Rows:
    """Our own draw: rows of both pools, poisons from both classes; the authors' triggers."""
    train_key, test_key, rows_key = jax.random.split(key, 3)
    (train,), (test,) = (data.split(k, pool, (n,)) for k, pool, n in zip((train_key, test_key), pools, sizes, strict=True))
    poisoned = jax.random.permutation(rows_key, sizes[0]) < round(POISONED * sizes[0])
    return poisoned_rows(train, test, poisoned, side, AUTHORS)


def authors_rows(pools: tuple[mj.Data, mj.Data], sizes: tuple[int, int], side: int, seed: int) -> Rows:
    """The authors' own draw from MNIST's official order (their `load_mnist` on secml's loader).

    Their seed chooses the rows, `seed` the poisons and the triggers (the same one, but for the sweep). One row more than
    asked for is drawn to train on, and held out by a second draw; each class's first rows are tested.
    """
    (num_train, num_test), (train, test) = sizes, pools
    sample = lambda population, n, seed: np.random.RandomState(seed).permutation(population)[:n]
    rows = sample(train.num_rows, num_train + 1, AUTHORS)[sample(num_train + 1, num_train + 1, AUTHORS)[1:]]
    first = np.sort(np.concatenate([np.flatnonzero(test.y == label)[: num_test // 2] for label in (0, 1)]))
    first = first[sample(num_test, num_test, AUTHORS)]
    poisoned = np.isin(np.arange(num_train), sample(num_train, int(POISONED * num_train), seed))
    train, test = (jax.tree.map(lambda leaf, at=at: leaf[at], pool) for pool, at in ((train, rows), (test, first)))
    return poisoned_rows(train, test, jnp.asarray(poisoned), side, seed)


def judge(learner: Victim, rows: Rows) -> Callable:
    """`params -> dict`: the losses and accuracies on clean and triggered test rows, and the weights."""
    mean_loss = losses.empirical(learner.loss_fn)

    def measured(params: Any) -> dict[str, jax.Array]:
        right = lambda test: jnp.mean(jnp.sign(learner.apply_fn(params, test.x).reshape(-1)) == test.y)
        found = {"clean": mean_loss(params, rows.clean), "backdoor": mean_loss(params, rows.triggered)}
        found |= {"clean_accuracy": right(rows.clean), "backdoor_accuracy": right(rows.triggered)}
        return {**found, "weights": learner.weights_fn(params)}

    return measured


def curve(kind: str) -> Callable:
    """`(betas, C, gamma, rows) -> dict` along the path, and the slope and θ of the backdoor loss at its start."""

    def run(betas: jax.Array, C: Any, gamma: Any, rows: Rows) -> dict[str, jax.Array]:
        learner = victim(kind, C, gamma)
        measured = judge(learner, rows)
        path, info = measure.backdoor_learning_curve(
            jax.random.key(0), learner.trainer, learner.start, rows.train, rows.poisoned, measured,
            betas=betas, warm_start=learner.warm_start,
        )  # fmt: skip
        found = dict(path.losses)
        gram = bilevel.rbf(gamma)(rows.train.x, rows.train.x) if kind == "rbf" else None
        moved = measure.parameter_deviation(found.pop("weights"), gram)
        first = jax.tree.map(lambda leaf: leaf[0], path.params) if learner.warm_start else learner.start
        begun = slope(learner, first, rows)
        worst = jnp.max(info["stationarity"]) if "stationarity" in info else jnp.zeros(())
        return {**found, "nu": moved.angle, "rho": moved.norm, "slope": begun.slope, "theta": begun.theta, "worst": worst}

    return jax.jit(run)


def slope(learner: Victim, start: Any, rows: Rows) -> measure.LearningSlope:
    """Of the loss on triggered test rows at β = 0."""
    goal = lambda params: losses.empirical(learner.loss_fn)(params, rows.triggered)
    return measure.learning_slope(jax.random.key(0), learner.trainer, start, rows.train, rows.poisoned, goal)


def influential(C: Any, rows: Rows, num_tests: int) -> dict[str, jax.Array]:
    """The influence of every training row on each of some triggered test rows, in the logistic model of that C `[m, n]`."""
    learner = victim("lc", C)
    params, _ = learner.trainer(jax.random.key(0), learner.start, rows.train)
    score = scores.influence(learner.loss_fn, learner.trainer)

    def one(test: mj.Data) -> jax.Array:
        holdout = jax.tree.map(lambda leaf: leaf[None], test)
        return score(jax.random.key(0), params, rows.train, mj.Known(holdout=holdout))

    return {"influence": jax.lax.map(one, jax.tree.map(lambda leaf: leaf[:num_tests], rows.triggered))}


def load(size: str) -> tuple[Any, Any, tuple[int, int], list[str]]:
    """The 7s and 1s to train on, those to test on, the sizes drawn from them, and what that leaves out of the paper."""
    if size == "small":
        note = "the 1,000 embedded MNIST 1s and 7s, in our own draws: 300 train, 500 test (paper: 1500 and 500)"
        images, digits = data.mnist5k()
        x, y = data.select_classes(images, digits, (7, 1))
        order = np.asarray(jax.random.permutation(jax.random.key(0), len(y)))
        return (x[order[:500]], y[order[:500]]), (x[order[500:]], y[order[500:]]), (300, 500), [note]

    def pair(split: str) -> tuple[np.ndarray, np.ndarray]:
        images, digits, index = data.load("mnist", split=split, index=True)
        order = np.argsort(index)
        return data.select_classes(images[order], digits[order], (7, 1))

    return pair("train"), pair("test"), (1500, 500), []


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """The table's curves on the authors' rows and our own, the sweep of C, RBF machines and a network, in float64."""
    train, test, sizes, reductions = load(size)
    num_own = {"small": 2, "full": 3, "paper": 5}[size]
    official = size != "small"
    few = BETAS if size == "paper" else FEW
    reductions.append("RBF machines and a network at few points, on the first draw; no published figure is compared there")
    if size != "paper":
        reductions.append(f"β at {len(FEW)} of the 20 points for support vector machines")
    with jax.enable_x64(True):
        as_pool = lambda part: data.to_data(*part, channel=True, dtype=jnp.float64)
        pools = as_pool(train), as_pool(test)
        drawn = jax.jit(draw_rows, static_argnums=(2, 3))
        theirs = partial(authors_rows, pools, sizes)
        own = lambda side: [partial(drawn, key, pools, sizes, side) for key in jax.random.split(jax.random.key(seed), num_own)]
        draws = [partial(theirs, 6, AUTHORS)] * official + own(6)
        swept = [partial(theirs, 3, each) for each in SWEPT_SEEDS] if official else own(3)
        curves = {kind: curve(kind) for kind in ("lc", "svm", "rc", "rbf", "net")}

        def path(kind: str, C: float, gamma: float, rows: Rows, percent: tuple[int, ...]) -> dict[str, np.ndarray]:
            betas = jnp.asarray([0, STEP, 2 * STEP, *(np.asarray(percent[1:]) / 100)])
            return curves[kind](betas, C, gamma, rows)

        def sweep(kind: str, rows: Rows) -> dict[str, np.ndarray]:
            """Both ends of the curve, and its slope, at every C."""
            each = [curves[kind](jnp.asarray([0.0, 1.0]), C, 1.0, rows) for C in SWEEP]
            return jax.tree.map(lambda *leaves: np.stack(leaves), *each)

        found: dict[Any, Any] = {}
        for k, rows_of in enumerate(context.progress(draws, "draws")):
            rows = rows_of()
            for name, (kind, C, _) in TABLE.items():
                percent = few if kind == "svm" else BETAS
                found[name, k] = context.once(f"{name}-{k}", partial(path, kind, C, 1.0, rows, percent))
        for k, rows_of in enumerate(context.progress(swept, "sweeps")):
            thin = rows_of()
            for kind in ("lc", "svm", "rc"):
                found[f"sweep_{kind}", k] = context.once(f"sweep-{kind}-{k}", partial(sweep, kind, thin))
        rows, thin = draws[0](), swept[0]()
        for name, (gamma, C) in RBF.items():
            found[name] = context.once(name, partial(path, "rbf", C, gamma, rows, (0, 10, 99)))
        found["net"] = context.once("net", partial(path, "net", 1e-4, 1.0, rows, FEW))
        explain = jax.jit(lambda C, rows: influential(C, rows, NUM_TESTS))
        for name in EXPLAINED:
            item = context.once(f"influence-{name}", partial(explain, TABLE[name][1], thin))
            found["influence", name] = item["influence"]
        thin = jax.tree.map(np.asarray, thin)

    figures, paper = summary(found, official, num_own, len(swept), few)
    figures |= {f"influential_poisons_{n}": poison_share(found["influence", n], thin.poisoned) for n in EXPLAINED}
    draw_curves(context, found, len(draws), few)
    draw_sweep(context, found, len(swept))
    draw_influence(context, found, thin)
    return Result(figures, reductions, paper)


def poison_share(influence: np.ndarray, poisoned: np.ndarray) -> float:
    """The share of poisons among the `TOP` most influential rows, over the test rows."""
    return poisoned[np.argsort(-np.abs(influence), axis=1)[:, :TOP]].mean()


def row_of(path: dict[str, np.ndarray], percent: tuple[int, ...]) -> np.ndarray:
    """The columns of the table, from one path (whose points 1 and 2 belong to the differences)."""
    ten = percent.index(10) + 2
    loss, clean = path["backdoor"], path["clean"]
    end = path["backdoor_accuracy"][-1], path["nu"][-1], path["rho"][0], path["rho"][-1]
    return np.array([loss[0], loss[ten], loss[-1], clean[0], clean[-1], *end])


def slope_gap(path: dict[str, np.ndarray]) -> float:
    """The relative distance of the slope to one-sided differences in β."""
    first, second, third = path["backdoor"][:3]
    difference = (-3 * first + 4 * second - third) / (2 * STEP)
    return abs(path["slope"] - difference) / abs(difference)


def summary(
    found: dict, official: bool, num_own: int, num_swept: int, few: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, Paper]]:
    """The figures, of the authors' rows or else of the mean over our own, and the published ones."""
    figures, paper, off, inside, gaps, worst = {}, {}, [], [], [], []
    shown = slice(1 if official else None)
    for name, (kind, _, published) in TABLE.items():
        paths = [found[name, k] for k in range(official + num_own)]
        table = np.stack([row_of(path, few if kind == "svm" else BETAS) for path in paths])
        compared, own = table[shown].mean(axis=0), table[official:]
        for column, (key, value) in enumerate(zip(COLUMNS, published, strict=True)):
            figures[f"{name}_{key}"] = compared[column]
            paper[f"{name}_{key}"] = Paper(value, PAPER)
            if key in LOSSES:
                figures[f"{name}_{key}_own"] = own[:, column].mean()
                figures[f"{name}_{key}_own_std"] = own[:, column].std()
                inside.append(own[:, column].min() <= value <= own[:, column].max())
        off.append(np.abs(compared / published - 1)[: len(LOSSES)])
        figures[f"{name}_losses_within_10_percent"] = np.mean(off[-1] <= 0.1)
        figures[f"{name}_theta"] = np.mean([path["theta"] for path in paths[shown]])
        gaps += [slope_gap(path) for path in paths]
        worst += [path["worst"] for path in paths]
    for kind in ("lc", "svm", "rc"):
        sweep = {key: np.mean([found[f"sweep_{kind}", k][key] for k in range(num_swept)], axis=0) for key in
                 ("theta", "clean_accuracy", "backdoor_accuracy")}  # fmt: skip
        for i in range(len(SWEEP)):
            figures |= {f"lambda_{kind}_{i}": 1 / SWEEP[i], f"theta_{kind}_{i}": sweep["theta"][i]}
            figures[f"sweep_{kind}_clean_accuracy_{i}"] = sweep["clean_accuracy"][i, -1]
            figures[f"sweep_{kind}_backdoor_accuracy_{i}"] = sweep["backdoor_accuracy"][i, -1]
    for i, pair in SWEPT_AT.items():
        for key, value in zip(("clean_accuracy", "backdoor_accuracy"), pair, strict=True):
            paper[f"sweep_lc_{key}_{i}"] = Paper(value, SWEPT)
    for name in (*RBF, "net"):
        path = found[name]
        ends = {"backdoor_0": path["backdoor"][0], "backdoor_99": path["backdoor"][-1], "theta": path["theta"]}
        ends |= {"nu": path["nu"][-1], "rho_0": path["rho"][0], "rho": path["rho"][-1]}
        figures |= {f"{name}_{key}": value for key, value in ends.items()}
        gaps.append(slope_gap(path))
        worst.append(path["worst"])
    figures |= {"losses_within_10_percent": np.mean(np.stack(off) <= 0.1), "loss_gap_max": np.max(off)}
    figures["losses_within_range_of_own_seeds"] = np.mean(inside)
    figures |= {"slope_gap_median": np.median(gaps), "slope_gap_max": max(gaps), "stationarity": max(worst)}
    return {**figures, "n_seeds": num_own}, paper


def draw_curves(context: Any, found: dict, num_draws: int, few: tuple[int, ...]) -> None:
    """Loss on triggered and clean rows against β, and ρ against ν, for every row of the table."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(TABLE), figsize=(3 * len(TABLE), 8))
    for column, (name, (kind, C, _)) in enumerate(TABLE.items()):
        keep = np.r_[0, 3 : 2 + len(few if kind == "svm" else BETAS)]
        betas = np.asarray(few if kind == "svm" else BETAS) / 100
        for k in range(num_draws):
            path = {key: found[name, k][key] for key in ("backdoor", "clean", "nu", "rho")}
            axes[0, column].plot(betas, path["backdoor"][keep], color="tab:red", alpha=0.6)
            axes[1, column].plot(betas, path["clean"][keep], color="tab:blue", alpha=0.6)
            axes[2, column].plot(path["rho"][keep], path["nu"][keep], "o-", markersize=3, color="tab:gray", alpha=0.8)
        axes[0, column].set(title=f"{kind.upper()}, λ = {1 / C:g}", xlabel="β", yscale="log")
        axes[1, column].set(xlabel="β")
        axes[2, column].set(xlabel="ρ")
    for row, label in enumerate(("backdoor test loss", "clean test loss", "ν")):
        axes[row, 0].set_ylabel(label)
    figure.tight_layout()
    context.save_figure(figure, "curves")


def draw_sweep(context: Any, found: dict, num_swept: int) -> None:
    """θ and both accuracies against λ = 1/C."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), sharey=True)
    for axis, kind in zip(axes, ("lc", "svm", "rc"), strict=True):
        mean = lambda key, kind=kind: np.mean([found[f"sweep_{kind}", k][key] for k in range(num_swept)], axis=0)
        axis.plot(1 / SWEEP, mean("theta"), "o-", label="θ at β = 0")
        axis.plot(1 / SWEEP, mean("clean_accuracy")[:, -1], "s--", label="clean accuracy, β = 1")
        axis.plot(1 / SWEEP, mean("backdoor_accuracy")[:, -1], "^--", label="backdoor accuracy, β = 1")
        axis.set(xscale="log", xlabel="λ = 1/C", title=kind.upper())
    axes[0].legend(fontsize=8, loc="lower left")
    context.save_figure(figure, "slope")


def draw_influence(context: Any, found: dict, rows: Rows) -> None:
    """A triggered test image and the training images of greatest influence on its loss; poisons are framed in red."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1 + TOP, figsize=(1.5 * (1 + TOP), 3.8))
    for line, (name, label) in enumerate(EXPLAINED.items()):
        influence = found["influence", name][0]
        chosen = np.argsort(-np.abs(influence))[:TOP]
        images = [rows.triggered.x[0], *rows.train.x[chosen]]
        titles = [f"{label}: test", *(f"{influence[i]:+.2g}" for i in chosen)]
        for column, (axis, image, title) in enumerate(zip(axes[line], images, titles, strict=True)):
            axis.imshow(image.reshape(28, 28), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=8)
            axis.set(xticks=[], yticks=[])
            if column and rows.poisoned[chosen[column - 1]]:
                axis.spines[:].set(color="tab:red", linewidth=3)
    context.save_figure(figure, "influence")
