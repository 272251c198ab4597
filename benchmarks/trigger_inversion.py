"""Trigger reconstruction: which of many models are backdoored, for which label, and by what.

A zoo of small digit classifiers, each with its own initialisation, batches and rows: some clean, some with BadNets' white
square of 4 x 4 in 10 % of the rows and one target label each. For every model the smallest trigger of every label is
reconstructed, and the model's anomaly index is the largest of its labels'. The threshold is calibrated on clean models
that are used for nothing else, for 5 % false alarms of models; rates are of the others. `iou`, `precision`, `recall` and
`f1` compare the mask (above ½) that was reconstructed for the true target with the square, `fidelity` is its success on
test rows. `asr_after`, `accuracy_after` and `filter` are of the repairs with the trigger of the label that stood out for
Neural Cleanse, whether or not it is the target; `fine_tune` is unlearning without stamped rows. The seconds are of
searches that all take the same number of steps.

References: Wang et al., "Neural Cleanse", IEEE S&P 2019; Guo et al., "TABOR", arXiv:1908.01763.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mlsec_jax as mj
from benchmarks import _zoo
from benchmarks._clean_label import share, trials
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, defenses, losses, measure, models, train

POISONED = 0.1
FALSE_ALARMS = 0.05
METHODS: dict[str, defenses.Inversion] = {"nc": defenses.neural_cleanse(), "tabor": defenses.tabor()}
PAPER = "Wang et al., IEEE S&P 2019: MNIST, infected models have an index above 3, clean ones below 2"


class Size(NamedTuple):
    """What differs between the sizes."""

    model: models.Model
    rows: int  # each model is trained on
    epochs: int
    calibration: int  # clean models for the threshold
    clean: int  # clean models that are judged
    infected: int
    search: dict  # of `invert_trigger`
    defender: int  # clean rows
    test: int
    false_alarms: float = FALSE_ALARMS


SIZES = {
    "small": Size(
        models.mlp(widths=(32,)), 2000, 6, calibration=4, clean=2, infected=2, defender=300, test=1000, false_alarms=0.2,
        search={"num_steps": 150, "num_batches": 1, "batch_size": 32},
    ),
    "full": Size(
        models.mlp(widths=(64,)), 10_000, 8, calibration=39, clean=20, infected=20, defender=1000, test=2000,
        search={"num_steps": 300, "num_batches": 1, "batch_size": 32},
    ),
    "paper": Size(_zoo.NET, 50_000, 5, calibration=39, clean=40, infected=40, defender=2000, test=10_000, search={}),
}  # fmt: skip


def fit(key: jax.Array, model: models.Model, pool: mj.Data, target: jax.Array, size: Size) -> Any:
    """A model trained on rows drawn from the pool, stamped and relabelled to the target; clean if that is negative."""
    rows_key, poison_key, init_key, train_key = jax.random.split(key, 4)
    rows = jax.tree.map(lambda leaf: leaf[jax.random.permutation(rows_key, pool.num_rows)[: size.rows]], pool)
    relabel = lambda y: jnp.full_like(y, target)
    attack = attacks.badnets(_zoo.SQUARE, num_poisons=round(POISONED * size.rows), relabel=relabel)
    poisoned, _ = attack(poison_key, rows, mj.Known())
    rows = jax.tree.map(lambda bad, good: jnp.where(target >= 0, bad, good), poisoned, rows)
    loss_fn = losses.cross_entropy(model.apply)
    learn = train.scratch(loss_fn, num_epochs=size.epochs, batch_size=100, num_rows=size.rows, learning_rate=0.1)
    return learn(train_key, model.init(init_key, rows.x[:1]), rows)[0]


def trial(size: Size, over: str) -> Callable:
    """One model: trained, inspected by both methods, and repaired by what Neural Cleanse found."""
    model = size.model

    def says(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: jnp.argmax(model.apply(params, row[None])[0]), x, batch_size=500)

    def judged(params: Any, test: mj.Data, stamped: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        return measure.accuracy(says(params, test.x), test), success(says(params, stamped), test, target)

    def success(said: jax.Array, test: mj.Data, target: jax.Array) -> jax.Array:
        return losses.weighted_mean((said == target).astype(jnp.float32), (test.y != target).astype(jnp.float32))

    def repairs(key: jax.Array, params: Any, known: mj.Known, label: jax.Array, test: mj.Data, target: jax.Array) -> dict:
        stamped = _zoo.SQUARE(None, test.x)
        num_rows, loss_fn = known.clean.num_rows, losses.cross_entropy(model.apply)
        tune = train.scratch(loss_fn, num_epochs=1, batch_size=32, num_rows=num_rows, learning_rate=0.05)
        unlearnt, _ = defenses.unlearn_trigger(tune)(key, params, known)
        control, _ = defenses.unlearn_trigger(tune, fraction=0.0)(key, params, known)
        pruned, _ = defenses.prune_trigger(model.apply, model.features, label=label)(key, params, known)
        watch = defenses.trigger_neurons(model.features)
        score = lambda x: watch(key, params, mj.dataset(x, jnp.zeros(len(x), jnp.int32)), known)
        threshold = jnp.quantile(score(known.clean.x), 0.95)
        alarm = lambda x: (score(x) > threshold).astype(jnp.float32)
        found = {"filter_false": jnp.mean(alarm(test.x))}
        found["filter_caught"] = losses.weighted_mean(alarm(stamped), (test.y != target).astype(jnp.float32))
        for name, changed in {"unlearn": unlearnt, "fine_tune": control, "prune": pruned}.items():
            found[f"accuracy_{name}"], found[f"asr_{name}"] = judged(changed, test, stamped, target)
        return found

    def run(key: jax.Array, target: jax.Array, pool: mj.Data, clean: mj.Data, test: mj.Data) -> dict[str, jax.Array]:
        fit_key, inspect_key, repair_key = jax.random.split(key, 3)
        params = fit(fit_key, model, pool, target, size)
        known = mj.Known(clean=clean)
        found: dict[str, jax.Array] = {}
        found["accuracy"], found["asr"] = judged(params, test, _zoo.SQUARE(None, test.x), target)
        for name, objective in METHODS.items():
            inspect = defenses.invert_trigger(
                model.apply, num_classes=_zoo.CLASSES, objective=objective, over=over, **size.search
            )
            record = inspect(inspect_key, params, known)
            best = record.trigger(jnp.maximum(target, 0))
            found[f"{name}_fidelity"] = success(says(params, best(None, test.x)), test, target)
            found |= {f"{name}_index": measure.anomaly_index(record.metric), f"{name}_mask": best.mask}
            found |= {f"{name}_size": record.size, f"{name}_pattern": best.pattern}
            if name == "nc":
                label = jnp.argmax(found["nc_index"])
                known_trigger = known.replace(trigger=record.trigger(label))
        return found | repairs(repair_key, params, known_trigger, label, test, target)

    return run


def overlap(masks: np.ndarray) -> dict[str, float]:
    """How well masks `[n, h, w]` above ½ cover the square: means of IoU, precision, recall and F1."""
    blank = jnp.zeros((1, *masks.shape[1:], 1))
    true = np.asarray(_zoo.SQUARE(None, blank))[0, :, :, 0] > 0
    found = masks > 0.5
    both, either, size = ((v & true).sum(axis=(1, 2)) if k == 0 else v.sum(axis=(1, 2)) for k, v in
                          enumerate((found, found | true, found)))  # fmt: skip
    precision, recall = both / np.maximum(size, 1), both / true.sum()
    f1 = 2 * both / (size + true.sum())
    return {"iou": (both / either).mean(), "precision": precision.mean(), "recall": recall.mean(), "f1": f1.mean()}


def seconds(size: Size, params: Any, clean: mj.Data, over: str) -> dict[str, float]:
    """The time a label takes, all of them in one program and one alone: the least of three runs of equal steps."""
    options = {**size.search, "num_classes": _zoo.CLASSES, "objective": METHODS["nc"], "early_stop": 10**6, "over": over}
    parts = {"together": tuple(range(_zoo.CLASSES)), "alone": (0,)}
    inspect = {
        name: jax.jit(defenses.invert_trigger(size.model.apply, labels=labels, **options)) for name, labels in parts.items()
    }
    spent: dict[str, list[float]] = {name: [] for name in parts}
    for k in range(4):  # the first compiles; then in turns, for the machine is not always as fast
        for name, labels in parts.items():
            start = time.perf_counter()
            jax.block_until_ready(inspect[name](jax.random.key(k), params, mj.Known(clean=clean)))
            spent[name].append((time.perf_counter() - start) / len(labels))
    least = {name: min(each[1:]) for name, each in spent.items()}
    figures = {f"seconds_a_label_{name}": value for name, value in least.items()}
    return {**figures, "label_speedup": least["alone"] / least["together"]}


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Trains and inspects the zoo, sets the thresholds, and counts."""
    del seed
    chosen = SIZES[size]
    over = "map" if jax.default_backend() == "cpu" else "vmap"
    digits = _zoo.digits(embedded=size == "small", num_clean=chosen.defender)
    clean, test = (jax.tree.map(lambda leaf, n=n: leaf[:n], rows) for rows, n in
                   ((digits.clean, chosen.defender), (digits.test, chosen.test)))  # fmt: skip
    num_clean = chosen.calibration + chosen.clean
    keys = jax.random.split(context.key, num_clean + chosen.infected)
    targets = jnp.concatenate([jnp.full(num_clean, -1), jnp.arange(chosen.infected) % _zoo.CLASSES]).astype(jnp.int32)
    found = trials(context, "models", trial(chosen, over), (keys, targets), (digits.train, clean, test))
    part = lambda name, which: found[name][which]
    set_aside, judged, infected = np.split(np.arange(len(keys)), [chosen.calibration, num_clean])
    goals = np.asarray(targets)[infected]

    figures: dict[str, Any] = {}
    for name in METHODS:
        index = found[f"{name}_index"].max(axis=1)
        threshold = measure.calibrate_threshold(index[set_aside], false_alarms=chosen.false_alarms)
        figures[f"threshold_{name}"] = threshold
        figures |= share(f"tpr_{name}", index[infected] > threshold)
        figures |= share(f"fpr_{name}", index[judged] > threshold)
        figures[f"fpr_{name}_at_2"] = np.mean(index[judged] > 2)
        figures[f"tpr_{name}_at_2"] = np.mean(index[infected] > 2)
        figures |= share(f"label_found_{name}", part(f"{name}_index", infected).argmax(axis=1) == goals)
        figures[f"index_clean_{name}"] = np.median(index[judged])
        figures[f"index_infected_{name}"] = np.median(index[infected])
        figures[f"size_target_{name}"] = np.median(part(f"{name}_size", infected)[np.arange(len(infected)), goals])
        figures[f"size_clean_{name}"] = np.median(part(f"{name}_size", judged))
        figures |= {f"{what}_{name}": value for what, value in overlap(part(f"{name}_mask", infected)).items()}
        figures[f"fidelity_{name}"] = part(f"{name}_fidelity", infected).mean()
    figures |= {
        "accuracy_clean_models": part("accuracy", judged).mean(),
        "accuracy_infected_models": part("accuracy", infected).mean(),
        "asr_infected_models": part("asr", infected).mean(),
        "filter_caught": part("filter_caught", infected).mean(),
        "filter_false_alarms": part("filter_false", infected).mean(),
        "n_calibration": len(set_aside),
        "n_clean": len(judged),
        "n_infected": len(infected),
    }
    for repair in ("unlearn", "fine_tune", "prune"):
        for what in ("asr", "accuracy"):
            figures[f"{what}_after_{repair}"] = part(f"{what}_{repair}", infected).mean()
    params = jax.jit(lambda key, pool: fit(key, chosen.model, pool, targets[-1], chosen))(keys[-1], digits.train)
    figures |= seconds(chosen, params, clean, over)
    draw(context, found, infected, judged)
    reductions = [
        *digits.notes,
        f"{size} models: {chosen.rows} rows, {chosen.epochs} epochs" + (", one hidden layer" if size != "paper" else ""),
        f"searches of {chosen.search or 'the published length'}",
    ]
    if chosen.false_alarms != FALSE_ALARMS:
        few = f"{chosen.calibration} models promise no less"
        reductions.append(f"the threshold is for {chosen.false_alarms:.0%} false alarms: {few}")
    return Result(figures, reductions, {"index_infected_nc": Paper(3.0, PAPER), "index_clean_nc": Paper(2.0, PAPER)})


def draw(context: Any, found: dict[str, np.ndarray], infected: np.ndarray, judged: np.ndarray) -> None:
    """Indices of clean and infected models, and the first reconstructed triggers."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(METHODS), 5, figsize=(9, 3.6), width_ratios=(2, 1, 1, 1, 1))
    for row, name in zip(axes, METHODS):
        index = found[f"{name}_index"].max(axis=1)
        row[0].boxplot([index[judged], index[infected]], tick_labels=["clean", "infected"])
        row[0].set_ylabel(f"{name}: anomaly index")
        for axis in row[1:]:
            axis.axis("off")
        for axis, k in zip(row[1:], infected):
            stamped = found[f"{name}_mask"][k][:, :, None] * found[f"{name}_pattern"][k]
            axis.imshow(stamped[:, :, 0], cmap="gray", vmin=0, vmax=1)
    context.save_figure(figure, "triggers")
