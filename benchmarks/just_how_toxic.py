"""The published comparison of clean-label attacks on a retrained head: same targets, bases and budgets.

"Just How Toxic is Data Poisoning?" (Schwarzschild et al., ICML 2021), transfer learning on CIFAR-10: each of 100
published set-ups names a target of the test set, and 25 images that the attacker changes by at most 8/255 (checked
after a round trip through 8 bits) among the 2,500 on which a new head is trained. Success: the target is predicted as
the poisons' class after the last epoch. White box: the attacker has the feature extractor; black box: the victims'
extractors are other architectures.

The paper's extractors are pre-trained on CIFAR-100; these on CIFAR-10 images that are in no set-up's fine-tuning set
and are no target. Targets that the clean victim already gives to the poisons' class are counted as the paper counts
them; `success_none` is how many those are, with nothing poisoned.

`python -m benchmarks.just_how_toxic FOLDER ...` scores folders of poisons as the published benchmark writes them, and
a run at `full` leaves the poisons of its set-ups beside its record, for that benchmark to score.

Reference: A. Schwarzschild et al., ICML 2021, table 1.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks import _clean_label as shared
from benchmarks import _machine
from benchmarks._record import Paper, Result, UsageError, benchmark, usage_errors
from mlsec_jax import attacks, data, measure, threat

RADIUS = 8 / 255
ATTACKS = ("fc", "cp", "bp")
PUBLISHED = {"fc": (0.22, 0.07), "cp": (0.33, 0.07), "bp": (0.85, 0.085)}  # white box, black box
WHITE, BLACK = ("convnet", 2), (("vgg", 0), ("alexnet", 1))
EPOCHS, BATCH = 40, 128
COLLISION_STEPS = 120  # as published


class Size(NamedTuple):
    """What differs between the sizes: set-ups, crafting steps of the polytopes, images of a class and epochs to pre-train."""

    setups: int
    num_steps: int
    per_class: int
    num_epochs: int


SIZES = {"small": Size(3, 30, 200, 2), "full": Size(30, 400, 4000, 6), "paper": Size(100, 1200, 4000, 30)}


def attack(name: str, num_poisons: int) -> Callable[[Any], mj.Algorithm]:
    """`features_fn -> Algorithm` of one of the three under the benchmark's radius."""
    reach = threat.perturb_rows(jnp.arange(num_poisons), radius=RADIUS)
    if name == "fc":
        published: dict[str, Any] = {"opacity": 0.3, "relative": False, "step_size": 0.001, "shrink": 0.2, "grow": 1.0}
        return lambda features_fn: attacks.feature_collision(features_fn, threat=reach, **published)
    factory: Callable[..., mj.Algorithm] = shared.CONVEX_POLYTOPE if name == "cp" else attacks.bullseye_polytope
    return lambda features_fn: factory(features_fn, threat=reach, optimizer=optax.adam(0.04 * 0.25))


def setups(images: shared.Images, num: int) -> list[data.PoisonSetup]:
    """The first published set-ups; on the embedded digits, made-up ones of the same form."""
    if len(images.y) == 50_000:
        return data.poison_setups("transfer_learning")[:num]
    found = []
    for k in range(num):
        base = (k + 1) % 10
        target = int(np.flatnonzero(images.y_test == k)[k])
        found.append(data.PoisonSetup(target, k, base, np.flatnonzero(images.y == base)[-15:]))
    return found


class Seen(NamedTuple):
    """What an extractor makes of the trials' images: the table of all rows that some trial fine-tunes on.

    Attributes:
      net: the extractor.
      table: features and labels, `[m, d]`.
      places: `[trials, n]`, each trial's rows of the table, its bases first.
      targets: `[trials, d]`.
    """

    net: shared.Net
    table: mj.Data
    places: jax.Array
    targets: jax.Array


def seen(net: shared.Net, images: shared.Images, trials: list[data.PoisonSetup], num_rows: int) -> Seen:
    """Every image's features, once for all attacks."""
    rows = np.stack([data.fine_tuning_rows(images.y, trial, num_rows=num_rows) for trial in trials])
    used, place = np.unique(rows, return_inverse=True)
    table = mj.dataset(shared.features(net, shared.floats(images.x[used])), jnp.asarray(images.y[used], jnp.int32))
    targets = shared.features(net, shared.floats(images.x_test[[trial.target_index for trial in trials]]))
    return Seen(net, table, jnp.asarray(place.reshape(rows.shape)), targets)


def labels_of_targets(key: jax.Array, given: Seen, poison: jax.Array) -> np.ndarray:
    """What a new head, trained on each trial's poisoned set, takes its target for: `[trials]`."""
    poisons = shared.features(given.net, poison.reshape(-1, *poison.shape[2:])).reshape(*poison.shape[:2], -1)
    steps = given.places.shape[1] // BATCH
    optimizer = optax.chain(
        optax.add_decayed_weights(2e-4), optax.sgd(shared.stepped(0.01, steps, (30,)), momentum=0.9)
    )
    head_key, *keys = jax.random.split(key, len(given.targets) + 1)
    head = shared.LINEAR.init(head_key, given.table.x[:1])
    recipe = shared.HeadRecipe(optimizer, EPOCHS, BATCH)
    tests = given.targets[:, None]
    logits = shared.linear_victims(jnp.stack(keys), given.table, given.places, poisons, tests, head, recipe)
    return np.argmax(np.asarray(logits)[:, 0], axis=1)


def nets(
    key: jax.Array,
    images: shared.Images,
    chosen: Size,
    which: Sequence[tuple[str, int]] = (WHITE, *BLACK),
    bfloat16: bool = False,
) -> dict[tuple[str, int], shared.Net]:
    """The pre-trained extractors."""
    rows = shared.pretraining_rows(images.y, chosen.per_class)
    return {
        (name, k): shared.pretrained(
            jax.random.fold_in(key, k),
            name,
            images.x[rows],
            images.y[rows],
            num_epochs=chosen.num_epochs,
            bfloat16=bfloat16,
        )
        for name, k in which
    }


@benchmark(bfloat16=True)
def run(size: str, seed: int, context: Any) -> Result:
    """Crafts for every set-up in the white-box network, and judges there and in the others."""
    chosen = SIZES[size]
    images = shared.images(fallback=size == "small")
    trials = setups(images, chosen.setups)
    num_rows = 2500 if len(images.y) == 50_000 else 1000
    net_key, craft_key, victim_key = jax.random.split(context.key, 3)
    victims = nets(net_key, images, chosen, bfloat16=context.bfloat16)
    bases = shared.floats(np.stack([images.x[trial.base_indices] for trial in trials]))
    targets = shared.floats(np.stack([images.x_test[trial.target_index] for trial in trials]))
    wanted = np.asarray([trial.base_class for trial in trials])
    poisons: dict[str, dict[str, Any]] = {"none": {"poison": bases}}
    figures: dict[str, Any] = {"n_trials": len(trials)}
    for k, name in enumerate(ATTACKS):
        poisons[name] = shared.craft(
            context,
            name,
            jax.random.fold_in(craft_key, k),
            attack(name, bases.shape[1]),
            *shared.stacked([victims[WHITE]], lambda model: model.features),
            bases,
            targets,
            num_steps=min(chosen.num_steps, COLLISION_STEPS) if name == "fc" else chosen.num_steps,
        )
        shared.check_levels(name, poisons[name]["poison"], bases, RADIUS)
        figures[f"seconds_per_target_{name}"] = poisons[name]["seconds"]
    hits: dict[tuple[str, str], np.ndarray] = {}
    for (net_name, k), net in victims.items():
        figures[f"accuracy_{net_name}{k}"] = shared.accuracy(net, images.x_test[:2000], images.y_test[:2000])
        given = functools.cache(functools.partial(seen, net, images, trials, num_rows))
        for name, crafted in poisons.items():
            once = lambda given=given, crafted=crafted: {
                "label": labels_of_targets(victim_key, given(), jnp.asarray(crafted["poison"]))
            }
            hits[name, net_name] = context.once(f"{name}-{net_name}", once)["label"] == wanted
    boxes = {"white": [WHITE[0]], "black": [name for name, _ in BLACK]}
    for name in ("none", *ATTACKS):
        for box, members in boxes.items():
            found = np.stack([hits[name, member] for member in members])
            figures |= shared.share(f"success_{name}_{box}", found, len(trials)) | {f"n_trials_{box}": found.size}
    for better, worse in (("bp", "cp"), ("cp", "fc")):
        test = measure.sign_test(hits[better, WHITE[0]], hits[worse, WHITE[0]], alternative="greater")
        figures[f"p_{better}_over_{worse}_white"] = test.p_value
    _draw(context, figures)
    if size != "small":
        _export(context.out / f"{context.name}.poisons", images, trials, poisons)
    reductions = [
        *images.notes,
        shared.GROUP_NORM,
        shared.SHARED_TARGETS,
        "extractors pre-trained on other CIFAR-10 images, not on CIFAR-100",
        f"{len(trials)} set-ups (the paper's: 100), {chosen.num_steps} crafting steps of the polytopes (1,200)",
        "heads are trained on cached features, without augmentation",
        f"white box: slim {WHITE[0]}; black box: {' and '.join(name for name, _ in BLACK)}",
    ]
    source = "Schwarzschild et al., ICML 2021, table 1"
    paper = {
        f"success_{name}_{box}": Paper(value, source)
        for name, values in PUBLISHED.items()
        for box, value in zip(("white", "black"), values)
    }
    return Result(figures, reductions, paper)


def _draw(context: Any, figures: dict[str, Any]) -> None:
    """Success of each attack in both boxes, with the intervals in which every target counts once, and the paper's."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    names = ("none", *ATTACKS)
    for place, (axis, box) in enumerate(zip(axes, ("white", "black"))):
        keys = [f"success_{name}_{box}" for name in names]
        value = np.array([figures[key] for key in keys])
        ends = np.array([[figures[f"{key}_{end}_by_target"] for key in keys] for end in ("low", "high")])
        axis.errorbar(range(len(names)), value, np.abs(ends - value[None]), fmt="o", capsize=3, label="ours")
        axis.plot(range(1, len(names)), [PUBLISHED[name][place] for name in ATTACKS], "x", color="grey", label="paper")
        axis.set(xticks=range(len(names)), xticklabels=names, title=f"{box} box", ylim=(-0.03, 1.03))
    axes[0].legend()
    context.save_figure(figure, "success")


def _export(folder: Path, images: shared.Images, trials: list[data.PoisonSetup], poisons: dict[str, Any]) -> None:
    """Writes every attack's poisons as the published benchmark reads them: `folder/ATTACK/SET-UP/`."""
    for name in ATTACKS:
        for k, trial in enumerate(trials):
            data.write_poisons(
                folder / name / str(k),
                data.PoisonFolder(
                    np.asarray(poisons[name]["poison"][k]),
                    np.full(len(trial.base_indices), trial.base_class, np.int32),
                    trial.base_indices,
                    images.x_test[trial.target_index],
                    trial.target_class,
                ),
            )


def _read(folder: str) -> data.PoisonFolder:
    """A folder of poisons; one that is damaged is the caller's to put right."""
    try:
        return data.read_poisons(folder)
    except ValueError as error:
        raise UsageError(f"{folder}: {error}") from error


def checked(folder: str, poisons: data.PoisonFolder, trial: data.PoisonSetup, images: shared.Images) -> None:
    """Raises unless the folder's poisons are a published set-up's, of its label and within the budget."""
    bases = images.x[poisons.base_indices]
    if poisons.x.shape != bases.shape or poisons.target_x.shape != bases.shape[1:]:
        shapes = f"{poisons.x.shape} and {poisons.target_x.shape}"
        raise UsageError(f"{folder}: expected images like their bases {bases.shape} and a target like one, got {shapes}.")
    if set(poisons.y.tolist()) != {trial.base_class}:
        raise UsageError(f"{folder}: expected poisons of label {trial.base_class}, got {sorted(set(poisons.y.tolist()))}.")
    moved = np.abs(poisons.x.astype(int) - bases).max()
    if moved > 9:
        raise UsageError(f"{folder}: expected poisons within 8 levels of their bases (9 with truncation), got {moved}.")


def asked(folder: str, poisons: data.PoisonFolder) -> jax.Array:
    """What the victim is asked: the folder's target, under its patch where it has one, `[h, w, c]`."""
    target = np.array(shared.floats(poisons.target_x))
    if poisons.patch is None or poisons.corner is None:
        return jnp.asarray(target)
    patch, (left, top) = np.moveaxis(np.asarray(poisons.patch), 0, -1), poisons.corner
    under = target[max(top, 0) : top + patch.shape[0], max(left, 0) : left + patch.shape[1]]
    if under.shape != patch.shape:
        got = f"{poisons.patch.shape} at {poisons.corner}"
        raise UsageError(f"{folder}: expected a patch [c, h, w] inside the target, got {got}.")
    under[:] = patch
    return jnp.asarray(target)


def score(folders: list[str], *, seed: int = 0) -> list[bool]:
    """Scores folders of poisons, of ours or others, in the white-box victim of `full`: whether each target fell."""
    if not folders:
        raise UsageError("expected folders of poisons: python -m benchmarks.just_how_toxic FOLDER ...")
    loaded = [_read(folder) for folder in folders]
    known = data.poison_setups("transfer_learning")
    images = shared.images()
    net_key, _, victim_key = jax.random.split(jax.random.key(seed), 3)
    net = nets(net_key, images, SIZES["full"], [WHITE])[WHITE]
    found = []
    for folder, poisons in zip(folders, loaded, strict=True):
        same = [trial for trial in known if set(trial.base_indices) == set(poisons.base_indices)]
        if len(same) != 1:
            raise UsageError(f"{folder}: expected the bases of one published set-up, got those of {len(same)}.")
        trial = same[0]._replace(base_indices=poisons.base_indices)
        checked(folder, poisons, trial, images)
        target = asked(folder, poisons)[None]
        given = seen(net, images, [trial], 2500)._replace(targets=shared.features(net, target))
        label = labels_of_targets(victim_key, given, shared.floats(poisons.x)[None])
        found.append(bool(label[0] == trial.base_class))
    return found


if __name__ == "__main__":
    _machine.choose(None, None)
    with usage_errors():
        _machine.start(None)
        outcome = score(sys.argv[1:])
    print(f"{sum(outcome)} of {len(outcome)} targets taken for the poisons' class")
