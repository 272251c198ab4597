"""Spectral signatures: train on poisoned images, remove what stands out of each class, train once more.

A share ε of the target class's size of images of one source class is stamped with a few coloured pixels, moved to the
target class and learned. The defender, who knows an upper bound ε but neither source, target nor trigger, removes the
`1.5 ε n_y` rows of every class that reach farthest along its first principal direction, and trains again from scratch.
That is the paper's algorithm. The code that it was published with removes them from the target class alone, as if the
defender knew it: keys with `known` are that defender's, from the same scores (so the same poisons are left). Keys with `found`
are of a defender who is not told: the network that was trained again is asked about the rows that it did not see, and the
class whose rows it takes most for another's keeps its removals alone (`defenses.reclassified`); `suspect` is 1 where that
class is the target.
What is scored is each channel's highest activation, wherever it is: coloured pixels stand out at one place, which sums
over places dilute and deeper layers mix with what the image shows (`left_last`: what the network's last features leave).
On the embedded digits, which are as white as their trigger, it is the last features.
Three pairs of classes with the paper's three kinds of trigger, each at ε = 5 % and 10 %.

Keys end in `_TARGET_EPSILON`: `nat` is accuracy on the test set, `pois` the share of stamped test images of the source
class that are taken for the target, before and after. A cat is taken for a dog without a trigger, too: `caused` is the
share among those images that the same network does not take for the target without the trigger; `..._clean` is what
a network shows that never saw a poison, the floor of both. `left` are the poisons that survive; `false_removal` is the
share of clean rows that go too, and `left_random` what removing as many rows at random would leave: the control.

References: Tran, Li & Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, table 1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mlsec_jax as mj
from benchmarks._clean_label import GROUP_NORM, Images, architecture, first_of_each, floats, images, outputs, pooled
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, combine, defenses, measure, parallel, scores, threat, train, tree
from mlsec_jax.memo import memo

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Size(NamedTuple):
    """What differs between the sizes."""

    width: int
    per_class: int
    epochs: int
    batch: int
    test: int
    rows: int  # of the table


SIZES = {
    "small": Size(4, 200, 4, 64, 500, 1),
    "full": Size(16, 5000, 20, 64, 10_000, 6),
    "paper": Size(32, 5000, 30, 128, 10_000, 6),
}


def spots(offsets: tuple[tuple[int, int], ...], at: tuple[int, int], colour: tuple[int, int, int]) -> threat.Trigger:
    """Pixels of one colour at the offsets from a place."""
    side = 1 + max(max(offset) for offset in offsets)
    mask = np.zeros((side, side), np.float32)
    mask[tuple(np.array(offsets).T)] = 1
    pattern = jnp.broadcast_to(jnp.asarray(colour, jnp.float32) / 255, (side, side, 3))
    return threat.patch(pattern, at=at, mask=mask)


PIXEL, ELL, CROSS = ((0, 0),), ((0, 0), (1, 0), (1, 1)), ((0, 0), (0, 2), (1, 1), (2, 0), (2, 2))
TABLE = [  # source, target, trigger
    (0, 2, spots(ELL, (11, 16), (101, 0, 25))),
    (1, 3, spots(CROSS, (3, 24), (255, 255, 0))),
    (3, 5, spots(CROSS, (25, 5), (0, 0, 240))),
]
PAPER = "Tran, Li & Madry 2018, table 1 (ResNet-32, full CIFAR-10, batch norm)"
CODE = "the code that it was published with removes from the target class alone, as here"
RANGES = {  # of the paper's rows
    "nat_before": (0.922, 0.926),
    "pois_before": (0.74, 0.94),
    "left": (0, 57),
    "nat_after": (0.922, 0.930),
    "pois_after": (0.0, 0.02),
}


def highest(model: Any, params: Any, x: jax.Array) -> jax.Array:
    """The highest activation of each channel of the first two convolutions, over all places: `[n, channels]`."""
    return pooled(model.layers(params, x)[:2], jnp.max)


class Setting(NamedTuple):
    """What every row of the table shares.

    Attributes:
      model: the network.
      fit: `(key, rows) -> params`, kept on disk.
      refit: `(key, rows, weights [k, n]) -> [params, ...]`, the same for several weights, spread over devices.
      clean: the training rows.
      test: the test rows.
    """

    model: Any
    fit: Any
    refit: Any
    clean: mj.Data
    test: mj.Data

    @property
    def colour(self) -> bool:
        """Whether the images are CIFAR-10's, not the embedded digits."""
        return self.clean.x.shape[-1] == 3

    def judge(self, params: Any, source: int, target: int, trigger: Any) -> tuple[float, float, float]:
        """Accuracy, and the share of stamped source images taken for the target: of all, and of those not taken for it before."""
        test = self.test
        answers = lambda x: jnp.argmax(outputs(self.model.apply, params, x), axis=1)
        plain, stamped = answers(test.x), answers(trigger(None, test.x))
        own = test.y == source
        rate = lambda rows: float(measure.attack_success(stamped, test, target, eligible=rows).rate)
        return float(measure.accuracy(plain, test)), rate(own), rate(own & (plain != target))


def setting(pool: Images, size: Size) -> Setting:
    """The images and the victim of a size."""
    colour = pool.x.shape[-1] == 3
    model = architecture("convnet", width=size.width, colour=colour)
    rate = 0.05 * size.batch / 64
    recipe = train.Recipe(num_epochs=size.epochs, batch_size=size.batch, learning_rate=rate, pad=2, flip=colour)

    def one(key: jax.Array, rows: mj.Data) -> Any:
        return train.pretrain(key, model, rows, recipe)[0]

    weighted = lambda weight, key, rows: one(key, rows._replace(weight=weight))
    each = memo(parallel.spread(weighted, inner="map", in_axes=(0, None, None)), name="spectral-convnets")

    def refit(key: jax.Array, rows: mj.Data, weights: list[jax.Array]) -> list[Any]:
        found = each(jnp.stack(weights), key, rows)
        return [tree.take(found, k) for k in range(len(weights))]

    chosen = first_of_each(pool.y, size.per_class)
    clean = mj.dataset(floats(pool.x[chosen]), jnp.asarray(pool.y[chosen], jnp.int32))
    test = mj.dataset(floats(pool.x_test[: size.test]), jnp.asarray(pool.y_test[: size.test], jnp.int32))
    return Setting(model, memo(one, name="spectral-convnet"), refit, clean, test)


WHEN, JUDGED = ("before", "after", "known", "found"), ("nat", "pois", "caused")


def suspected(shared: Setting, rows: mj.Data, weight: jax.Array, params: Any, target: int) -> tuple[mj.Data, bool]:
    """The rows that a defender keeps who asks the network trained on `weight` which class was poisoned; whether it is."""
    believe = defenses.reclassified(
        lambda key, rows, known: (rows._replace(weight=weight), {}),
        lambda params, x, key=None: outputs(shared.model.apply, params, x),
        mj.base.Trainer(lambda key, start, rows: (params, {})),
        lambda key: None,
        num_classes=10,
    )
    found, told = believe(jax.random.key(0), rows, mj.Known())  # nothing is drawn
    return found, bool(told["suspect"][target])


def one_row(key: jax.Array, shared: Setting, source: int, target: int, trigger: Any, epsilon: float) -> dict:
    """One row of the table."""
    poison_key, first_key, score_key, again_key, random_key = jax.random.split(key, 5)
    num_poisons = round(epsilon * shared.clean.num_rows / 10)
    attack = attacks.badnets(trigger, num_poisons=num_poisons, relabel=threat.to_class(target), sources=(source,))
    rows, info = attack(poison_key, shared.clean, mj.Known())
    poisoned = np.asarray(info["poisoned"])
    params = shared.fit(first_key, rows)

    def left(seen: Any) -> jax.Array:
        """The weights that the filter on a representation leaves."""
        features = lambda params, x, key=None: outputs(seen, params, x)
        sanitize = combine.filter_top(scores.spectral(features, num_classes=10), fraction=1.5 * epsilon, num_classes=10)
        return jax.jit(sanitize)(score_key, rows, mj.Known(params=params))[0].weight

    by_last = left(shared.model.features)
    weight = left(functools.partial(highest, shared.model)) if shared.colour else by_last
    gone = np.asarray(weight) == 0
    again = shared.refit(again_key, rows, [weight, jnp.where(rows.y == target, weight, 1)])
    found, right = suspected(shared, rows, weight, again[0], target)
    alone = again[1] if right else shared.refit(again_key, rows, [found.weight])[0]
    judged = (shared.judge(each, source, target, trigger) for each in (params, *again, alone))
    named = {f"{name}_{when}": value for when, triple in zip(WHEN, judged) for name, value in zip(JUDGED, triple)}
    at_random = np.asarray(jax.random.permutation(random_key, rows.num_rows))[: int(gone.sum())]
    return {
        **named,
        "suspect": float(right),
        "left": int((poisoned & ~gone).sum()),
        "left_last": int(poisoned[np.asarray(by_last) > 0].sum()),
        "num_poisons": num_poisons,
        "false_removal": float(gone[~poisoned].mean()),
        "left_random": int(num_poisons - poisoned[at_random].sum()),
    }


def clean_model(key: jax.Array, shared: Setting, cases: list[tuple]) -> dict[str, float]:
    """The same figures of a network that never saw a poison, for each pair."""
    params = shared.fit(key, shared.clean)
    found: dict[str, float] = {}
    for source, target, trigger in {target: (source, target, trigger) for source, target, trigger, _ in cases}.values():
        nat, pois, caused = shared.judge(params, source, target, trigger)
        name = CLASSES[target]
        found |= {"nat_clean": nat, f"pois_clean_{name}": pois, f"caused_clean_{name}": caused}
    return found


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """The rows of the paper's table."""
    chosen = SIZES[size]
    pool = images(embedded=size == "small")
    shared = setting(pool, chosen)
    stamp = lambda trigger: trigger if shared.colour else threat.patch(jnp.ones((3, 3, 1)), at=(-4, -4))
    cases = [(*pair, stamp(trigger), e) for *pair, trigger in TABLE for e in (0.05, 0.1)][-chosen.rows :]
    clean_key = jax.random.fold_in(context.key, 1000)
    names: list[str] = []
    figures = dict(context.once("clean", lambda: clean_model(clean_key, shared, cases)))
    for source, target, trigger, epsilon in context.progress(cases, "rows"):
        key = jax.random.fold_in(context.key, 10 * target + round(100 * epsilon))
        name = f"{CLASSES[target]}_{round(100 * epsilon)}"
        names.append(name)
        row = context.once(name, functools.partial(one_row, key, shared, source, target, trigger, epsilon))
        figures |= {f"{figure}_{name}": value for figure, value in row.items()}
    reductions = [*pool.notes, GROUP_NORM, f"{chosen.per_class} images of each class, {chosen.epochs} epochs"]
    reductions.append("the features are channels' highest activations, not the tensor that enters a last block")
    draw(context, figures, names)
    return Result(figures, reductions, published(names))


def published(names: list[str]) -> dict[str, Paper]:
    """The highest of the paper's rows beside each row of ours; the source names the lowest too."""
    found = {}
    for figure, (low, high) in RANGES.items():
        source = f"{PAPER}: {low:g} to {high:g} over its rows"
        for name in names:
            found[f"{figure}_{name}"] = Paper(high, source)
            if figure.endswith("_after"):
                for defender in ("known", "found"):
                    found[f"{figure.removesuffix('after')}{defender}_{name}"] = Paper(high, f"{source}; {CODE}")
    return found


def draw(context: Any, figures: dict[str, Any], names: list[str]) -> None:
    """Stamped images taken for the target, row by row, before and after."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(2.5 + 1.2 * len(names), 3.2))
    labels = {"before": "before", "after": "after", "known": "after, target class known", "found": "after, target class found"}
    for place, (when, label) in enumerate(labels.items()):
        taken = [figures[f"pois_{when}_{name}"] for name in names]
        axis.bar(np.arange(len(names)) + 0.2 * (place - 1.5), taken, 0.2, label=label)
    ticks = [f"{name.replace('_', ', ')} %\n{figures[f'left_{name}']} left" for name in names]
    axis.set(xticks=range(len(names)), xticklabels=ticks, ylabel="taken for the target", ylim=(0, 1))
    axis.legend(fontsize=8)
    context.save_figure(figure, "success")
