"""Fine-pruning: dormant channels are cut, the rest is fine-tuned; and a backdoor that moved out of their way.

Two backdoors: faces with small drawn dark glasses, taken for one person, and digits with a white square, labelled 0. Of
each, a plain one (BadNets) and a pruning-aware one (half of the last convolution's channels are dormant decoys). The
defender has clean images that nobody trained on, most of them to rank channels and fine-tune, the rest to stop pruning
(4 points of accuracy) and to choose the learning rate of fine-tuning: the largest of a few that keeps held-out accuracy
within the same 4 points, for a small rate leaves a backdoor where it is. Fine-tuning shifts images (and mirrors faces)
and decays weights harder than training does: what clean images don't need fades. Its settings were chosen with other
seeds, on training images kept apart.

Measured on the test set: along the whole pruning path, where the defender stops (`pruned`), after fine-tuning
(`fine_pruned`), by the same fine-tuning without pruning (`fine_tuned`, the control, its rate chosen likewise), and by
channel-Lipschitz pruning, which needs no data (`lipschitz`). `success_clean_model` is what the trigger does to a model
without a backdoor. `success` counts test images of other classes than the attacker's.

References: Liu, Dolan-Gavitt & Garg, "Fine-Pruning", RAID 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mlsec_jax as mj
from benchmarks import _zoo
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, channels, combine, data, defenses, losses, measure, models, threat, train
from mlsec_jax.memo import memo

BUDGET = 0.04  # of accuracy, while pruning: the paper's
AIM = threat.to_class(0)
FRACTION = 0.1  # poisons among the training rows
PAPER = "Liu et al., RAID 2018, table 1: DeepID on YouTube Aligned Faces, sunglasses"


class Recipe(NamedTuple):
    """Momentum SGD, the learning rate falling to zero; images shifted at random, and mirrored if so asked."""

    epochs: int
    batch: int
    rates: tuple[float, ...] = (0.05,)  # ascending, to choose from
    shift: int = 0  # pixels, at most
    mirror: bool = False
    decay: float = 5e-4  # of the weights

    def trainer_fn(self, num_rows: int, rate: Any = None) -> Callable[[Any], mj.base.Trainer]:
        """`loss_fn -> Trainer` on so many rows, at a rate or the only one."""
        rate = self.rates[0] if rate is None else rate
        during = train.augment(pad=self.shift, flip=self.mirror) if self.shift or self.mirror else None

        def make(loss_fn: Any) -> mj.base.Trainer:
            trainer = train.scratch(
                loss_fn,
                num_epochs=self.epochs,
                batch_size=self.batch,
                num_rows=num_rows,
                learning_rate=rate,
                weight_decay=self.decay,
            )
            return combine.defended(trainer, during=during)

        return make


class Size(NamedTuple):
    """What differs between the sizes."""

    digits: int | None  # training rows
    digit_test: int
    digit_recipe: Recipe
    digit_tuning: Recipe
    shrink: int  # faces are averaged over so many pixels a side
    face_recipe: Recipe
    face_tuning: Recipe


DIGITS, DIGIT_TUNING = Recipe(8, 128), Recipe(10, 32, (0.02, 0.05, 0.1), shift=2, decay=0.01)
FACES = Recipe(150, 20, (0.01,), shift=2, mirror=True)
FACE_TUNING = Recipe(150, 20, (0.0025, 0.005, 0.01), shift=2, mirror=True, decay=0.02)
QUICK = (FACES._replace(epochs=50, rates=(0.02,)), FACE_TUNING._replace(epochs=50, rates=(0.01, 0.02)))
BRIEF = (DIGITS._replace(epochs=5), DIGIT_TUNING._replace(epochs=6, rates=(0.05, 0.1)))
SIZES = {
    "small": Size(1500, 400, *BRIEF, 4, *QUICK),
    "full": Size(10_000, 2000, DIGITS, DIGIT_TUNING, 4, FACES, FACE_TUNING),
    "paper": Size(None, 10_000, DIGITS, DIGIT_TUNING, 2, FACES._replace(shift=4), FACE_TUNING._replace(shift=4)),
}


class Task(NamedTuple):
    """A network, its data, a trigger and the defender's means."""

    model: models.Model
    layer: channels.Layer  # the last convolution
    num_channels: int
    train: mj.Data
    known: mj.Known  # the defender's clean and holdout
    test: mj.Data
    trigger: threat.Trigger
    recipe: Recipe
    tuning: Recipe
    notes: tuple[str, ...]


def last_convolution(model: models.Model, index: int) -> channels.Layer:
    """The channels of `conv{index}`, after ReLU and pooling."""
    return channels.layer(f"conv{index}", lambda params, x: model.layers(params, x)[index])


def digits(size: Size, embedded: bool) -> Task:
    """The zoo's digits and network."""
    found = _zoo.digits(size.digits, embedded=embedded)
    test = jax.tree.map(lambda leaf: leaf[: size.digit_test], found.test)
    known = defenders(found.clean, len(found.clean.y) * 4 // 5)
    layer = last_convolution(_zoo.NET, 1)
    recipes = (size.digit_recipe, size.digit_tuning)
    return Task(_zoo.NET, layer, 32, found.train, known, test, _zoo.SQUARE, *recipes, found.notes)


def defenders(rows: mj.Data, num_clean: int) -> mj.Known:
    """The first rows to rank and fine-tune, the rest to stop by."""
    cut = lambda part: jax.tree.map(lambda leaf: leaf[part], rows)
    return mj.Known(clean=cut(slice(num_clean)), holdout=cut(slice(num_clean, None)))


def faces(size: Size) -> Task | None:
    """Forty people, ten images each: four to train, three and one for the defender, two to test; None without the file."""
    try:
        stored = data.table("att_faces")
    except FileNotFoundError:
        return None
    x, y = stored["images"].astype(np.float32) / 255, stored["labels"]
    side = size.shrink
    x = x.reshape(len(x), 112 // side, side, 92 // side, side).mean(axis=(2, 4))[..., None]
    order = np.argsort(np.arange(len(y)) % 10, kind="stable")  # everybody's first image, everybody's second, …
    x, y = x[order], y[order]
    make = lambda a, b: mj.dataset(jnp.asarray(x[40 * a : 40 * b]), jnp.asarray(y[40 * a : 40 * b], jnp.int32))
    model = models.lenet(channels=(16, 32, 48), widths=(160,), num_classes=40, kernel=3, pooling="max", mean=0.4, std=0.2)
    layer, recipes = last_convolution(model, 2), (size.face_recipe, size.face_tuning)
    known, notes = defenders(make(4, 8), 120), ("40 people, 4 training images each (paper: 1,283 people, about 90 each)",)
    return Task(model, layer, 48, make(0, 4), known, make(8, 10), glasses(side), *recipes, notes)


def glasses(side: int) -> threat.Trigger:
    """Two small dark lenses and a bridge, where the eyes of a face of 112 x 92 are, shrunk like the images."""
    mask = np.zeros((112, 92), np.float32)
    mask[44:56, 20:40] = mask[44:56, 52:72] = mask[47:50, 40:52] = 1
    mask = mask.reshape(112 // side, side, 92 // side, side).mean(axis=(1, 3))
    return threat.patch(jnp.zeros((*mask.shape, 1)), at=(0, 0), mask=jnp.asarray(mask))


def attack_models(task: Task, key: jax.Array) -> dict[str, Any]:
    """The parameters of a clean, a plainly backdoored and a pruning-aware model of one start, kept in the user's cache."""
    loss_fn, poisons = losses.cross_entropy(task.model.apply), round(FRACTION * task.train.num_rows)
    trainer_fn = task.recipe.trainer_fn(task.train.num_rows)
    poison = attacks.badnets(task.trigger, num_poisons=poisons, relabel=AIM)
    aware = attacks.pruning_aware(
        loss_fn, task.layer, poison=poison, trainer_fn=trainer_fn, num_pruned=task.num_channels // 2
    )

    def start(key: jax.Array, rows: mj.Data) -> tuple:
        init_key, poison_key, train_key = jax.random.split(key, 3)
        return task.model.init(init_key, rows.x[:1]), poison_key, train_key

    def clean(key: jax.Array, rows: mj.Data) -> Any:
        params, _, train_key = start(key, rows)
        return trainer_fn(loss_fn)(train_key, params, rows)[0]

    def plain(key: jax.Array, rows: mj.Data) -> Any:
        params, poison_key, train_key = start(key, rows)
        return trainer_fn(loss_fn)(train_key, params, poison(poison_key, rows, mj.Known())[0])[0]

    def decoyed(key: jax.Array, rows: mj.Data) -> Any:
        params, _, train_key = start(key, rows)
        return aware(train_key, params, mj.Known(clean=rows))[0]

    made = {"clean_model": clean, "plain": plain, "aware": decoyed}
    return {name: memo(fn, name=f"fine-pruning-{name}")(key, task.train) for name, fn in made.items()}


def measured(task: Task) -> Callable[[Any], jax.Array]:
    """`params -> [accuracy, success]` on the test set."""
    stamped = threat.triggered(None, task.trigger, task.test, relabel=AIM)

    def both(params: Any) -> jax.Array:
        said = lambda x: jax.lax.map(lambda row: task.model.apply(params, row[None])[0], x, batch_size=min(len(x), 500))
        return jnp.stack([measure.accuracy(said(rows.x), rows) for rows in (task.test, stamped)])

    return both


def defend(task: Task, key: jax.Array, params: Any) -> dict[str, jax.Array]:
    """What is left of a model by each repair, `[accuracy, success]` each, and `path [channels + 1, 2]`."""
    loss_fn, look, clean = losses.cross_entropy(task.model.apply), measured(task), task.known.clean
    repair = functools.partial(defenses.fine_prune, task.model.apply, task.layer, budget=BUDGET)
    pruned, info = repair()(key, params, task.known)

    def fine_pruned(rate: jax.Array) -> Any:
        return repair(trainer_fn=task.tuning.trainer_fn(clean.num_rows, rate))(key, params, task.known)[0]

    def fine_tuned(rate: jax.Array) -> Any:
        return task.tuning.trainer_fn(clean.num_rows, rate)(loss_fn)(key, params, clean)[0]

    tuned, rate = largest_rate(task, params, fine_pruned)
    control, _ = largest_rate(task, params, fine_tuned)
    lipschitz, _ = defenses.channel_lipschitz()(key, params, task.known)
    stamped = clean._replace(x=task.trigger(None, clean.x))
    return {
        "before": look(params),
        "pruned": look(pruned),
        "fine_pruned": look(tuned),
        "fine_tuned": look(control),
        "lipschitz": look(lipschitz),
        "path": channels.along(task.layer.prune_fn, params, info["order"], look),
        "num_pruned": info["num_pruned"],
        "rate": rate,
        "activation": jnp.stack([info["activation"], channels.mean_activation(task.layer, params, stamped)]),
    }


def with_rows(task: Task, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(task, *args)` compiled with the rows as operands: as constants, compilers would run the network on them."""
    compiled = jax.jit(lambda known, test, *args: fn(task._replace(known=known, test=test), *args))
    return lambda *args: compiled(task.known, task.test, *args)


def largest_rate(task: Task, params: Any, tune: Callable[[jax.Array], Any]) -> tuple[Any, jax.Array]:
    """What the largest rate gives that keeps held-out accuracy within the budget (else the smallest), and that rate."""
    rates, holdout = jnp.asarray(task.tuning.rates), task.known.holdout
    accuracy_of = lambda params: measure.accuracy(task.model.apply(params, holdout.x), holdout)
    tuned = jax.lax.map(tune, rates)
    within = jax.lax.map(accuracy_of, tuned) >= accuracy_of(params) - BUDGET - 1e-6
    best = jnp.max(jnp.where(within, jnp.arange(len(rates)), 0))
    return jax.tree.map(lambda leaf: leaf[best], tuned), rates[best]


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Digits and faces: plain and pruning-aware backdoors, each repaired four ways."""
    chosen = SIZES[size]
    found_tasks = {"faces": faces(chosen), "digits": digits(chosen, embedded=size == "small")}
    tasks = {name: task for name, task in found_tasks.items() if task is not None}
    figures: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    model_key, repair_key = jax.random.split(context.key)
    for name, task in context.progress(tasks.items(), "tasks"):
        trained = attack_models(task, model_key)
        look, program = (with_rows(task, fn) for fn in (lambda task, params: measured(task)(params), defend))
        figures[f"{name}_accuracy_clean_model"], figures[f"{name}_success_clean_model"] = np.asarray(
            look(trained.pop("clean_model"))
        )
        for kind, params in trained.items():
            seen = context.once(f"{name}-{kind}", lambda params=params, program=program: program(repair_key, params))
            found[f"{name}, {kind} backdoor"] = seen
            for stage in ("before", "pruned", "fine_pruned", "fine_tuned", "lipschitz"):
                figures[f"{name}_{kind}_accuracy_{stage}"], figures[f"{name}_{kind}_success_{stage}"] = seen[stage]
            figures[f"{name}_{kind}_points_lost"] = 100 * (seen["before"][0] - seen["fine_pruned"][0])
            figures[f"{name}_{kind}_rate"] = seen["rate"]
            figures[f"{name}_{kind}_share_pruned"] = seen["num_pruned"] / task.num_channels
    draw(context, found)
    reductions = [note for task in tasks.values() for note in task.notes]
    reductions += [
        "small networks; faces of the AT&T set with drawn glasses in place of YouTube Aligned Faces with photographed ones",
        "stamped training images replace their originals",
    ]
    reductions += ["no faces: att_faces.npz wasn't found (MLSEC_JAX_DATA)"] * ("faces" not in tasks)
    paper = {
        "faces_plain_accuracy_before": 0.978,
        "faces_plain_success_before": 1.0,
        "faces_plain_accuracy_fine_pruned": 0.978,
        "faces_plain_success_fine_pruned": 0.0,
        "faces_aware_success_before": 0.998,
        "faces_aware_accuracy_fine_pruned": 0.977,
        "faces_aware_success_fine_pruned": 0.0,
        "faces_aware_success_fine_tuned": 0.0,
    }
    return Result(figures, reductions, {key: Paper(value, PAPER) for key, value in paper.items() if key in figures})


def draw(context: Any, found: dict[str, dict[str, Any]]) -> None:
    """Accuracy and success along the path, and what clean and triggered images do to each channel."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 5.4), squeeze=False)
    for (name, seen), path_axis, bar_axis in zip(found.items(), *axes):
        share = np.arange(len(seen["path"])) / (len(seen["path"]) - 1)
        for k, label in enumerate(("accuracy", "attack success")):
            path_axis.plot(share, seen["path"][:, k], f"C{k}", label=label)
            path_axis.plot(1.06, seen["fine_pruned"][k], f"C{k}o")
        path_axis.axvline(seen["num_pruned"] / (len(seen["path"]) - 1), color="grey", linestyle=":")
        path_axis.set(title=name, xlabel="share pruned (dots: fine-pruned)", ylim=(-0.03, 1.03))
        order = np.argsort(seen["activation"][0], kind="stable")
        for values, label, colour in zip(seen["activation"], ("clean", "triggered"), ("C0", "C1")):
            bar_axis.step(np.arange(len(order)), values[order], colour, where="mid", label=label)
        bar_axis.set(xlabel="channel, in the order of pruning", ylabel="mean activation")
    axes[0, 0].legend()
    axes[1, 0].legend()
    figure.tight_layout()
    context.save_figure(figure, "path")
