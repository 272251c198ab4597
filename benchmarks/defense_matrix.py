"""Every backdoor against every defense: accuracy, attack success and the true label's recovery, without an empty cell.

One small network of two convolutions, trained on digits of which a share carries a trigger. For each backdoor and defense three
figures, means over seeds: `accuracy` on clean test digits, `success` of the trigger on digits whose class isn't the one wanted,
`recovery`, the share of the same digits that get their true label (success alone would praise a defense that destroys the
input). A defense that refuses an input (STRIP) gives neither. `success_lowest` and `success_highest` are over seeds. The rows
are shared: in a seed every backdoor meets the same clean digits, initial parameters and batches. Keys are
`FIGURE_BACKDOOR_DEFENSE`; the backdoor `clean` is the control without poisons (its success is that of the square, on a model
that never saw it), the defense `none` the other control.

The defender knows the poisons' share of a class (spectral signatures), has 500 clean digits of its own (repairs, STRIP), and
no hyper-parameter was chosen on the test digits: they are the published ones, or such as the small network trains with at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks import _zoo
from benchmarks._clean_label import outputs
from benchmarks._record import Result, benchmark
from mlsec_jax import attacks, bilevel, channels, combine, defenses, loop, losses, models, scores, threat, train

NET = models.lenet(channels=(8, 16), widths=(64,))
LOSS = losses.cross_entropy(NET.apply)
TARGET, BATCH = 0, 64


class Size(NamedTuple):
    """What differs between the sizes."""

    rows: int
    epochs: int
    seeds: int
    test: int
    backdoors: tuple[str, ...]
    defenses: tuple[str, ...]


def _noise(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(jax.random.key(7), shape)


class Backdoor(NamedTuple):
    """A trigger and what training rows it goes on: `fraction` of all rows, or of the target class with labels kept."""

    trigger: Any
    relabel: Any
    fraction: float
    clean_label: bool = False


ALL = threat.to_next(_zoo.CLASSES)
ONE = threat.to_class(TARGET)
BACKDOORS = {
    "clean": Backdoor(_zoo.SQUARE, ONE, 0.0),
    "patch": Backdoor(_zoo.SQUARE, ONE, 0.1),
    "all_to_all": Backdoor(_zoo.SQUARE, ALL, 0.1),
    "blend": Backdoor(threat.blend(_noise((28, 28, 1)), opacity=0.2), ONE, 0.1),
    "stripes": Backdoor(threat.stripes((28, 28, 1), amplitude=0.15, period=3), ONE, 0.1),
    "warp": Backdoor(threat.warp(jax.random.key(3), (28, 28), strength=2.0), ONE, 0.1),
    "clean_label": Backdoor(threat.corners(jnp.ones((3, 3, 1))), ONE, 0.5, clean_label=True),
}


def plain(size: Size) -> mj.base.Trainer:
    """The victim's training."""
    return train.scratch(LOSS, num_epochs=size.epochs, batch_size=BATCH, num_rows=size.rows, learning_rate=0.05)


def tuning(loss_fn: Any) -> mj.base.Trainer:
    """A few epochs on the defender's clean digits."""
    return train.scratch(loss_fn, num_epochs=5, batch_size=50, num_rows=500, learning_rate=0.02)


def _abl(size: Size) -> mj.base.Trainer:
    steps = size.epochs * (size.rows // BATCH)
    sgd = lambda num_steps, **slots: bilevel.unrolled(
        LOSS, optax.sgd(0.05, momentum=0.9), num_steps, batching=loop.shuffled(BATCH), **slots
    )
    ascent = bilevel.unrolled(LOSS, optax.sgd(0.01), 50, grad_fn=defenses.unlearning(until=math.log(10.0)))
    return defenses.abl(
        LOSS,
        isolate=sgd(steps // 4, grad_fn=defenses.flooding(0.5)),
        refine=sgd(steps),
        unlearn=ascent,
        num_isolated=size.rows // 100,
    )


def _neural_cleanse(key: mj.base.Key, params: Any, known: mj.Known) -> tuple[Any, Any]:
    """Unlearns the recovered trigger of the label whose mask is smallest, whether or not it is an outlier."""
    find_key, unlearn_key = jax.random.split(key)
    inspect = defenses.invert_trigger(
        NET.apply, num_classes=10, objective=defenses.neural_cleanse(), num_steps=60, num_batches=8
    )
    found = inspect(find_key, params, known)
    size = jnp.where(found.found, found.size, jnp.inf)
    k = jnp.argmin(size)
    trigger = threat.Overlay(found.mask[k], found.pattern[k])
    return defenses.unlearn_trigger(tuning(LOSS))(unlearn_key, params, known.replace(trigger=trigger))


def trainers(size: Size) -> dict[str, Callable[[jax.Array, mj.Known], mj.base.Trainer]]:
    """Every defense as `(ε of a class, what the defender knows) -> trainer`."""
    victim = plain(size)
    features = lambda params, x, key=None: NET.features(params, x)
    conv = channels.layer("conv1", lambda params, x: NET.layers(params, x)[1])

    def before(scorer: Any, **options: Any) -> Callable:
        make = combine.filter_above if "threshold" in options else combine.filter_top
        return lambda eps, known: combine.defended(victim, before=[make(scorer, **options)], known=known)

    def after(*repairs: Any) -> Callable:
        return lambda eps, known: combine.defended(victim, after=repairs, known=known)

    def during(mix: Any) -> Callable:
        return lambda eps, known: combine.defended(victim, during=mix, known=known)

    spectral = scores.spectral(features, num_classes=10)
    neighbours = scores.deep_knn(features, num_neighbours=50, num_classes=10)
    clusters = scores.activation_clusters(features, num_classes=10, num_steps=200)
    fine_tune = lambda key, params, known: tuning(LOSS)(key, params, known.clean)
    fine_prune = defenses.fine_prune(NET.apply, conv, trainer_fn=tuning)
    return {
        "none": lambda eps, known: victim,
        "spectral": lambda eps, known: combine.defended(
            victim, before=[combine.filter_top(spectral, fraction=jnp.minimum(1.5 * eps, 0.5), num_classes=10)], known=known
        ),
        "activation_clusters": before(clusters, threshold=0.65),
        "deep_knn": before(neighbours, threshold=0.0),
        "mixup": during(defenses.mixup(num_classes=10)),
        "cutmix": during(defenses.cutmix(num_classes=10)),
        "gradient_shaping": lambda eps, known: bilevel.unrolled(
            LOSS,
            optax.sgd(0.1, momentum=0.9),
            size.epochs * (size.rows // BATCH),
            batching=loop.shuffled(BATCH),
            grad_fn=defenses.gradient_shaping(batch_size=BATCH),
        ),
        "abl": lambda eps, known: _abl(size),
        "fine_tuning": after(fine_tune),
        "fine_pruning": after(fine_prune),
        "channel_lipschitz": after(defenses.channel_lipschitz(u=2.0)),
        "weight_clipping": after(defenses.clip_weights(0.1)),
        "weight_noise": after(defenses.noise_weights(0.3)),
        "neural_cleanse": after(_neural_cleanse),
    }


AT_TEST = ("strip", "februus")  # the undefended model, asked otherwise


@functools.cache
def fitted(size: Size, name: str) -> Callable:
    """`(key, poisoned rows, ε, clean, holdout) -> params`, compiled once for all backdoors and seeds."""

    @jax.jit
    def fit(key: mj.base.Key, rows: mj.Data, eps: jax.Array, clean: mj.Data, holdout: mj.Data) -> Any:
        known = mj.Known(clean=clean, holdout=holdout)
        return train.from_random(NET.init, trainers(size)[name](eps, known))(key, None, rows)[0]

    return fit


@functools.cache
def asked(name: str) -> Callable:
    """`(key, params, x, clean) -> labels [n]`, -1 for a refused input."""

    @jax.jit
    def ask(key: mj.base.Key, params: Any, x: jax.Array, clean: mj.Data) -> jax.Array:
        rows = mj.dataset(x, jnp.zeros(len(x), jnp.int32))
        known = mj.Known(params=params, clean=clean)
        if name == "februus":
            heat = defenses.grad_cam(defenses.split_at(NET))
            rows, _ = defenses.februus(heat, fill_fn=defenses.fill_harmonic())(key, rows, known)
            return jnp.argmax(NET.apply(params, rows.x), axis=1)
        predicted = jnp.argmax(NET.apply(params, x), axis=1)
        if name == "strip":
            score = scores.strip(NET.apply, num_overlays=50, mix=(0.5, 0.5))
            cut = scores.gaussian_threshold(score(key, params, clean, known), false_alarms=0.01)
            predicted = jnp.where(score(key, params, rows, known) > cut, -1, predicted)
        return predicted

    return ask


def poisoned(key: mj.base.Key, backdoor: Backdoor, rows: mj.Data, surrogate: Any) -> tuple[mj.Data, float]:
    """The training set as the attacker leaves it, and the largest share that poisons are of a class."""
    per_class = rows.num_rows / 10
    if not backdoor.fraction:
        return rows, 0.05
    if backdoor.clean_label:
        chosen = np.flatnonzero(np.asarray(rows.y) == TARGET)[: round(backdoor.fraction * per_class)]
        reach = threat.perturb_rows(jnp.asarray(chosen), radius=0.3)
        crafting = attacks.label_consistent(
            LOSS, backdoor.trigger, threat=reach, optimizer=optax.chain(optax.scale_by_sign(), optax.scale(-0.05))
        )
        known = mj.Known(params=surrogate)
        return combine.iterate(crafting, 15)(key, rows, known)[0], backdoor.fraction
    number = round(backdoor.fraction * rows.num_rows)
    attack = attacks.badnets(backdoor.trigger, num_poisons=number, relabel=backdoor.relabel)
    into = per_class if backdoor.relabel is ALL else number + per_class
    return attack(key, rows, mj.Known())[0], (number / 10 if backdoor.relabel is ALL else number) / into


def cell(answers: np.ndarray, aimed: np.ndarray, y: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`[accuracy, success, recovery]`."""
    other = wanted != y
    return np.array([np.mean(answers == y), np.mean((aimed == wanted)[other]), np.mean((aimed == y)[other])])


EVERY_DEFENSE = (*trainers(Size(BATCH, 1, 1, 1, (), ())), *AT_TEST)
SIZES = {
    "small": Size(1500, 12, 1, 500, ("clean", "patch"), ("none", "spectral", "fine_tuning", "strip")),
    "full": Size(2500, 12, 3, 2000, tuple(BACKDOORS), EVERY_DEFENSE),
    "paper": Size(10_000, 20, 10, 10_000, tuple(BACKDOORS), EVERY_DEFENSE),
}


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """The matrix, a row of cells at a time."""
    chosen = SIZES[size]
    digits = _zoo.digits(chosen.rows, embedded=size == "small", num_clean=1000)
    cut = min(500, digits.clean.num_rows // 2)
    clean, holdout = (jax.tree.map(lambda leaf, s=s: leaf[s], digits.clean) for s in (slice(cut), slice(cut, 2 * cut)))
    clean = jax.tree.map(lambda leaf: jnp.resize(leaf, (500, *leaf.shape[1:])), clean)
    test = jax.tree.map(lambda leaf: leaf[: chosen.test], digits.test)
    y = np.asarray(test.y)

    def row(name: str, k: int) -> dict[str, np.ndarray]:
        backdoor = BACKDOORS[name]
        poison_key, fit_key, ask_key = jax.random.split(jax.random.fold_in(context.key, k), 3)
        surrogate = fitted(chosen, "none")(poison_key, digits.train, jnp.float32(0), clean, holdout)
        rows, eps = poisoned(poison_key, backdoor, digits.train, surrogate)
        stamped = backdoor.trigger(None, test.x)
        wanted = np.asarray(backdoor.relabel(test.y))
        found: dict[str, np.ndarray] = {}
        undefended = fitted(chosen, "none")(fit_key, rows, jnp.float32(eps), clean, holdout)
        for defense in chosen.defenses:
            if defense in AT_TEST:
                both = [asked(defense)(ask_key, undefended, x, clean) for x in (test.x, stamped)]
            else:
                params = fitted(chosen, defense)(fit_key, rows, jnp.float32(eps), clean, holdout)
                both = [jnp.argmax(outputs(NET.apply, params, x), axis=1) for x in (test.x, stamped)]
            answers, aimed = (np.asarray(each) for each in both)
            found[defense] = cell(answers, aimed, y, wanted)
        return found

    figures: dict[str, float] = {"n_seeds": chosen.seeds, "n_backdoors": len(chosen.backdoors)}
    table = np.zeros((len(chosen.backdoors), len(chosen.defenses), 3))
    for i, name in enumerate(context.progress(chosen.backdoors, "backdoors")):
        seeds = [context.once(f"{name}-{k}", functools.partial(row, name, k)) for k in range(chosen.seeds)]
        for j, defense in enumerate(chosen.defenses):
            cells = np.array([each[defense] for each in seeds])
            table[i, j] = cells.mean(axis=0)
            for figure, value in zip(("accuracy", "success", "recovery"), table[i, j], strict=True):
                figures[f"{figure}_{name}_{defense}"] = float(value)
            figures[f"success_lowest_{name}_{defense}"] = float(cells[:, 1].min())
            figures[f"success_highest_{name}_{defense}"] = float(cells[:, 1].max())
    figures["n_empty_cells"] = int(np.isnan(table).sum())
    _plot(context, table, chosen)
    reductions = [*digits.notes, f"a small network, {chosen.rows} digits, {chosen.epochs} epochs, {chosen.seeds} seeds"]
    reductions.append("Neural Cleanse's search is 60 steps of 8 batches; Februus fills by the Laplace equation")
    return Result(figures, reductions)


def _plot(context: Any, table: np.ndarray, size: Size) -> None:
    """Accuracy, success and recovery as three heat maps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(4 + 1.1 * len(size.defenses), 1.5 + 0.4 * len(size.backdoors)), sharey=True)
    for axis, values, title in zip(axes, np.moveaxis(table, -1, 0), ("accuracy", "success", "recovery"), strict=True):
        axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(title)
        axis.set_xticks(range(len(size.defenses)), size.defenses, rotation=90, fontsize=7)
        axis.set_yticks(range(len(size.backdoors)), size.backdoors, fontsize=8)
        for (i, j), value in np.ndenumerate(values):
            axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="white", fontsize=6)
    context.save_figure(figure, "matrix")
