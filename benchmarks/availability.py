"""Denial of service: a dozen optimised points raise logistic regression's error (MNIST 1 against 7, and Spambase)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, bilevel, combine, data, losses, measure, models, parallel, threat

MODEL = models.logistic_regression()
LOSS = losses.logistic(MODEL.apply)
LONG = bilevel.unrolled(LOSS, optax.sgd(0.5), 1500)
PAPER = "Muñoz-González et al., AISec 2017, Spambase, logistic regression, perfect knowledge: up to 30 % at 15 % poison"
DEMO = "the authors' 1-against-7 demo, its algorithm run again in NumPy on one split (not a figure of the paper)"


class Problem(NamedTuple):
    """A data set and what the attack does to it.

    Attributes:
      prefix: of its figures.
      whole: all rows; binary labels.
      sizes: of a split into training, validation and test rows.
      points: how many poisons are added.
      budgets: the numbers of poisons on the plot, the last of them `points` or more.
      temperature: of the smooth error, in the unit of the logit.
      step_size: of each poison, along its own unit gradient.
      binary: whether the features are 0 or 1, so that a poison between them is not yet a message.
    """

    prefix: str
    whole: mj.Data
    sizes: tuple[int, int, int]
    points: int
    budgets: tuple[int, ...]
    temperature: float
    step_size: float
    binary: bool = False


class Setting(NamedTuple):
    """One way to attack: the inner learning rate and T (victim and attacker), and the steps of the outer problem.

    Attributes:
      learning_rate: of the inner problem.
      num_steps: T, likewise.
      as_published: greedy ascent of the logistic loss, one point after the other, with unit steps; else all points
        together, on the smooth error.
      outer_steps: all together, or (as published) for each point.
    """

    learning_rate: float = 0.5
    num_steps: int = 200
    as_published: bool = False
    outer_steps: int = 50


GATE = Setting()
PUBLISHED = Setting(learning_rate=0.1, num_steps=100, as_published=True, outer_steps=40)


def smooth_error(temperature: float) -> mj.base.OuterFn:
    """Minus the smooth error on the goal, `-mean σ(-s f(x) / t)`; unlike the loss, it has no use for rows far gone."""

    def outer(params: Any, train: mj.Data, goal: mj.Data) -> jax.Array:
        del train
        logit = MODEL.apply(params, goal.x)[:, 0]
        signed = jnp.where(goal.y > 0, -logit, logit)
        return -losses.weighted_mean(jax.nn.sigmoid(signed / temperature), goal.weight)

    return outer


def error(params: Any, rows: mj.Data) -> jax.Array:
    """The share of rows on the wrong side."""
    return measure.error((MODEL.apply(params, rows.x)[:, 0] > 0).astype(jnp.int32), rows)


def make_attack(problem: Problem, setting: Setting, trainer: Any, reach: mj.Threat, budget: jax.Array) -> Any:
    """`(algorithm, number of steps)` of the setting; all but the first `budget` points are absent."""
    if setting.as_published:
        order, optimizer = attacks.greedy(setting.outer_steps), attacks.unit_rows(1.0)
        attack = attacks.availability(LOSS, trainer, threat=reach, optimizer=optimizer, order=order)
        return attack, setting.outer_steps * problem.points
    first = lambda step, k: (jnp.arange(k) < budget, jnp.arange(k) < budget)
    optimizer = attacks.unit_rows(problem.step_size)
    attack = attacks.bilevel(
        smooth_error(problem.temperature), trainer, threat=reach, optimizer=optimizer, order=first
    )
    return attack, setting.outer_steps


def attack_one(problem: Problem, setting: Setting, budgets: tuple[int, ...]) -> Callable:
    """`key -> dict` for one split: test errors `[2]` (victim of the setting, victim trained long), by budget."""
    trainer = bilevel.back_gradient(LOSS, setting.learning_rate, setting.num_steps, reversal="stored")
    points = max(budgets)
    reach = threat.append_rows(points)
    flips = attacks.flip_random(num_flips=problem.points, num_classes=2, stratify=True)

    def run(key: jax.Array) -> dict[str, jax.Array]:
        split_key, start_key, flip_key, run_key = jax.random.split(key, 4)
        clean, holdout, test = data.split(split_key, problem.whole, problem.sizes)
        train = threat.reserve(clean, attacks.start_points(start_key, clean, points, rule=attacks.swap(0, 1)))
        params = MODEL.init(run_key, train.x[:1])
        known = mj.Known(params=params, goal=holdout)
        after = lambda rows: jnp.stack([error(fit(run_key, params, rows)[0], test) for fit in (trainer, LONG)])

        def with_budget(budget: jax.Array) -> dict[str, jax.Array]:
            attack, num_steps = make_attack(problem, setting, trainer, reach, budget)
            state, _ = combine.run(combine.keep_best(attack), run_key, train, known, num_steps=num_steps)
            present = (jnp.arange(points) < budget).astype(train.weight.dtype)

            def embedded(poison: jax.Array) -> mj.Data:
                rows = reach.embed(poison, train)
                return rows._replace(weight=rows.weight.at[-points:].multiply(present))

            poison = state.best.poison
            return {
                "poisoned": after(embedded(poison)),
                "rounded": after(embedded(jnp.round(poison))),
                "random_flip": after(embedded(train.x[-points:])),
                "poisons": poison,
            }

        found = jax.lax.map(with_budget, jnp.asarray(budgets))
        found["poisons"] = found["poisons"][budgets.index(problem.points)]
        existing = flips(flip_key, train, known)[0]
        return {**found, "clean": after(train), "flip_existing": after(existing)}

    return run


def load(size: str) -> tuple[list[Problem], list[str]]:
    """The problems, and what they leave out of the paper."""
    reductions = ["Spambase's features are 0 or 1, its poisons between them: spam_error_poisoned_rounded rounds them"]
    if size == "small":
        (x, y), sizes = data.mnist5k(), (100, 400, 500)
        reductions += ["1 against 7 from the 5,000 embedded MNIST digits, 500 test rows", "2 splits (paper: 10)"]
    else:
        (x, y), sizes = data.load("mnist", split="train"), (100, 400, 1697)
    x, y = data.select_classes(x[:20_000], y[:20_000], [1, 7])
    budgets: tuple[int, ...] = (4, 8, 12) if size == "small" else (2, 4, 6, 8, 10, 12)
    problems = [Problem("", data.to_data(x, y, flatten=True), sizes, 12, budgets, 0.5, 0.3)]
    try:
        mail = data.table("spambase")
    except FileNotFoundError as missing:
        if size != "small":
            raise
        return problems, [*reductions[1:], f"Spambase is left out: {missing}"]
    rows = data.to_data((mail["X"][:, :54] > 0).astype(np.float32), mail["y"].astype(np.int32))
    budgets = (6, 12, 17) if size == "small" else (3, 6, 9, 12, 15, 17, 20)
    return [*problems, Problem("spam_", rows, (100, 400, 4101), 17, budgets, 0.3, 0.1, binary=True)], reductions


def figures_of(problem: Problem, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the splits; `_victim_t1500`: of a victim trained for 1,500 steps at 0.5."""
    at = problem.budgets.index(problem.points)
    errors = {name: found[name] for name in ("clean", "flip_existing")}
    errors |= {name: found[name][:, at] for name in ("random_flip", "poisoned")}
    if problem.binary:
        errors["poisoned_rounded"] = found["rounded"][:, at]
    head = f"{problem.prefix}error_"
    figures = {f"{head}{name}": value[:, 0].mean() for name, value in errors.items()}
    figures |= {f"{head}{name}_victim_t1500": value[:, 1].mean() for name, value in errors.items()}
    figures |= {f"{head}{name}_std": errors[name][:, 0].std() for name in ("clean", "random_flip", "poisoned")}
    return figures | {f"{problem.prefix}poison_fraction": problem.points / (problem.sizes[0] + problem.points)}


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Attacks both problems over all splits; in full, also with the published recipe (greedy, loss, small rate)."""
    problems, reductions = load(size)
    num_splits = 2 if size == "small" else 10
    keys = jax.random.split(context.key, num_splits)

    def over_splits(problem: Problem, setting: Setting, budgets: tuple[int, ...]) -> dict[str, np.ndarray]:
        found = jax.jit(parallel.spread(attack_one(problem, setting, budgets)))(keys)
        return {name: np.asarray(value) for name, value in found.items()}

    figures: dict[str, Any] = {"n_splits": num_splits}
    paper: dict[str, Paper] = {}
    gate = []
    for problem in problems:
        name = problem.prefix or "mnist_"
        found = context.once(f"{name}gate", lambda p=problem: over_splits(p, GATE, p.budgets))
        figures |= figures_of(problem, found)
        gate.append(found)
        if size != "small":
            only = problem._replace(budgets=(problem.points,))
            found = context.once(f"{name}published", lambda p=only: over_splits(p, PUBLISHED, p.budgets))
            for key, value in figures_of(only, found).items():
                if "_poisoned" in key or "_random_flip" in key:
                    figures[key.replace("error_", "error_published_recipe_", 1)] = value
        values = {"error_clean": 0.016, "error_random_flip": 0.108, "error_poisoned": 0.161}
        source = {key: Paper(value, DEMO) for key, value in values.items()}
        paper |= {"spam_error_poisoned": Paper(0.30, PAPER)} if problem.prefix else source
    if size == "small":
        reductions.append("the published recipe (greedy, logistic loss, T = 100 at 0.1) is left to --size full")
    draw(context, problems, gate)
    return Result(figures, reductions, paper)


def draw(context: Any, problems: list[Problem], gate: list[dict[str, np.ndarray]]) -> None:
    """Two plots: the poisons of one split, and error against their number."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 6, figsize=(8, 3.2))
    for axis, image in zip(axes.flat, gate[0]["poisons"][0]):
        axis.imshow(image.reshape(28, 28), cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
    figure.suptitle("Twelve poisons among 1s and 7s")
    context.save_figure(figure, "poisons")

    figure, axes = plt.subplots(1, len(problems), figsize=(5.5 * len(problems), 4), squeeze=False)
    for axis, problem, found in zip(axes.flat, problems, gate):
        numbers = np.array([0, *problem.budgets])
        lines = [("optimised", "poisoned", "o-"), ("random flips", "random_flip", "k--")]
        lines += [("optimised, rounded to 0 or 1", "rounded", "s:")] * problem.binary
        for label, name, style in lines:
            curve = np.concatenate([found["clean"][:, None, 0], found[name][:, :, 0]], axis=1)
            axis.errorbar(numbers, curve.mean(0), curve.std(0), fmt=style, capsize=3, label=label)
        axis.set(xlabel="points added to 100", ylabel="test error", ylim=(0, 0.5))
        axis.set_title("Spambase" if problem.prefix else "MNIST, 1 against 7")
        axis.legend()
    context.save_figure(figure, "error_against_poisons")
