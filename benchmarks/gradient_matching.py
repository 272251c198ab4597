"""Gradient matching from scratch: poisons of one network's gradient fool networks that are trained anew (CIFAR-10).

Each target is a test image, to be taken for the class that comes second in a surrogate. The training images of that
class with the largest gradients are changed by at most 16/255 (after rounding to 8 bits), so that their gradient points
where the target's, with the wrong label, points. The surrogates were trained on the clean rows. The victims train from
scratch on the poisoned rows, with augmentation, from keys of their own; `success` is the share of (target, victim)
pairs that end with the target in the wrong class. The control is the same rows with random signs at full radius, judged
by victims of the same keys.

References: Geiping et al., "Witches' Brew: Industrial Scale Data Poisoning via Gradient Matching", ICLR 2021 (ResNet-18,
500 of 50,000 rows, 8 restarts; its tables could not be read again, so no published number stands beside ours).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks._clean_label import (
    GROUP_NORM,
    SHARED_TARGETS,
    Images,
    Net,
    eight_bits,
    first_of_each,
    floats,
    images,
    likeliest,
    pretrained,
    share,
    trials,
)
from benchmarks._record import Result, benchmark
from mlsec_jax import attacks, combine, losses, measure, models, threat, train

RADIUS = 16 / 255


class Size(NamedTuple):
    """What differs between the sizes.

    Attributes:
      name: of the network.
      width: likewise.
      rows: of the victims' training set.
      poisons: how many of them, all of one class, are changed.
      epochs: of surrogate and victims.
      targets: crafted for.
      victims: for each target.
      surrogates: networks whose gradients are matched, and their cosines averaged.
      steps: of crafting.
      restarts: of crafting, the best by its own objective is kept.
      batch: poisons that are matched at a time.
      test: rows for the victims' accuracy.
    """

    name: str
    width: int
    rows: int
    poisons: int
    epochs: int
    targets: int
    victims: int
    surrogates: int
    steps: int
    restarts: int
    batch: int
    test: int


SIZES = {
    "small": Size("convnet", 4, 300, 6, 3, 2, 2, surrogates=2, steps=20, restarts=2, batch=6, test=200),
    "full": Size("convnet", 16, 2500, 50, 12, 20, 2, surrogates=2, steps=100, restarts=1, batch=50, test=1000),
    "paper": Size("resnet", 64, 50_000, 500, 40, 10, 8, surrogates=1, steps=250, restarts=8, batch=500, test=10_000),
}
STEP_SIZE = 2 / 255  # of Adam on signs, falling by ten at 3/8, 5/8 and 7/8 of the steps


class Problem(NamedTuple):
    """The targets of a run.

    Attributes:
      clean: the training set.
      test: held-out rows.
      goal: `[targets, 1]`, each target with the label that the attacker wants.
      rows: `[targets, poisons]`, the rows that change.
    """

    clean: mj.Data
    test: mj.Data
    goal: mj.Data
    rows: jax.Array


def problem(seed: int, pictures: Images, net: Net, size: Size) -> Problem:
    """Draws targets among the test images that the surrogate gets right; it chooses the wrong class and the rows."""
    rng = np.random.default_rng(seed)
    rows = first_of_each(pictures.y, size.rows // 10)
    clean = mj.dataset(floats(pictures.x[rows]), jnp.asarray(pictures.y[rows], jnp.int32))
    order = rng.permutation(len(pictures.x_test))[: 20 * size.targets]
    ranked = likeliest(net, pictures.x_test[order])
    right = np.flatnonzero(ranked[:, 0] == pictures.y_test[order])[: size.targets]
    order, wanted = order[right], ranked[right, 1]
    loud = {label: loudest(net, clean, label, size.poisons) for label in set(wanted.tolist())}
    others = np.setdiff1d(np.arange(len(pictures.x_test)), order)[: size.test]
    test = mj.dataset(floats(pictures.x_test[others]), jnp.asarray(pictures.y_test[others], jnp.int32))
    one = lambda values: jnp.asarray(values)[:, None]
    goal = mj.Data(one(floats(pictures.x_test[order])), one(wanted.astype(np.int32)), jnp.ones((len(order), 1)))
    return Problem(clean, test, goal, jnp.asarray(np.stack([loud[label] for label in wanted.tolist()])))


def loudest(net: Net, clean: mj.Data, label: int, num_rows: int) -> np.ndarray:
    """The rows of a class with the largest gradients."""
    own = np.flatnonzero(np.asarray(clean.y) == label)
    part, known = jax.tree.map(lambda leaf: leaf[own], clean), mj.Known(params=net.params)
    loss_fn = losses.cross_entropy(net.model.apply)
    return own[attacks.largest_gradients(loss_fn, part, known, label=label, num_rows=num_rows)[0]]


def craft(size: Size, model: models.Model, colour: bool) -> Callable:
    """`(key, goal [1], rows [k], clean, surrogates) -> dict`: poisons `[k, ...]` by matching and by noise, in 8 bits."""
    rate = optax.piecewise_constant_schedule(STEP_SIZE, {size.steps * part // 8: 0.1 for part in (3, 5, 7)})
    last = max(size.steps // 10, 1)
    attack = attacks.gradient_matching(
        losses.cross_entropy(model.apply),
        threat=threat.perturb_rows(jnp.arange(size.poisons), radius=RADIUS, noise=RADIUS),
        optimizer=optax.chain(optax.scale_by_sign(), optax.adam(rate)),
        augment_fn=train.augment(flip=colour, subpixel=True),
        batch_size=size.batch,
        over="map",
    )
    reached = lambda rows, info: jnp.mean(info["outer"][-last:])
    restarted = combine.best_of(combine.iterate(attack, size.steps), size.restarts, reached)

    def run(key: jax.Array, goal: mj.Data, rows: jax.Array, clean: mj.Data, surrogates: Any) -> dict[str, jax.Array]:
        craft_key, noise_key = jax.random.split(key)
        base = mj.Data(clean.x[rows], clean.y[rows], jnp.ones(size.poisons))
        made, info = restarted(craft_key, base, mj.Known(surrogates=surrogates, goal=goal))
        signs = jax.random.rademacher(noise_key, base.x.shape, base.x.dtype)
        noisy = jnp.clip(base.x + RADIUS * signs, 0, 1)
        cosine = info["best"]["cosine"]
        return {
            "matching": eight_bits(made.x),
            "noise": eight_bits(noisy),
            "cosine": jnp.mean(cosine[-last:]),
            "cosine_start": cosine[0],
        }

    return run


def judge(size: Size, model: models.Model, colour: bool) -> Callable:
    """`(key, goal [1], rows [k], matching, noise, clean, test) -> dict`: hits and accuracies of two victims."""
    recipe = train.Recipe(num_epochs=size.epochs, flip=colour)  # the surrogate's too

    def run(key: jax.Array, goal: mj.Data, rows: Any, matching: Any, noise: Any, clean: mj.Data, test: mj.Data) -> dict:
        def victim(poisons: jax.Array) -> dict[str, jax.Array]:
            poisoned = clean._replace(x=clean.x.at[rows].set(poisons))
            params = train.pretrain(key, model, poisoned, recipe)[0]
            said = jax.lax.map(lambda x: jnp.argmax(model.apply(params, x[None])[0]), test.x, batch_size=100)
            accuracy = measure.accuracy(said, test)
            return {"hit": jnp.argmax(model.apply(params, goal.x), axis=1)[0] == goal.y[0], "accuracy": accuracy}

        return jax.lax.map(victim, jnp.stack([matching, noise]))

    return run


@benchmark(bfloat16=True)
def run(size: str, seed: int, context: Any) -> Result:
    """Trains the surrogate, crafts for every target, trains the victims."""
    pictures, chosen = images(embedded=size == "small"), SIZES[size]
    colour = pictures.x.shape[-1] == 3
    surrogate_key, craft_key, victim_key = jax.random.split(context.key, 3)
    rows = first_of_each(pictures.y, chosen.rows // 10)
    x, y = pictures.x[rows], pictures.y[rows]
    nets = [
        pretrained(
            key, chosen.name, x, y, num_epochs=chosen.epochs, width=chosen.width, bfloat16=context.bfloat16
        )
        for key in jax.random.split(surrogate_key, chosen.surrogates)
    ]
    net, surrogates = nets[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *[each.params for each in nets])
    task = problem(seed, pictures, net, chosen)

    keys = jax.random.split(craft_key, chosen.targets)
    attack = craft(chosen, net.model, colour)
    made = trials(context, "craft", attack, (keys, task.goal, task.rows), (task.clean, surrogates))
    target = np.repeat(np.arange(chosen.targets), chosen.victims)  # of each trial
    keys = jax.random.split(victim_key, len(target))
    goal = jax.tree.map(lambda leaf: leaf[target], task.goal)
    each = (keys, goal, task.rows[target], made["matching"][target], made["noise"][target])
    judged = trials(context, "victim", judge(chosen, net.model, colour), each, (task.clean, task.test))

    accuracy = judged["accuracy"].mean(axis=0)
    figures = {
        **share("success_matching", judged["hit"][:, 0], chosen.targets),
        **share("success_noise", judged["hit"][:, 1], chosen.targets),
        "mean_cosine": made["cosine"].mean(),
        "mean_cosine_start": made["cosine_start"].mean(),
        "n_trials": len(target),
        "n_targets": chosen.targets,
        "poison_fraction": chosen.poisons / chosen.rows,
        "accuracy_matching": accuracy[0],
        "accuracy_noise": accuracy[1],
    }
    draw(context, task, made, judged["hit"].reshape(chosen.targets, chosen.victims, 2).mean(axis=1))
    reductions = [*pictures.notes, SHARED_TARGETS, f"{GROUP_NORM}; here {chosen.name}, width {chosen.width}"]
    if size != "paper":
        reductions += [
            f"{chosen.rows} rows, {chosen.poisons} of them poisoned (paper: 50,000 and 500)",
            f"{chosen.targets} targets x {chosen.victims} victims (paper: 10 x 8), {chosen.epochs} epochs (paper: 40)",
            f"{chosen.surrogates} surrogates, {chosen.restarts} restarts of {chosen.steps} steps (paper: 1, 8 of 250)",
        ]
    reductions.append(
        "targets are drawn among the test images that the surrogate gets right, for its second class (paper: a random "
        "one), and the rows are those of largest gradient (Souri et al. 2022; paper: random)"
    )
    return Result(figures, reductions)


def draw(context: Any, task: Problem, made: dict[str, np.ndarray], hits: np.ndarray) -> None:
    """Two plots: images, their poisons and noise; the share of victims fooled, target by target."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 6, figsize=(8, 4.2))
    clean = np.asarray(task.clean.x[task.rows[0]])
    rows = {"clean": clean, "matched": made["matching"][0], "noise": made["noise"][0]}
    for row, (label, shown) in zip(axes, rows.items()):
        for axis, image in zip(row, shown):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
    figure.suptitle("Rows of the wrong class, within 16/255")
    context.save_figure(figure, "poisons")

    figure, axis = plt.subplots(figsize=(6, 3.5))
    order = np.argsort(-hits[:, 0], kind="stable")
    axis.bar(np.arange(len(hits)) - 0.2, hits[order, 0], 0.4, label="gradient matching")
    axis.bar(np.arange(len(hits)) + 0.2, hits[order, 1], 0.4, label="random signs")
    axis.set(xlabel="target", ylabel="victims fooled", ylim=(0, 1))
    axis.legend()
    context.save_figure(figure, "success")
