"""The main job: poisons, optimised through training, make softmax regression take 8s for 3s (MNIST)."""

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

SOURCE, TARGET, POINTS, STEPS = 8, 3, 40, 25
PAPER = "Muñoz-González et al., AISec 2017, section 4.3 and fig. 5 (MNIST, 10 splits)"


class Setting(NamedTuple):
    """One way to run the attack: the inner learning rate and T, the classes that poisons start from, the goal's clean weight."""

    learning_rate: float = 0.5
    num_steps: int = 60
    classes: tuple[int, ...] = (3, 8)
    clean_weight: float = 0.0


GATE = Setting()
REPORTED = {
    "lr01": Setting(learning_rate=0.1),
    "eights_only": Setting(classes=(8,)),
    "mixed_goal": Setting(clean_weight=1.0),
}


def split(key: jax.Array, whole: mj.Data, sizes: tuple[int, int, int], classes: tuple[int, ...]) -> Any:
    """`(train with reserved poisons, holdout, test)` of one random split."""
    split_key, start_key = jax.random.split(key)
    train, holdout, test = data.split(split_key, whole, sizes)
    swap = attacks.swap(SOURCE, TARGET)
    start = attacks.start_points(start_key, train, POINTS, rule=swap, classes=classes)
    return threat.reserve(train, start), holdout, test


def errors(predict: Callable, params: Any, test: mj.Data) -> jax.Array:
    """Error on 8s, on 3s, and on the other digits `[3]`."""
    others = [digit for digit in range(10) if digit not in (SOURCE, TARGET)]
    logits = predict(params, test.x)
    return jnp.stack([measure.error_on(logits, test, group) for group in ([SOURCE], [TARGET], others)])


def attack_one(setting: Setting, budgets: tuple[int, ...], model: Any) -> Callable:
    """`(key, train, holdout, test) -> dict` of errors: clean, label swap only, poisoned with each budget, long-trained."""
    loss_fn = losses.cross_entropy(model.apply)
    trainer = bilevel.back_gradient(loss_fn, setting.learning_rate, setting.num_steps, reversal="stored")
    long = bilevel.unrolled(loss_fn, optax.sgd(setting.learning_rate), 2000)
    reach = threat.append_rows(POINTS)

    def run(key: jax.Array, train: mj.Data, holdout: mj.Data, test: mj.Data) -> dict[str, jax.Array]:
        params = model.init(key, train.x[:1])
        goal = attacks.error_specific_goal(holdout, source=SOURCE, target=TARGET, clean_weight=setting.clean_weight)
        known = mj.Known(params=params, goal=goal)
        after = lambda rows, fit=trainer: errors(model.apply, fit(key, params, rows)[0], test)

        def with_budget(budget: jax.Array) -> dict[str, jax.Array]:
            first = lambda step, k: (jnp.arange(k) < budget, jnp.arange(k) < budget)
            attack = attacks.error_specific(
                loss_fn, trainer, threat=reach, optimizer=attacks.unit_rows(0.5), order=first
            )
            attack = combine.keep_best(attack)
            state, infos = combine.run(attack, key, train, known, num_steps=STEPS)
            present = (jnp.arange(POINTS) < budget).astype(train.weight.dtype)
            limit = lambda rows: rows._replace(weight=rows.weight.at[-POINTS:].multiply(present))
            poisoned = limit(attack.read(state, train))
            return {
                "poisoned": after(poisoned),
                "swapped": after(limit(reach.embed(train.x[-POINTS:], train))),
                "outer": infos["outer"],
                "poisons": state.best.poison,
                "rows": poisoned,
            }

        found = jax.lax.map(with_budget, jnp.asarray(budgets))
        last = jax.tree.map(lambda leaf: leaf[-1], found.pop("rows"))
        found["poisons"] = found["poisons"][-1]
        return {**found, "clean": after(train), "clean_long": after(train, long), "poisoned_long": after(last, long)}

    return run


def load(size: str) -> tuple[mj.Data, tuple[int, int, int], list[str]]:
    """The pool of digits, the sizes of a split, and what that leaves out of the paper."""
    if size == "small":
        x, y = data.mnist5k()
        return data.to_data(x, y, flatten=True), (1000, 2000, 2000), [
            "the 5,000 embedded MNIST digits, split 1000/2000/2000 (paper: 1000/4000/5000)",
            "2 splits (paper: 10)",
        ]  # fmt: skip
    x, y = data.load("mnist", split="train")
    return data.to_data(x[:20_000], y[:20_000], flatten=True), (1000, 4000, 5000), []


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Runs the gate's setting over all splits, then the settings that are reported beside it."""
    whole, sizes, reductions = load(size)
    num_splits = 2 if size == "small" else 10
    budgets = (5, 10, 20, 40) if size == "small" else (4, 8, 16, 24, 32, 40)
    model = models.softmax_regression()
    keys = jax.random.split(context.key, num_splits)

    def over_splits(setting: Setting, budgets: tuple[int, ...]) -> dict[str, np.ndarray]:
        def one(key: jax.Array) -> dict[str, jax.Array]:
            run_key, split_key = jax.random.split(key)
            return attack_one(setting, budgets, model)(run_key, *split(split_key, whole, sizes, setting.classes))

        found = jax.jit(parallel.spread(one))(keys)
        return {name: np.asarray(value) for name, value in found.items()}

    gate = context.once("gate", lambda: over_splits(GATE, budgets))
    clean, swapped, poisoned = gate["clean"].mean(0), gate["swapped"][:, -1].mean(0), gate["poisoned"][:, -1].mean(0)
    figures = {
        "error_8_clean": clean[0],
        "error_8_poisoned": poisoned[0],
        "error_8_label_swap_only": swapped[0],
        "error_3_clean": clean[1],
        "error_3_poisoned": poisoned[1],
        "error_others_clean": clean[2],
        "error_others_poisoned": poisoned[2],
        "poison_fraction": POINTS / (sizes[0] + POINTS),
        "n_splits": num_splits,
        "error_8_poisoned_std": gate["poisoned"][:, -1, 0].std(),
        "error_8_clean_victim_t2000": gate["clean_long"].mean(0)[0],
        "error_8_poisoned_victim_t2000": gate["poisoned_long"].mean(0)[0],
    }
    for name, setting in {} if size == "small" else REPORTED.items():
        found = context.once(name, lambda setting=setting: over_splits(setting, (POINTS,)))
        figures |= {
            f"error_8_clean_{name}": found["clean"].mean(0)[0],
            f"error_8_poisoned_{name}": found["poisoned"][:, -1].mean(0)[0],
            f"error_8_label_swap_only_{name}": found["swapped"][:, -1].mean(0)[0],
            f"error_others_poisoned_{name}": found["poisoned"][:, -1].mean(0)[2],
        }
    draw(context, gate, budgets, sizes)
    if size == "small":
        reductions.append("learning rate 0.1, 8s-only starts and the mixed goal are left to --size full")
    paper = {"error_8_clean": Paper(0.20, PAPER), "error_8_poisoned": Paper(0.50, PAPER)}
    return Result(figures, reductions, paper)


def draw(context: Any, gate: dict[str, np.ndarray], budgets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Two plots: some poisons, and error against their number."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 8, figsize=(10, 2.9))
    for axis, image in zip(axes.flat, gate["poisons"][0]):
        axis.imshow(image.reshape(28, 28), cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
    figure.suptitle("Poisons: training points that send 8s to 3s")
    context.save_figure(figure, "poisons")

    figure, axis = plt.subplots(figsize=(6, 4))
    numbers = np.array([0, *budgets])
    for column, name in enumerate(("8s", "3s", "other digits")):
        curve = np.concatenate([gate["clean"][:, None, column], gate["poisoned"][:, :, column]], axis=1)
        axis.errorbar(numbers, curve.mean(0), curve.std(0), marker="o", capsize=3, label=f"{name}, poisoned")
    flips = np.concatenate([gate["clean"][:, None, 0], gate["swapped"][:, :, 0]], axis=1).mean(0)
    axis.plot(numbers, flips, "k--", label="8s, labels swapped only")
    axis.set(xlabel=f"poisons among {sizes[0]} training points", ylabel="test error", ylim=(0, 1))
    axis.legend()
    context.save_figure(figure, "error_against_poisons")
