"""Feature collision, convex and bullseye polytope: 5 poisons in 500 rows make a head take one frog for a ship.

The set-up of Zhu et al. and Aghakhani et al. on CIFAR-10: networks are pre-trained on 4,000 images of each class (the
papers': the first 4,800); a head is fine-tuned on 50 further images of each, of which the attacker changes the first
five ships by at most 25 levels of 255 (the papers' 0.1 is 25.5); each target is a frog that no training set holds, and the
victim's last epoch is judged after the poisons went through 8 bits. All three attacks craft in the same surrogates, with
dropout on, by as many steps of Adam.

Victims: *white* are the surrogates themselves (without dropout), *gray* the same architectures from other keys,
*black* an architecture that the attacker does not have. *linear* victims retrain the head that they were pre-trained
with; *end2end* ones fine-tune every parameter, against poisons that match several layers. Success is the fraction of
victims and targets; only targets that the victim classifies rightly without poisons count. `centroid_distance` is
`‖φ(t) - mean φ(x)‖ / ‖φ(t)‖` in the gray and black victims, which the attack never saw.

References: Zhu et al., ICML 2019; Aghakhani et al., EuroS&P 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks import _clean_label as shared
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, measure, models, parallel, threat

TARGET_CLASS, BASE_CLASS, POISONS = 6, 8, 5
RADIUS = 25 / 255  # the whole levels within 0.1: what 8 bits round to is within it too
ATTACKS = ("fc", "cp", "bp")


class Size(NamedTuple):
    """What differs between the sizes: rows a class to pre-train on, targets, steps; how many of each architecture."""

    pretraining: int
    num_epochs: int
    targets: int
    end2end_targets: int
    num_steps: int
    surrogates: tuple[tuple[str, int], ...]
    gray: tuple[tuple[str, int], ...]
    black: tuple[tuple[str, int], ...]


SIZES = {
    "small": Size(250, 3, 12, 0, 60, (("convnet", 1),), (("convnet", 1),), (("vgg", 1),)),
    "full": Size(4000, 6, 50, 10, 400, (("convnet", 8),), (("convnet", 3),), (("vgg", 1), ("alexnet", 1))),
    "paper": Size(
        4000,
        20,
        50,
        50,
        1500,
        (("convnet", 6), ("alexnet", 6), ("resnet", 6)),
        (("convnet", 2), ("alexnet", 2), ("resnet", 2)),
        (("vgg", 2),),
    ),
}
END2END_VICTIMS = 2  # of each box


class Problem(NamedTuple):
    """The images of the fine-tuning set (bases first) and the targets; which rows networks are pre-trained on."""

    tuning: mj.Data
    targets: jax.Array
    pretraining: np.ndarray


def problem(images: shared.Images, size: Size) -> Problem:
    """Cuts the official training order as the papers do."""
    last = shared.LAST if len(images.y) == 50_000 else len(images.y) // 10 - 120
    later = [np.flatnonzero(images.y == c)[last:] for c in range(10)]
    rows = [each[:50] for each in later]
    bases = rows[BASE_CLASS][:POISONS]
    order = np.concatenate([bases, np.setdiff1d(np.concatenate(rows), bases)])
    tuning = mj.dataset(shared.floats(images.x[order]), jnp.asarray(images.y[order], jnp.int32))
    targets = shared.floats(images.x[later[TARGET_CLASS][50 : 50 + size.targets]])
    return Problem(tuning, targets, shared.pretraining_rows(images.y, size.pretraining))


def attack(name: str) -> Callable[[Any], mj.Algorithm]:
    """`features_fn -> Algorithm` of one of the three, at the papers' radius, in whole levels."""
    reach = threat.perturb_rows(jnp.arange(POISONS), radius=RADIUS)
    factories: dict[str, Callable[..., mj.Algorithm]] = {
        "fc": attacks.feature_collision,
        "cp": shared.CONVEX_POLYTOPE,
        "bp": attacks.bullseye_polytope,
    }
    factory = factories[name]
    return lambda features_fn: factory(features_fn, threat=reach, optimizer=optax.adam(0.04 * 0.25), num_draws=1)


def judge_linear(key: jax.Array, net: shared.Net, given: Problem, poison: jax.Array) -> dict[str, np.ndarray]:
    """Heads retrained as in the papers' code: whether each target is taken for a ship, and the centroid's distance."""
    clean = given.tuning._replace(x=shared.features(net, given.tuning.x))
    targets = shared.features(net, given.targets)
    poisons = shared.features(net, poison.reshape(-1, *poison.shape[2:])).reshape(*poison.shape[:2], -1)
    steps = clean.num_rows // 64
    recipe = shared.HeadRecipe(optax.adam(shared.stepped(0.1, steps, (30, 45))), 60, 64)
    keys = jax.random.split(key, len(targets))
    rows = jnp.broadcast_to(jnp.arange(clean.num_rows), (len(targets), clean.num_rows))
    logits = shared.linear_victims(keys, clean, rows, poisons, targets[:, None], net.head, recipe)
    distance = jnp.linalg.norm(jnp.mean(poisons, axis=1) - targets, axis=1) / jnp.linalg.norm(targets, axis=1)
    return {"label": np.argmax(np.asarray(logits)[:, 0], axis=1), "distance": np.asarray(distance)}


def judge_end2end(key: jax.Array, net: shared.Net, given: Problem, poison: jax.Array) -> dict[str, np.ndarray]:
    """Every parameter fine-tuned in evaluation mode, ten epochs of the papers' sixty."""
    steps = given.tuning.num_rows // 64
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(shared.stepped(3e-4, steps, (5, 8))))
    recipe = shared.HeadRecipe(optimizer, 10, 64)
    trainer = shared.fine_tuning(net.model.apply, recipe, given.tuning.num_rows)

    def one(key: jax.Array, poison: jax.Array, target: jax.Array, tuning: mj.Data, params: Any) -> jax.Array:
        rows = tuning._replace(x=tuning.x.at[:POISONS].set(poison))
        return net.model.apply(trainer(key, params, rows)[0], target[None])[0]

    spread = jax.jit(parallel.spread(one, in_axes=(0, 0, 0, None, None)))
    keys = jax.random.split(key, len(poison))
    logits = spread(keys, poison, given.targets[: len(poison)], given.tuning, net.params)
    return {"label": np.argmax(np.asarray(logits), axis=1)}


def pooled(found: Mapping[str, np.ndarray], clean: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Over a box's victims: successes, and which trials count (`[victims, targets]` each)."""
    labels = np.stack([found[net] for net in clean])
    valid = np.stack([each for each in clean.values()]) == TARGET_CLASS
    return (labels == BASE_CLASS) & valid, valid


def networks(key: jax.Array, wanted: Any, x: np.ndarray, y: np.ndarray, **options: Any) -> dict[str, shared.Net]:
    """The networks of a box, by name."""
    found: dict[str, shared.Net] = {}
    for index, (name, num) in enumerate(wanted):
        keys = jax.random.split(jax.random.fold_in(key, index), num)
        each = shared.pretrained_each(keys, name, x, y, **options)
        found |= {f"{name}{k}": net for k, net in enumerate(each)}
    return found


@benchmark(bfloat16=True)
def run(size: str, seed: int, context: Any) -> Result:
    """Pre-trains, crafts with each attack, and judges in every victim."""
    chosen = SIZES[size]
    images = shared.images(fallback=size == "small")
    given = problem(images, chosen)
    x, y = images.x[given.pretraining], images.y[given.pretraining]
    net_key, craft_key, victim_key = jax.random.split(context.key, 3)
    boxes: dict[str, dict[str, shared.Net]] = {}
    wanted = {"white": chosen.surrogates, "gray": chosen.gray, "black": chosen.black}
    for index, box in enumerate(context.progress(list(wanted), "networks")):
        options: dict[str, Any] = {"num_epochs": chosen.num_epochs, "bfloat16": context.bfloat16}
        if box == "white":
            options["block_dropout"] = 0.2
        boxes[box] = networks(jax.random.fold_in(net_key, index), wanted[box], x, y, **options)
    surrogates = list(boxes["white"].values())
    figures: dict[str, Any] = {"n_targets": chosen.targets, "n_targets_end2end": chosen.end2end_targets}
    rows = slice(0, 2000)
    for box, members in boxes.items():
        for name, net in members.items():
            figures[f"accuracy_{box}_{name}"] = shared.accuracy(net, images.x_test[rows], images.y_test[rows])

    modes = {"linear": (lambda model: model.features, given)}
    if chosen.end2end_targets:
        fewer = given._replace(targets=given.targets[: chosen.end2end_targets])
        modes["end2end"] = (lambda model: functools.partial(_last_layers, model), fewer)
    for mode, (fn_of, part) in modes.items():
        judge = judge_linear if mode == "linear" else judge_end2end
        most = None if mode == "linear" else END2END_VICTIMS
        victims = {box: dict(list(members.items())[:most]) for box, members in boxes.items()}
        nothing = jnp.broadcast_to(part.tuning.x[:POISONS], (len(part.targets), *part.tuning.x[:POISONS].shape))
        poisons = {"none": {"poison": nothing}}
        for name in ATTACKS:
            poisons[name] = shared.craft(
                context,
                f"{mode}-{name}",
                jax.random.fold_in(craft_key, ATTACKS.index(name)),
                attack(name),
                *shared.stacked(surrogates, fn_of),
                nothing,
                part.targets,
                num_steps=chosen.num_steps,
            )
            shared.check_levels(name, poisons[name]["poison"], nothing, RADIUS)
            figures[f"seconds_per_target_{name}" + ("" if mode == "linear" else "_end2end")] = poisons[name]["seconds"]
        success: dict[tuple[str, str], np.ndarray] = {}
        for box, members in victims.items():
            found: dict[str, dict[str, np.ndarray]] = {}
            distances: dict[str, list] = {}
            for name, crafted in poisons.items():
                found[name] = {}
                for net_name, net in members.items():
                    once = lambda net=net, crafted=crafted, part=part, judge=judge: judge(
                        victim_key, net, part, jnp.asarray(crafted["poison"])
                    )
                    result = context.once(f"{mode}-{name}-{box}-{net_name}", once)
                    found[name][net_name] = result["label"]
                    distances.setdefault(name, []).append(result.get("distance", np.zeros(0)))
            for name in ("none", *ATTACKS):
                hits, valid = pooled(found[name], found["none"])
                success[name, box] = hits
                if valid.any():  # a clean victim that gets no target right judges none
                    figures |= shared.share(f"success_{name}_{box}_{mode}", hits[valid], valid.any(axis=0).sum())
                if mode == "linear":
                    figures[f"centroid_distance_{name}_{box}"] = np.mean(distances[name])
            figures[f"n_trials_{box}_{mode}"] = valid.sum()
            for better, worse in (("bp", "cp"), ("cp", "fc")):
                test = measure.sign_test(
                    success[better, box].sum(0), success[worse, box].sum(0), alternative="greater"
                )
                figures[f"p_{better}_over_{worse}_{box}_{mode}"] = test.p_value
    for name in ATTACKS:
        unseen = [figures[f"centroid_distance_{name}_{box}"] for box in ("gray", "black")]
        figures[f"centroid_distance_{name}"] = np.mean(unseen)
    _draw(context, figures, chosen)
    reductions = [
        *images.notes,
        shared.GROUP_NORM,
        shared.SHARED_TARGETS,
        f"surrogates: {len(surrogates)} (the papers': 18, and 12 end to end), pre-trained for {chosen.num_epochs} epochs",
        f"{chosen.num_steps} crafting steps (the papers': 4,000 and 1,500)",
        "an epoch of a victim leaves out the rows that fill no batch of 64",
    ]
    if chosen.end2end_targets:
        reductions.append(f"{END2END_VICTIMS} end-to-end victims of each box, trained for 10 epochs (the papers': 60) "
                          "by Adam at 3e-4, a tenth of it from epoch 5 and a hundredth from epoch 8 (1e-4)")
    else:
        reductions.append("end-to-end victims are left to --size full")
    source = "Zhu et al., ICML 2019: CP above one half on most gray-box victims, FC never"
    paper = {"success_cp_gray_linear": Paper(0.5, source)}
    return Result(figures, reductions, {key: value for key, value in paper.items() if key in figures})


def _last_layers(model: models.Model, params: Any, x: jax.Array, key: jax.Array | None = None) -> tuple:
    """The last two blocks and the features."""
    return model.layers(params, x, key)[-3:]


def _draw(context: Any, figures: Mapping[str, Any], chosen: Size) -> None:
    """Success of each attack in each box, with intervals."""
    import matplotlib.pyplot as plt

    modes = ["linear"] + (["end2end"] if chosen.end2end_targets else [])
    figure, axes = plt.subplots(1, len(modes), figsize=(5 * len(modes), 3.5), squeeze=False)
    for axis, mode in zip(axes[0], modes):
        for shift, name in enumerate(("none", *ATTACKS)):
            keys = [f"success_{name}_{box}_{mode}" for box in ("white", "gray", "black")]
            value = np.array([figures.get(key, np.nan) for key in keys])
            spread = np.array([[figures.get(f"{key}_{end}", np.nan) for end in ("low", "high")] for key in keys])
            error = np.abs(spread.T - value[None])
            axis.errorbar(np.arange(3) + 0.1 * shift, value, error, fmt="o", capsize=3, label=name)
        axis.set(xticks=range(3), xticklabels=["white", "gray", "black"], title=mode, ylim=(0, 1))
        axis.legend()
    context.save_figure(figure, "success")
