"""Poison frogs: one image that collides with the target fools a retrained head; a whole network takes fifty.

Birds are to be taken for dogs. *One shot*: the features come from a network pre-trained on the other eight classes, the
head of two classes is trained to about zero loss on fewer rows than there are features, one of them a poison.
*End to end*: a network of ten classes is fine-tuned on fresh rows, all its parameters, among them one poison, or fifty
that carry the target as a watermark of opacity 0.3. Poisons stay in the box `[0, 1]`, held to their bases by β alone
as published, and are rounded to 8 bits. The victims of a trial share a key and train on as many rows: poisons take the
place of their bases, the dogs nearest to the target in feature space outside the training set. A target counts when the
victim without poisons takes it for a bird.

`..._base_only`, `..._watermark_only` are the controls: the bases, or their watermarked versions, unoptimised.

References: Shafahi et al., "Poison Frogs! Targeted Clean-Label Poisoning Attacks on Neural Networks", NeurIPS 2018.
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
    LINEAR,
    ONE_NETWORK,
    HeadRecipe,
    Images,
    Net,
    eight_bits,
    features,
    fine_tuning,
    floats,
    images,
    likeliest,
    pretrained,
    share,
    trials,
)
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, combine, measure, threat

TARGET, BASE = 2, 5  # birds taken for dogs (and twos for fives)
OPACITY = 0.3
BETA = 3e-4  # beside a distance relative to the target's features, images in [0, 1]
PAPER = "Shafahi et al., NeurIPS 2018: dog against fish, InceptionV3, all of about 1,099 targets"
WHOLE = "Shafahi et al., NeurIPS 2018: about 50 poisons, birds taken for dogs, a small AlexNet on all of CIFAR-10"
RECALLED = "as recalled: the paper could not be read again"
OF_HEADS = {"clean_accuracy": 0.995, "clean_accuracy_drop": 0.002}


class Size(NamedTuple):
    """What differs between the sizes."""

    width: int  # of the network
    pretrain: int  # rows of each class for pre-training
    epochs: int  # of pre-training
    head_rows: int  # of each of the two classes, one shot
    tuned_rows: int  # of each of the ten classes, end to end
    tuned_epochs: int  # of fine-tuning end to end
    poisons: int  # end to end
    steps: tuple[int, int]  # of crafting, one shot and end to end
    candidates: tuple[int, int]  # targets that are tried, likewise
    targets: int  # of them, at most so many that count
    test: int  # rows for accuracy


SIZES = {
    "small": Size(4, 150, 2, 30, 10, 2, 5, (60, 60), candidates=(4, 4), targets=3, test=60),
    "full": Size(16, 2000, 6, 450, 100, 5, 50, (200, 100), candidates=(80, 50), targets=50, test=500),
    "paper": Size(64, 4000, 30, 450, 500, 10, 50, (1000, 1000), candidates=(900, 900), targets=500, test=2000),
}
HEAD = HeadRecipe(optax.adam(0.01), num_epochs=100, batch_size=32)
TUNED = optax.adam(1e-4)


class Problem(NamedTuple):
    """What one part of the benchmark draws."""

    targets: jax.Array  # [candidates, h, w, c]
    bases: jax.Array  # [candidates, k, h, w, c], nearest first
    order: np.ndarray  # [candidates], where each stands among the birds as drawn
    clean: mj.Data  # the training set; its first k rows, dogs, give way to bases or poisons
    test: mj.Data


def problem(seed: int, pictures: Images, net: Net, size: Size, k: int) -> Problem:
    """Rows that pre-training has not seen, birds of the test set, and each one's k nearest dogs.

    One shot (k = 1) there are two classes; end to end ten: the network knows birds, and the attacker tries those alone
    that it takes for birds.
    """
    classes, per_class = ([TARGET, BASE], size.head_rows) if k == 1 else (list(range(10)), size.tuned_rows)
    rng = np.random.default_rng(seed)
    later = 10 * size.pretrain + rng.permutation(len(pictures.y) - 10 * size.pretrain)
    fresh = {label: later[pictures.y[later] == label] for label in classes}
    drawn = rng.permutation(np.flatnonzero(pictures.y_test == TARGET))
    known = likeliest(net, pictures.x_test[drawn])[:, 0] == TARGET if k > 1 else np.ones(len(drawn), bool)
    order = np.flatnonzero(known)[: size.candidates[k > 1]]
    targets = drawn[order]
    test = [np.setdiff1d(np.flatnonzero(pictures.y_test == c), targets)[: size.test // len(classes)] for c in classes]
    filler, pool = np.split(fresh[BASE][per_class:][: k + 1000], [k])  # the filler holds the poisons' places
    near, far = (np.asarray(features(net, floats(x))) for x in (pictures.x_test[targets], pictures.x[pool]))
    nearest = np.stack([np.argsort(((far - own) ** 2).sum(axis=1), kind="stable")[:k] for own in near])
    rows = np.concatenate([filler, *[fresh[label][:per_class] for label in classes]])
    of = lambda x, y: mj.dataset(floats(x), jnp.asarray(np.searchsorted(classes, y), jnp.int32))
    clean = of(pictures.x[rows], pictures.y[rows])
    held_out = of(pictures.x_test[np.concatenate(test)], pictures.y_test[np.concatenate(test)])
    return Problem(floats(pictures.x_test[targets]), floats(pictures.x[pool[nearest]]), order, clean, held_out)


def collide(net: Net, num_steps: int, opacity: float) -> Callable:
    """`(key, target, bases [k], params) -> (poisons [k] in 8 bits, their mean distances before and after)`."""

    def run(key: jax.Array, target: jax.Array, bases: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        reach = threat.perturb_rows(jnp.arange(len(bases)))
        attack = attacks.feature_collision(net.model.features, threat=reach, beta=BETA, opacity=opacity)
        subject = mj.dataset(bases, jnp.zeros(len(bases), jnp.int32))
        known = mj.Known(params=params, goal=mj.dataset(target[None], jnp.zeros(1, jnp.int32)))
        made, _ = combine.iterate(attack, num_steps)(key, subject, known)
        poisons = eight_bits(made.x)
        aim = net.model.features(params, target[None])
        far = lambda x: jnp.mean(jnp.sum((net.model.features(params, x) - aim) ** 2, axis=1)) / jnp.sum(aim**2)
        return poisons, jnp.stack([far(bases), far(poisons)])

    return run


def judged(apply_fn: Callable, trainer: Any, wanted: int, own: int) -> Callable:
    """`(key, start, clean, first rows [k], target, test) -> dict` of one victim: hit, right, accuracy, loss."""

    def run(key: jax.Array, start: Any, clean: mj.Data, first: Any, target: Any, test: mj.Data) -> dict:
        params, info = trainer(key, start, clean._replace(x=clean.x.at[: first.shape[0]].set(first)))
        said = jnp.argmax(apply_fn(params, target[None]), axis=1)[0]
        accuracy = measure.accuracy(jnp.argmax(apply_fn(params, test.x), axis=1), test)
        return {"hit": said == wanted, "right": said == own, "accuracy": accuracy, "loss": info["loss"]}

    return run


def one_shot(net: Net, size: Size) -> Callable:
    """A trial: victims `[3]` of the clean rows, the base, the poison; a head of two classes on frozen features."""
    craft = collide(net, size.steps[0], 0.0)

    def run(key: Any, target: Any, bases: Any, params: Any, clean: mj.Data, test: mj.Data) -> dict[str, jax.Array]:
        craft_key, head_key, train_key = jax.random.split(key, 3)
        poison, distance = craft(craft_key, target, bases, params)
        see = lambda x: net.model.features(params, x)
        head = {"head": {"w": 1e-3 * jax.random.normal(head_key, (clean.x.shape[1], 2)), "b": jnp.zeros(2)}}
        victim = judged(LINEAR.apply, fine_tuning(LINEAR.apply, HEAD, clean.num_rows), wanted=1, own=0)
        firsts = jnp.stack([clean.x[:1], see(bases), see(poison)])
        found = jax.lax.map(lambda first: victim(train_key, head, clean, first, see(target[None])[0], test), firsts)
        return {**found, "distance": distance, "target": target, "base": bases[0], "poison": poison[0]}

    return run


def end_to_end(net: Net, size: Size) -> Callable:
    """A trial: victims `[4]` of the bases, one poison, watermarks alone, watermarked poisons; every parameter moves."""
    plain, marked = collide(net, size.steps[1], 0.0), collide(net, size.steps[1], OPACITY)

    def run(key: Any, target: Any, bases: Any, params: Any, clean: mj.Data, test: mj.Data) -> dict[str, jax.Array]:
        plain_key, marked_key, train_key = jax.random.split(key, 3)
        one, _ = plain(plain_key, target, bases[:1], params)
        poisons, distance = marked(marked_key, target, bases, params)
        watermarks = eight_bits(OPACITY * target[None] + (1 - OPACITY) * bases)
        recipe = HeadRecipe(TUNED, size.tuned_epochs, HEAD.batch_size)
        victim = judged(net.model.apply, fine_tuning(net.model.apply, recipe, clean.num_rows), wanted=BASE, own=TARGET)
        firsts = jnp.stack([bases, bases.at[:1].set(one), watermarks, poisons])
        found = jax.lax.map(lambda first: victim(train_key, params, clean, first, target, test), firsts)
        return {**found, "distance": distance, "target": target, "base": bases[0], "poison": poisons[0]}

    return run


def counted(found: dict[str, np.ndarray], order: np.ndarray, targets: int) -> tuple[dict[str, np.ndarray], int]:
    """The first targets that the clean victim gets right, and how many birds were passed over for them."""
    kept = np.flatnonzero(found["right"][:, 0])[:targets]
    if not kept.size:
        raise ValueError("no target is classified correctly without poisons; try more candidates.")
    return {name: value[kept] for name, value in found.items()}, int(order[kept[-1]] + 1 - kept.size)


@benchmark(bfloat16=True)
def run(size: str, seed: int, context: Any) -> Result:
    """Pre-trains both networks, then attacks heads by one poison and whole networks by one and by many."""
    pictures, chosen = images(embedded=size == "small"), SIZES[size]
    head_key, whole_key = jax.random.split(context.key)
    x, y = pictures.x[: 10 * chosen.pretrain], pictures.y[: 10 * chosen.pretrain]
    others = ~np.isin(y, (TARGET, BASE))
    options: dict[str, Any] = {"num_epochs": chosen.epochs, "width": chosen.width, "bfloat16": context.bfloat16}
    fit = lambda x, y: pretrained(jax.random.key(0), "convnet", x, y, **options)

    net = fit(x[others], y[others])
    task = problem(seed, pictures, net, chosen, 1)
    shared = (net.params, *(rows._replace(x=features(net, rows.x)) for rows in (task.clean, task.test)))
    each = (jax.random.split(head_key, len(task.targets)), task.targets, task.bases)
    found = trials(context, "one-shot", one_shot(net, chosen), each, shared)
    head, head_excluded = counted(found, task.order, chosen.targets)

    net = fit(x, y)
    task = problem(seed, pictures, net, chosen, chosen.poisons)
    each = (jax.random.split(whole_key, len(task.targets)), task.targets, task.bases)
    found = trials(context, "end-to-end", end_to_end(net, chosen), each, (net.params, task.clean, task.test))
    whole, whole_excluded = counted(found, task.order, chosen.targets)

    figures = {
        **share("success_one_shot_transfer", head["hit"][:, 2]),
        **share("success_one_shot_base_only", head["hit"][:, 1]),
        **share("success_end_to_end_1", whole["hit"][:, 1]),
        **share("success_end_to_end_50_watermark_only", whole["hit"][:, 2]),
        **share("success_end_to_end_50_watermark", whole["hit"][:, 3]),
        "clean_accuracy": head["accuracy"][:, 0].mean(),
        "clean_accuracy_drop": (head["accuracy"][:, 0] - head["accuracy"][:, 2]).mean(),
        "clean_accuracy_end_to_end": whole["accuracy"][:, 0].mean(),
        "clean_accuracy_drop_end_to_end": (whole["accuracy"][:, 0] - whole["accuracy"][:, 3]).mean(),
        "feature_distance_start": head["distance"][:, 0].mean(),
        "feature_distance_end": head["distance"][:, 1].mean(),
        "pixel_distance": np.sqrt(((head["poison"] - head["base"]) ** 2).mean(axis=(1, 2, 3))).mean(),
        "head_loss": head["loss"][:, 2].mean(),
        "num_features": net.params["head"]["w"].shape[0],
        "num_head_rows": 2 * chosen.head_rows + 1,
        "n_targets": len(head["hit"]),
        "n_excluded": head_excluded,
        "n_targets_end_to_end": len(whole["hit"]),
        "n_excluded_end_to_end": whole_excluded,
    }
    draw(context, {"one shot": head, "end to end": whole})
    reductions = [
        *pictures.notes,
        f"{GROUP_NORM}: here a ConvNet of width {chosen.width}",
        "one shot between birds and dogs, features of eight classes of small images (paper: ImageNet, dog and fish)",
        f"one shot: {figures['num_head_rows']} rows, {figures['num_features']} features, {figures['n_targets']} targets "
        "(paper: 1,801, 2,048 and about 1,099)",
        ONE_NETWORK,
        f"end to end on {task.clean.num_rows} rows for {chosen.tuned_epochs} epochs (paper: CIFAR-10's 50,000 for 10)",
    ]
    reductions += ["fewer poisons than the 50 of the figures' names"] * (chosen.poisons < 50)
    paper = {key: Paper(value, f"{PAPER}; {RECALLED}") for key, value in OF_HEADS.items()}
    paper["success_end_to_end_50_watermark"] = Paper(0.6, f"{WHOLE}; {RECALLED}")
    return Result(figures, reductions, paper | {"success_one_shot_transfer": Paper(1.0, PAPER)})


def draw(context: Any, parts: dict[str, dict[str, np.ndarray]]) -> None:
    """Targets, the nearest base of each, and the poison made of it."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(6, 8, figsize=(8, 6.6))
    for k, (part, found) in enumerate(parts.items()):
        for row, name in zip(axes[3 * k :], ("target", "base", "poison")):
            row[0].set_ylabel(f"{part}\n{name}")
            for axis, image in zip(row, found[name]):
                axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            for axis in row:
                axis.set(xticks=[], yticks=[])
    context.save_figure(figure, "poisons")
