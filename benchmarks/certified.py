"""Certified accuracy against poisons and flipped labels, beside what adversaries that know everything achieve.

MNIST, the digits 1 and 7 and all ten. Four certified defenses of `mlsec_jax.defenses`, each with linear models:

- `dpa`: partition aggregation against rows added and deleted;
- `ssdpa`: the same against flipped labels;
- `bag`: bagging against rows changed, added and deleted, at confidence 99.9 %;
- `smooth`: least squares smoothed over random labels, against flipped labels.

`certified_DEFENSE_TASK_R`: the share of test images that are predicted right, and provably still so after R changes.
`attacked_...`: the accuracy on some of them, the targets, after an adversary has made R changes for each and the victim
has trained anew; `provable_...` is the certified share of the same targets, which no adversary may push below. Against
`dpa` he adds copies of the target, with the runner-up's label, that hash into R partitions whose models barely vote
for it; against `ssdpa` he flips the nearest row of R such partitions; against `bag` he adds R copies; against `smooth`
he flips the R labels of the largest α, which is the best for a linear learner. `random_...`: accuracy on all test
images with R labels flipped at random. `radius_...`: the median radius, a wrong or
uncertain prediction counted as -1. `violations` counts targets that fell within their radius: it must be 0.

References: Levine & Feizi, ICLR 2021; Jia, Cao & Gong, AAAI 2021; Rosenfeld et al., ICML 2020.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks._clean_label import embedded_digits
from benchmarks._record import Result, benchmark
from mlsec_jax import bilevel, data, defenses, losses, threat, train

TASKS = {"17": (1, 7), "ten": tuple(range(10))}
STEPS = 60
SMOOTHED = 10_000  # rows of the smoothed least squares at most, whose predictions cost time in proportion
NOISE = 0.5 / 255  # what makes the copies of a target hash elsewhere


class Size(NamedTuple):
    """What differs between the sizes.

    Attributes:
      rows: training rows at most.
      per_partition: rows in a partition, on average.
      models: of the bag.
      tests: test images.
      targets: of them that are attacked one by one.
      budgets: R.
    """

    rows: int
    per_partition: int
    models: int
    tests: int
    targets: int
    budgets: tuple[int, ...]


SIZES = {
    "small": Size(2000, 25, 100, 200, 4, (2, 8, 16)),
    "full": Size(60_000, 50, 300, 1000, 10, (20, 100, 300)),
    "paper": Size(60_000, 50, 1000, 10_000, 50, (20, 100, 300, 500)),
}


def apply_fn(params: Any, x: jax.Array, key: Any = None) -> jax.Array:
    """Softmax regression."""
    del key
    return x @ params["w"] + params["b"][None]


def digits(classes: tuple[int, ...], size: Size, fallback: bool) -> tuple[mj.Data, mj.Data, list[str]]:
    """`(training rows with some reserved, test rows, notes)`: flat images in [0, 1], labels from 0.

    With `fallback` they are the embedded digits where MNIST isn't prepared.
    """
    notes: list[str] = []
    try:
        parts = [data.load("mnist", split=split) for split in ("train", "test")]
    except FileNotFoundError:
        if not fallback:
            raise
        parts = embedded_digits()
        notes = ["5,000 embedded digits, 1,500 of them the test set, not MNIST's 60,000 and 10,000"]
    picked = [data.select_classes(x.reshape(len(x), -1).astype(np.float32) / 255, y, classes) for x, y in parts]
    (x, y), (x_test, y_test) = picked
    rows, tests = (mj.dataset(jnp.asarray(a[:n]), jnp.asarray(b[:n], jnp.int32)) for a, b, n in
                   ((x, y, size.rows), (x_test, y_test, size.tests)))  # fmt: skip
    spare = jax.tree.map(lambda leaf: leaf[: max(size.budgets)], rows)
    return threat.reserve(rows, spare), tests, notes


class Victim(NamedTuple):
    """A defense as adversaries meet it: `fit(key, params, data)`, `predict(models, x)`, and the partitions' rows.

    Attributes:
      fit: jitted; the trainer alone.
      predict: jitted.
      start: the parameters that training starts from.
      dealt: `data -> ids [k, capacity]`, each partition's rows of the data, -1 where there is none; None without any.
    """

    fit: Callable
    predict: Callable
    start: Any
    dealt: Callable | None = None


def victims(size: Size, num_rows: int, num_classes: int, dim: int) -> dict[str, Victim]:
    """The four defenses."""
    plain = bilevel.unrolled(losses.cross_entropy(apply_fn), optax.sgd(0.05, momentum=0.9), STEPS)
    trainer = train.row_space(plain, lambda path, leaf: path == "w")
    start = {"w": jnp.zeros((dim, num_classes)), "b": jnp.zeros(num_classes)}

    def jitted(pair: tuple, dealt: Callable | None = None) -> Victim:
        fit = jax.jit(lambda key, params, rows: pair[0](key, params, rows)[0])
        return Victim(fit, jax.jit(pair[1]), start, dealt)

    found = {}
    for name, labels_only in (("dpa", False), ("ssdpa", True)):
        own: dict[str, Any] = {"num_partitions": max(num_rows // size.per_partition, 1), "labels_only": labels_only}
        own["capacity"] = 2 * size.per_partition
        keep: Callable = lambda key, params, rows: (jnp.where(rows.weight > 0, rows.y, -1), {})
        deal = jax.jit(defenses.partition_aggregation(keep, apply_fn, **own)[0])
        number = lambda rows: rows._replace(y=jnp.arange(rows.num_rows, dtype=jnp.int32))
        dealt = lambda rows, deal=deal, number=number: np.asarray(deal(jax.random.key(0), None, number(rows))[0])
        found[name] = jitted(defenses.partition_aggregation(trainer, apply_fn, **own), dealt=dealt)
    draws = size.per_partition
    found["bag"] = jitted(defenses.bagging(trainer, apply_fn, num_models=size.models, num_draws=draws, num_tests=size.tests))
    found["smooth"] = jitted(defenses.label_flip_smoothing(flip_rate=0.1, l2=0.1, num_classes=num_classes))
    return found


class Aim(NamedTuple):
    """One target, and what its adversary needs: the label it has, the label it is to get, and its votes' margins, if any."""

    x: np.ndarray
    label: int
    rival: int
    margin: np.ndarray


def aims(name: str, victim: Victim, models: Any, tests: mj.Data, number: int) -> list[Aim]:
    """The first test images that are predicted right. The rival has the second most votes, or the second largest score."""
    label, info = victim.predict(models, tests.x)
    num_classes = int(jnp.max(tests.y)) + 1
    chosen = np.flatnonzero(np.asarray(label == tests.y))[:number]
    found = []
    for k in chosen:
        x, mine, margin = tests.x[k], int(label[k]), np.zeros(0)
        if name == "smooth":
            alpha = models.share + models.rows @ (x - models.mean)
            score = np.bincount(np.asarray(models.y), weights=np.asarray(alpha, np.float64), minlength=num_classes)
        else:
            score = np.asarray(info["votes"][k]).astype(float)
        score[mine] = -np.inf
        rival = int(score.argmax())
        if victim.dealt is not None:
            logits = np.asarray(jnp.einsum("d,kdc->kc", x, models["w"]) + models["b"])
            wins = logits.argmax(1) == mine
            margin = np.where(wins, logits[:, mine] - logits[:, rival], np.inf)
        found.append(Aim(np.asarray(x), mine, rival, margin))
    return found


def added(rows: mj.Data, copies: np.ndarray, label: int) -> mj.Data:
    """The rows with copies in the reserved places."""
    into = rows.num_rows - 1 - np.arange(len(copies))
    return mj.Data(rows.x.at[into].set(copies), rows.y.at[into].set(label), rows.weight.at[into].set(1))


def attack(name: str, victim: Victim, models: Any, rows: mj.Data, aim: Aim, budget: int, seed: int) -> mj.Data:
    """The training set after `budget` changes for one target, at most."""
    if name == "smooth":
        alpha = np.asarray(models.share + models.rows @ (aim.x - models.mean))
        own = np.where(np.asarray(rows.y == aim.label), alpha, -np.inf)
        return rows._replace(y=rows.y.at[np.argsort(-own)[:budget]].set(aim.rival))
    rng = np.random.default_rng(seed)
    number = budget if victim.dealt is None else 8 * len(aim.margin)
    copies = np.clip(aim.x[None] + rng.uniform(-NOISE, NOISE, (number, aim.x.size)), 0, 1).astype(np.float32)
    if victim.dealt is None:
        return added(rows, copies, aim.rival)
    weakest = np.argsort(aim.margin)[: min(budget, int(np.isfinite(aim.margin).sum()))]
    if name == "dpa":
        landed = victim.dealt(mj.dataset(copies, jnp.zeros(number, jnp.int32)))
        first = landed[weakest, 0]
        return added(rows, copies[first[first >= 0]], aim.rival)
    flipped = []
    for own in victim.dealt(rows)[weakest]:
        own = own[own >= 0]
        same = own[np.asarray(rows.y)[own] == aim.label]
        if same.size:
            near = np.square(np.asarray(rows.x)[same] - aim.x[None]).sum(1)
            flipped.append(same[near.argmin()])
    return rows._replace(y=rows.y.at[np.array(flipped, int)].set(aim.rival))


def judge(name: str, victim: Victim, rows: mj.Data, tests: mj.Data, size: Size, key: jax.Array) -> dict[str, Any]:
    """One defense on one task: certified, attacked and, where labels are what it guards, under random flips."""
    models = victim.fit(key, victim.start, rows)
    label, info = victim.predict(models, tests.x)
    right, radii = np.asarray(label == tests.y), np.asarray(info["radius"])
    figures: dict[str, Any] = {"accuracy": right.mean(), "radius": np.median(np.where(right, radii, -1))}
    targets = aims(name, victim, models, tests, size.targets)
    radius = radii[np.flatnonzero(right)[: len(targets)]]
    violations = 0
    for budget in size.budgets:
        figures[f"certified_{budget}"] = (right & (radii >= budget)).mean()
        held = []
        for k, aim in enumerate(targets):
            poisoned = victim.fit(key, victim.start, attack(name, victim, models, rows, aim, budget, k))
            held.append(int(victim.predict(poisoned, jnp.asarray(aim.x)[None])[0][0]) == aim.label)
        figures[f"attacked_{budget}"] = np.mean(held)
        figures[f"provable_{budget}"] = np.mean(radius >= budget)
        violations += int(np.sum((radius >= budget) & ~np.array(held)))
        if name in ("ssdpa", "smooth"):
            rng = np.random.default_rng(budget)
            places = rng.choice(np.flatnonzero(np.asarray(rows.weight)), budget, replace=False)
            classes = int(jnp.max(tests.y)) + 1
            shift = jnp.asarray(rng.integers(1, classes, budget), jnp.int32)
            flipped = rows._replace(y=rows.y.at[places].set((rows.y[places] + shift) % classes))
            again = victim.predict(victim.fit(key, victim.start, flipped), tests.x)[0]
            figures[f"random_{budget}"] = np.mean(np.asarray(again) == np.asarray(tests.y))
    return figures | {"violations": violations, "n_targets": len(targets)}


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Every defense on both tasks."""
    chosen = SIZES[size]
    figures: dict[str, Any] = {}
    notes: list[str] = []
    violations = n_trials = 0
    for task, classes in TASKS.items():
        rows, tests, notes = digits(classes, chosen, fallback=size == "small")
        num_rows = int(np.count_nonzero(rows.weight))
        for name, victim in victims(chosen, num_rows, len(classes), rows.x.shape[1]).items():
            own = jax.tree.map(lambda leaf: leaf[:SMOOTHED], rows) if name == "smooth" else rows
            found = context.once(f"{name}-{task}", functools.partial(judge, name, victim, own, tests, chosen, context.key))
            violations += found.pop("violations")
            n_trials += found.pop("n_targets") * len(chosen.budgets)
            for key, value in found.items():
                kind, _, budget = key.partition("_")
                figures["_".join(part for part in (kind, name, task, budget) if part)] = value
    reductions = [
        *notes,
        f"{chosen.rows} training and {chosen.tests} test images at most (60,000 and 10,000)",
        f"linear models of {STEPS} steps on {chosen.per_partition} rows each, without augmentation, not convolutional networks",
        f"a bag of {chosen.models} models (1,000)",
        f"label-flip smoothing on raw pixels of {SMOOTHED:,} images at most, not on features learned without labels",
    ]
    _draw(context, figures, chosen)
    return Result({**figures, "violations": violations, "n_trials": n_trials}, reductions)


def _draw(context: Any, figures: dict[str, Any], size: Size) -> None:
    """Certified accuracy against R, and what the adversaries leave of the targets."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(4.5 * len(TASKS), 3.5), sharey=True)
    for axis, task in zip(axes, TASKS):
        for k, name in enumerate(("dpa", "ssdpa", "bag", "smooth")):
            proven = [figures[f"accuracy_{name}_{task}"], *(figures[f"certified_{name}_{task}_{R}"] for R in size.budgets)]
            axis.plot([0, *size.budgets], proven, f"C{k}o-", label=name)
            axis.plot(size.budgets, [figures[f"attacked_{name}_{task}_{R}"] for R in size.budgets], f"C{k}x")
        axis.set(xlabel="changes R (crosses: targets under attack)", title=f"digits {task}", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("certified accuracy")
    axes[0].legend()
    context.save_figure(figure, "certified")
