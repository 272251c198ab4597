"""Hidden trigger: poisons that show no trigger and carry true labels make a retrained head obey one.

CIFAR-10 (digits at `small`). A victim tells two of the ten classes apart: it trains a head on frozen features of clean rows
and of poisons that are added. The network was pre-trained on other images of the ten classes; the features are the maxima
and means over space of what each of its blocks gives, standardised (a head on all layers: Evci et al. 2022). On the last
layer alone not even a trigger in plain sight is learned without harm to the source class, so there is nothing to hide. The
poisons are further images of the target class, changed by at most 16/255 (after rounding to 8 bits) so that their features
are those of source images with the trigger, 8x8 random colours at a random place; the closest are used. The trigger appears
in tests only, at a random place again. `patched_accuracy_...` is the accuracy on source images with the trigger, whose
complement is the attack's success. That all layers are needed was first seen on test images (ranks below 500 of a class),
the standardisation, the rows and the head's rate were then chosen on training images; other keys and triggers, pairs that
overlap.

The victims of a trial share a key and train on as many rows. In place of the poisons the *clean model* gets the images
that they are made of; *noise* the same images with random signs at full radius; *badnets* source images with the
trigger in plain sight and the wrong label. Intervals are over images, many to a victim; `..._std` is over trials.

References: Saha, Subramanya & Pirsiavash, "Hidden Trigger Backdoor Attacks", AAAI 2020; Evci, Dumoulin, Larochelle & Mozer,
"Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning", ICML 2022.
"""

from __future__ import annotations

import itertools
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
    first_of_each,
    floats,
    images,
    outputs,
    pooled,
    pretrained,
    share,
    trials,
)
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, combine, models, threat

RADIUS = 16 / 255
SIDE = 8  # of the trigger
STEP_SIZE = 4 / 255  # of Adam, a cosine to zero
HEAD = HeadRecipe(optax.adam(0.001), num_epochs=40, batch_size=50)
VICTIMS = ("clean", "hidden", "noise", "badnets")
PAPER = "Saha et al., AAAI 2020: ImageNet, ten random pairs, 400 poisons beside 1,600 rows, AlexNet"


class Size(NamedTuple):
    """What differs between the sizes.

    Attributes:
      width: of the network.
      pretrain: the first rows of each class, which it is pre-trained on.
      epochs: of pre-training.
      crafted: poisons of a trial, each with a source image of its own.
      together: of them, paired among each other.
      poisons: of them, the closest to their sources, that are used.
      steps: of crafting.
      tuned: rows of each of the two classes that the head trains on.
      pairs: trials, each an ordered pair of classes and a trigger.
      compared: trials that are crafted with each of the three pairings.
      test: held-out images of each class.
    """

    width: int
    pretrain: int
    epochs: int
    crafted: int
    together: int
    poisons: int
    steps: int
    tuned: int
    pairs: int
    compared: int
    test: int


SIZES = {
    "small": Size(4, 150, 2, 40, 20, 30, 40, 100, pairs=2, compared=1, test=100),
    "full": Size(16, 4000, 8, 100, 50, 80, 200, 400, pairs=24, compared=3, test=300),
    "paper": Size(32, 4000, 24, 250, 50, 200, 300, 500, pairs=48, compared=16, test=1000),
}


class Problem(NamedTuple):
    """What a run draws; images are `[classes, n, h, w, c]`.

    Attributes:
      pairs: `[pairs, 2]`, source and target.
      crafting: images that become poisons, and source images that they are to meet.
      tuned: the head's training set.
      test: held-out images.
    """

    pairs: np.ndarray
    crafting: jax.Array
    tuned: jax.Array
    test: jax.Array


def problem(seed: int, pictures: Images, size: Size) -> Problem:
    """Pairs of classes, and rows of each for crafting, for training and for tests; the network has seen none of them."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(list(itertools.permutations(range(10), 2)))[: size.pairs]
    drawn = lambda y, first, num: np.stack([rng.permutation(np.flatnonzero(y == c)[first:])[:num] for c in range(10)])
    rows = drawn(pictures.y, size.pretrain, size.crafted + size.tuned)
    crafting, tuned = (floats(pictures.x[part]) for part in (rows[:, : size.crafted], rows[:, size.crafted :]))
    return Problem(pairs, crafting, tuned, floats(pictures.x_test[drawn(pictures.y_test, 0, size.test)]))


def extractor(pictures: Images, size: Size) -> Net:
    """The pre-trained network, whose features are its blocks' maxima and means, standardised on its training set."""
    rows = first_of_each(pictures.y, size.pretrain)
    x, y = pictures.x[rows], pictures.y[rows]
    net = pretrained(jax.random.key(0), "convnet", x, y, num_epochs=size.epochs, width=size.width)

    def blocks(params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return pooled(net.model.layers(params, x, key)[:-1], jnp.max, jnp.mean)

    def standardised(params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return (blocks(params["net"], x, key) - params["mean"][None]) / params["std"][None]

    seen = outputs(blocks, net.params, floats(x[:: max(len(x) // 2000, 1)]))
    std = jnp.maximum(jnp.std(seen, axis=0), 0.02)  # of a dead channel it is zero
    model = models.Model(net.model.init, net.model.apply, standardised)
    return Net(model, {"net": net.params, "mean": jnp.mean(seen, axis=0), "std": std})


def colours(key: jax.Array, channels: int) -> threat.Trigger:
    """The paper's trigger: a grid of 4x4 random colours, enlarged; its place is random for every image."""
    grid = jax.random.uniform(key, (4, 4, channels))
    return threat.patch(eight_bits(jax.image.resize(grid, (SIDE, SIDE, channels), "bilinear")), at=None)


def craft(net: Net, size: Size, pairing: str) -> Callable:
    """`(key, trigger, bases [crafted], sources [crafted], params) -> (poisons [poisons], bases, distances, at the start)`.

    Distances are squared, means over the poisons used (in 8 bits), and over all bases at the start.
    """
    reach = threat.perturb_rows(jnp.arange(size.together), radius=RADIUS)
    optimizer = optax.adam(optax.cosine_decay_schedule(STEP_SIZE, size.steps))
    labels = jnp.zeros(size.together, jnp.int32)  # no loss here reads them

    def run(key: jax.Array, trigger: Any, bases: jax.Array, sources: jax.Array, params: Any) -> tuple:
        attack = attacks.hidden_trigger(net.model.features, trigger, threat=reach, optimizer=optimizer, pairing=pairing)

        def batch(part: tuple) -> tuple:
            key, bases, sources = part
            subject, known = mj.dataset(bases, labels), mj.Known(params=params, goal=mj.dataset(sources, labels))
            state, infos = combine.run(attack, key, subject, known, num_steps=size.steps)
            poison = eight_bits(state.poison)
            distance = attack.step(key, state._replace(poison=poison), subject, known)[1]["distance"]
            return poison, distance, infos["distance"][0]

        apart = lambda x: x.reshape(-1, size.together, *x.shape[1:])
        keys = jax.random.split(key, size.crafted // size.together)
        made = jax.lax.map(batch, (keys, apart(bases), apart(sources)))
        poison, distance, start = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in made)
        used = jnp.argsort(distance)[: size.poisons]
        return poison[used], bases[used], jnp.mean(distance[used]), jnp.mean(start)

    return run


def trial(net: Net, size: Size, pairing: str = "greedy") -> Callable:
    """`(key, (source, target), task, features of its tuned and test images) -> dict` of the four victims and the distances."""
    made = craft(net, size, pairing)
    labels = jnp.repeat(jnp.array([1, 0, 1]), jnp.array([size.poisons, size.tuned, size.tuned]))
    trainer = fine_tuning(LINEAR.apply, HEAD, len(labels))

    def run(key: jax.Array, pair: jax.Array, params: Any, crafting: Any, tuned: Any, test_x: Any, test: Any) -> dict:
        trigger_key, craft_key, noise_key, *place_keys, head_key, train_key = jax.random.split(key, 7)
        source, target = pair
        trigger = colours(trigger_key, test_x.shape[-1])
        poisons, bases, near, far = made(craft_key, trigger, crafting[target], crafting[source], params)
        signs = jax.random.rademacher(noise_key, bases.shape, bases.dtype)
        noisy = eight_bits(jnp.clip(bases + RADIUS * signs, 0, 1))
        stamped = trigger(place_keys[0], crafting[source][: size.poisons])
        patched = outputs(net.model.features, params, trigger(place_keys[1], test_x[source]))
        head = {"head": {"w": 1e-3 * jax.random.normal(head_key, (tuned.shape[-1], 2)), "b": jnp.zeros(2)}}

        def victim(added: jax.Array) -> dict[str, jax.Array]:
            rows = jnp.concatenate([outputs(net.model.features, params, added), tuned[source], tuned[target]])
            fitted, info = trainer(train_key, head, mj.dataset(rows, labels))
            said = lambda x: jnp.argmax(LINEAR.apply(fitted, x), axis=1)
            right = jnp.concatenate([said(test[source]) == 0, said(test[target]) == 1])
            return {"accuracy": jnp.mean(right), "patched": said(patched) == 0, "loss": info["loss"]}

        found = jax.lax.map(victim, jnp.stack([bases, poisons, noisy, stamped]))
        shown = {"source": test_x[source][0], "stamped": trigger(place_keys[1], test_x[source])[0]}
        return {**found, **shown, "base": bases[0], "poison": poisons[0], "near": near, "far": far}

    return run


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Pre-trains; crafts, and judges four victims, for pairs of classes."""
    pictures, chosen = images(embedded=size == "small"), SIZES[size]
    task = problem(seed, pictures, chosen)
    net = extractor(pictures, chosen)
    of = lambda x: jnp.stack([features(net, each) for each in x])
    everywhere = (net.params, task.crafting, of(task.tuned), task.test, of(task.test))
    pairs = jnp.asarray(task.pairs)
    keys = jax.random.split(context.key, len(pairs))
    found = trials(context, "greedy", trial(net, chosen), (keys, pairs), everywhere)
    first = np.arange(chosen.compared)
    compared = {"greedy": {name: value[first] for name, value in found.items()}}
    for pairing in ("optimal", "faithful"):
        compared[pairing] = trials(context, pairing, trial(net, chosen, pairing), (keys[first], pairs[first]), everywhere)

    accuracy = dict(zip(VICTIMS, found["accuracy"].mean(axis=0)))
    patched = dict(zip(VICTIMS, np.moveaxis(found["patched"], 1, 0)))
    drops = (patched["clean"].mean(axis=1) - patched["hidden"].mean(axis=1)).astype(float)
    figures = {
        "accuracy_clean": accuracy["clean"],
        "accuracy_poisoned": accuracy["hidden"],
        "accuracy_noise": accuracy["noise"],
        "accuracy_badnets_same_budget": accuracy["badnets"],
        "accuracy_lost": accuracy["clean"] - accuracy["hidden"],
        **share("patched_accuracy_clean_model", patched["clean"]),
        **share("patched_accuracy_poisoned_model", patched["hidden"]),
        **share("patched_accuracy_noise", patched["noise"]),
        **share("asr_badnets_same_budget", ~patched["badnets"]),
        "patched_accuracy_drop": drops.mean(),
        "patched_accuracy_drop_std": drops.std(),
        "patched_accuracy_drop_lowest": drops.min(),
        **share("trials_with_a_drop_of_40_points", drops >= 0.4),
        "distance_left": np.mean(found["near"] / found["far"]),
    }
    for pairing, each in compared.items():
        figures |= share(f"patched_accuracy_{pairing}", each["patched"][:, 1])
        figures[f"distance_left_{pairing}"] = np.mean(each["near"] / each["far"])
    figures |= {
        "num_features": len(net.params["mean"]),
        "num_head_rows": 2 * chosen.tuned,
        "num_poisons": chosen.poisons,
        "n_trials": len(pairs),
        "n_trials_compared": len(first),
        "n_images_a_trial": chosen.test,
    }
    draw(context, found, drops)
    reductions = [
        *pictures.notes,
        f"{GROUP_NORM}: here a ConvNet of width {chosen.width}, whose blocks the head all sees (paper: AlexNet, the last)",
        f"{chosen.poisons} poisons, the closest of {chosen.crafted}, beside {2 * chosen.tuned} rows (paper: 400 beside 1,600)",
        f"crafted by {chosen.steps} steps of Adam with a cosine (paper: 5,000 of gradient descent)",
        "heads are trained on cached features by Adam, without dropout (paper: SGD, with dropout)",
        f"{len(pairs)} trials share one extractor and ten classes: they are not independent",
        ONE_NETWORK,
    ]
    published = {"patched_accuracy_clean_model": 0.987, "patched_accuracy_poisoned_model": 0.437}
    published |= {"accuracy_clean": 0.993, "accuracy_poisoned": 0.982}
    return Result(figures, reductions, {name: Paper(value, PAPER) for name, value in published.items()})


def draw(context: Any, found: dict[str, np.ndarray], drops: np.ndarray) -> None:
    """A poison beside its base and the trigger on a source image; the drop of every trial."""
    import matplotlib.pyplot as plt

    num = min(8, len(drops))
    figure, axes = plt.subplots(4, num, figsize=(1.1 * num, 4.6), squeeze=False)
    for row, name in zip(axes, ("base", "poison", "source", "stamped")):
        row[0].set_ylabel(name)
        for axis, image in zip(row, found[name]):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    context.save_figure(figure, "images")

    figure, axis = plt.subplots(figsize=(6, 3.5))
    right = found["patched"][np.argsort(-drops, kind="stable")].mean(axis=2)
    for place, name in enumerate(VICTIMS):
        axis.bar(np.arange(len(drops)) + 0.2 * place - 0.3, right[:, place], 0.2, label=name)
    axis.set(xlabel="trial", ylabel="accuracy on patched sources", ylim=(0, 1))
    axis.legend()
    context.save_figure(figure, "trials")
