"""What the clean-label benchmarks share: images, pre-trained networks, linear victims, resumable trials."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, data, linalg, loop, losses, measure, models, parallel, train, tree
from mlsec_jax.memo import memo

LOSSY = "CIFAR-10 from a copy whose pixels went through JPEG (quality 75, 4:2:0); labels and order are the official ones"
SHARED_TARGETS = (
    "several victims are asked about each target: the intervals take these trials as independent, except those that end in "
    "_by_target, in which every target counts once"
)
ONE_NETWORK = "networks are pre-trained from one key, the same for every --seed"
GROUP_NORM = "slim networks with group norm (the papers': full width, batch norm)"


# The coefficients by a few steps from equal ones: exact ones leave most of 25 poisons without weight, where they began.
CONVEX_POLYTOPE = functools.partial(
    attacks.convex_polytope, coefficients_fn=functools.partial(linalg.descend_in_hull, num_steps=30)
)


class Images(NamedTuple):
    """Ten classes of small images, rows in the official order; `notes` say what the data are not."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    notes: tuple[str, ...]


def embedded_digits() -> list[tuple[np.ndarray, ...]]:
    """The 5,000 embedded MNIST digits in a fixed random order: 3,500 to train on, 1,500 to test on; `[n, 28, 28]`, labels."""
    x, y = data.mnist5k()
    order = np.random.default_rng(0).permutation(len(x))
    return [(x[rows], y[rows]) for rows in (order[:3500], order[3500:])]


def images(embedded: bool = False, *, fallback: bool = False) -> Images:
    """CIFAR-10, or the 5,000 embedded MNIST digits (3,500 train); with `fallback` those where CIFAR-10 isn't prepared."""
    try:
        parts = None if embedded else [data.load("cifar10", split=split, index=True) for split in ("train", "test")]
    except FileNotFoundError:
        if not fallback:
            raise
        parts = None
    if parts is None:
        (x, y), (x_test, y_test) = embedded_digits()
        x, x_test = (np.pad(each[..., None], ((0, 0), (2, 2), (2, 2), (0, 0))) for each in (x, x_test))
        return Images(x, y, x_test, y_test, ("the embedded MNIST digits padded to 32x32, not CIFAR-10",))
    (x, y), (x_test, y_test) = ((x[np.argsort(index)], y[np.argsort(index)]) for x, y, index in parts)
    return Images(x, y, x_test, y_test, (LOSSY,))


FREE, LAST = 300, 4800  # ranks within a class: set-ups fine-tune on the first, `polytope` on what follows the last


def pretraining_rows(labels: np.ndarray, per_class: int) -> np.ndarray:
    """The first rows of each class that no benchmark fine-tunes on, and no published set-up perturbs.

    Args:
      labels: of the official training order.
      per_class: at most; fewer where there are fewer.
    """
    used = np.zeros(len(labels), bool)
    if len(labels) == 50_000:
        with contextlib.suppress(FileNotFoundError):  # without the set-ups nobody uses their bases
            used[np.concatenate([setup.base_indices for setup in data.poison_setups("transfer_learning")])] = True
    first, last = (FREE, LAST) if len(labels) == 50_000 else (0, len(labels) // 10 - 120)
    ranked = [np.flatnonzero(labels == c)[first:last] for c in range(10)]
    return np.concatenate([rows[~used[rows]][:per_class] for rows in ranked])


def first_of_each(labels: np.ndarray, num: int) -> np.ndarray:
    """The first `num` rows of each of the ten classes, class by class."""
    return np.concatenate([np.flatnonzero(labels == label)[:num] for label in range(10)])


def floats(x: np.ndarray) -> jax.Array:
    """Bytes to [0, 1]."""
    return jnp.asarray(x.astype(np.float32) / np.float32(255))


def rounded(x: jax.Array) -> jax.Array:
    """Images in [0, 1] after a round trip through 8 bits: what a victim gets."""
    return floats(data.to_bytes(np.asarray(x)))


def eight_bits(x: jax.Array) -> jax.Array:
    """`rounded`, within a compiled program."""
    return jnp.round(255 * x) / 255


def check_levels(name: str, poison: Any, bases: Any, radius: float) -> None:
    """Raises if a poison is farther from its base than the radius, both in 8 bits."""
    moved = np.abs(data.to_bytes(np.asarray(poison)).astype(int) - data.to_bytes(np.asarray(bases))).max()
    if moved > 255 * radius + 1e-6:
        raise AssertionError(f"{name} moved a pixel by {moved} levels, more than {255 * radius:g}")


class Net(NamedTuple):
    """A pre-trained network.

    Attributes:
      model: what it is.
      params: what it learned.
    """

    model: models.Model
    params: Any

    @property
    def head(self) -> dict:
        """The parameters of its last layer, as `LINEAR` takes them."""
        return {"head": self.params["head"]}


ARCHITECTURES: dict[str, Callable[..., models.Model]] = {
    "convnet": functools.partial(models.convnet, pooled=(0, 1, 3)),
    "resnet": functools.partial(models.resnet, blocks=(1, 1, 1)),
    "vgg": models.vgg,
    "alexnet": models.alexnet,
}


@functools.cache
def architecture(name: str, *, width: int, colour: bool, bfloat16: bool = False, **options: Any) -> models.Model:
    """A network of `ARCHITECTURES` on inputs in [0, 1]: one model for all that ask for the same, and one compilation."""
    mean, std = (np.asarray(v, np.float32) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    scale = {"mean": mean, "std": std} if colour else {}
    model = ARCHITECTURES[name](width=width, num_classes=10, **scale, **options)
    return models.in_bfloat16(model) if bfloat16 else model


def pretrained(key: jax.Array, name: str, x: np.ndarray, y: np.ndarray, *, num_epochs: int, **options: Any) -> Net:
    """A network of `architecture(name, **options)`, trained from the key or read from the user's cache."""
    model, fit, rows = _training(name, x, y, num_epochs, **options)
    return Net(model, memo(fit, name=f"benchmark-{name}")(key, rows))


def pretrained_each(
    keys: jax.Array, name: str, x: np.ndarray, y: np.ndarray, *, num_epochs: int, **options: Any
) -> list[Net]:
    """As many networks as keys, one a device at a time; what is trained survives an interruption."""
    model, fit, rows = _training(name, x, y, num_epochs, **options)
    together = memo(parallel.spread(fit, in_axes=(0, None)), name=f"benchmark-{name}s")
    found = []
    for start in range(0, len(keys), jax.device_count()):
        some = keys[start : start + jax.device_count()]
        stacked = together(some, rows)
        found += [Net(model, tree.take(stacked, k)) for k in range(len(some))]
    return found


def _training(
    name: str, x: np.ndarray, y: np.ndarray, num_epochs: int, *, width: int = 16, bfloat16: bool = False, **options: Any
) -> tuple[models.Model, Callable[[jax.Array, mj.Data], Any], mj.Data]:
    """The model, `(key, rows) -> params`, and the rows."""
    colour = x.shape[-1] == 3
    model = architecture(name, width=width, colour=colour, bfloat16=bfloat16, **options)
    recipe = train.Recipe(num_epochs=num_epochs, flip=colour)
    rows = mj.dataset(floats(x), jnp.asarray(y, jnp.int32))
    return model, lambda key, rows: train.pretrain(key, model, rows, recipe)[0], rows


@functools.partial(jax.jit, static_argnums=0)
def outputs(fn: Callable, params: Any, x: jax.Array) -> jax.Array:
    """`fn(params, x)` of all rows, 100 at a time; for `fn` any function of a network, compiled once each."""
    return jax.lax.map(lambda row: fn(params, row[None])[0], x, batch_size=min(100, len(x)))


def pooled(layers: Sequence[jax.Array], *reductions: Callable[..., jax.Array]) -> jax.Array:
    """Each reduction (`jnp.max`, `jnp.mean`) of each layer `[n, h, w, c]` over its places, side by side: `[n, d]`."""
    return jnp.concatenate([fn(layer, axis=(1, 2)) for layer in layers for fn in reductions], axis=1)


def features(net: Net, x: jax.Array) -> jax.Array:
    """The network's features in evaluation mode, 100 rows at a time: `[n, d]`."""
    return outputs(net.model.features, net.params, x)


def likeliest(net: Net, x: np.ndarray) -> np.ndarray:
    """The classes in the order in which the network as pre-trained takes the images for them: `[n, 10]`."""
    return np.argsort(-np.asarray(outputs(net.model.apply, net.params, floats(x))), axis=1, kind="stable")


def accuracy(net: Net, x: np.ndarray, y: np.ndarray) -> float:
    """Of the network as pre-trained."""
    return float(np.mean(likeliest(net, x)[:, 0] == y))


LINEAR = models.softmax_regression()


class HeadRecipe(NamedTuple):
    """How a victim trains its head on frozen features, or all of its parameters.

    Attributes:
      optimizer: any of optax.
      num_epochs: over the rows.
      batch_size: rows a step.
    """

    optimizer: optax.GradientTransformation
    num_epochs: int
    batch_size: int


def stepped(rate: float, steps_per_epoch: int, epochs: Sequence[int]) -> optax.Schedule:
    """A learning rate that falls by ten at the given epochs."""
    return optax.piecewise_constant_schedule(rate, {epoch * steps_per_epoch: 0.1 for epoch in epochs})


def fine_tuning(apply_fn: Callable, recipe: HeadRecipe, num_rows: int) -> mj.base.Trainer:
    """The victim's training, in evaluation mode."""
    num_steps = recipe.num_epochs * (num_rows // recipe.batch_size)
    loss_fn = losses.cross_entropy(lambda params, x, key=None: apply_fn(params, x))
    return bilevel.unrolled(loss_fn, recipe.optimizer, num_steps, batching=loop.shuffled(recipe.batch_size))


def linear_victims(
    keys: jax.Array, table: mj.Data, rows: jax.Array, poisons: jax.Array, tests: jax.Array, head: Any, recipe: HeadRecipe
) -> jax.Array:
    """Logits of victims that retrain a head, a trial each, all of them one program; everything here is features.

    Args:
      keys: `[trials]`, of the batches.
      table: features and labels that the trials draw their training sets from, `[m, d]`.
      rows: `[trials, n]`, each trial's rows of the table; the first k give way to its poisons.
      poisons: `[trials, k, d]`.
      tests: `[trials, t, d]`, what each victim is asked.
      head: initial parameters of `LINEAR`.
      recipe: the `HeadRecipe`.

    Returns:
      `[trials, t, 10]`.
    """
    trainer = fine_tuning(LINEAR.apply, recipe, rows.shape[1])

    def one(key: jax.Array, rows: jax.Array, poison: jax.Array, test: jax.Array, table: mj.Data, head: Any) -> jax.Array:
        given = jax.tree.map(lambda leaf: leaf[rows], table)
        given = given._replace(x=given.x.at[: poison.shape[0]].set(poison))
        return LINEAR.apply(trainer(key, head, given)[0], test)

    spread = parallel.spread(one, in_axes=(0, 0, 0, 0, None, None))
    return jax.jit(spread)(keys, rows, poisons, tests, table, head)


def stacked(nets: Sequence[Net], fn_of: Callable[[models.Model], Any]) -> tuple[Callable, tuple]:
    """An ensemble over `fn_of(model)`, whose members are the networks of one model: `(features_fn, surrogates)`."""
    groups: dict[int, list[Net]] = {}
    for net in nets:
        groups.setdefault(id(net.model), []).append(net)
    fn = models.ensemble([fn_of(group[0].model) for group in groups.values()], over="map")
    stack = lambda group: jax.tree.map(lambda *leaves: jnp.stack(leaves), *[net.params for net in group])
    return fn, tuple(stack(group) for group in groups.values())


def craft(
    context: Any,
    item: str,
    key: jax.Array,
    attack: Callable[[Any], mj.Algorithm],
    features_fn: Callable,
    surrogates: Any,
    bases: jax.Array,
    targets: jax.Array,
    *,
    num_steps: int,
) -> dict[str, Any]:
    """Poisons for many targets, after a round trip through 8 bits; targets that are finished survive an interruption.

    Args:
      context: the benchmark's.
      item: a name for `context.once`.
      key: split among the targets.
      attack: `features_fn -> Algorithm` on data whose rows are the bases.
      features_fn: of the surrogates.
      surrogates: its parameters.
      bases: `[trials, k, h, w, c]`.
      targets: `[trials, h, w, c]`.
      num_steps: of crafting.

    Returns:
      `poison [trials, k, ...]`, `outer [trials, num_steps]`, and `seconds` a target, compilation apart.
    """
    algorithm = attack(features_fn)
    labels = jnp.zeros(bases.shape[1], jnp.int32)  # no loss here reads them

    def one(key: jax.Array, base: jax.Array, target: jax.Array, surrogates: Any) -> tuple[jax.Array, jax.Array]:
        known = mj.Known(goal=mj.dataset(target[None], labels[:1]), surrogates=surrogates)
        state, infos = combine.run(algorithm, key, mj.dataset(base, labels), known, num_steps=num_steps)
        return state.poison, infos["outer"]

    @functools.cache
    def program() -> Callable:
        return jax.jit(parallel.spread(one, in_axes=(0, 0, 0, None))).lower(*operands(0), surrogates).compile()

    def operands(start: int) -> tuple:
        rows = jnp.arange(start, start + at_once) % len(targets)  # what fills the last program up is left out again
        return tree.take((keys, bases, targets), rows)

    def crafted(start: int) -> dict[str, Any]:
        given, compiled = operands(start), program()
        begun = time.perf_counter()
        poison, outer = jax.block_until_ready(compiled(*given, surrogates))
        return {"poison": rounded(poison), "outer": outer, "seconds": (time.perf_counter() - begun) / at_once}

    keys, at_once = jax.random.split(key, len(targets)), min(_at_once(), len(targets))
    starts = context.progress(range(0, len(targets), at_once), item)
    found = [context.once(f"{item}-{start}", functools.partial(crafted, start)) for start in starts]
    whole = {name: np.concatenate([part[name] for part in found])[: len(targets)] for name in ("poison", "outer")}
    return {**whole, "seconds": float(np.mean([part["seconds"] for part in found]))}


def _at_once() -> int:
    """The trials of one program: few enough that little is lost with it, enough to fill the devices."""
    return jax.device_count() * (1 if jax.default_backend() == "cpu" else 16)


def trials(context: Any, item: str, fn: Callable, each: tuple, shared: tuple = ()) -> dict[str, np.ndarray]:
    """One program for all trials, a few at a time over the devices; what is finished survives an interruption.

    Args:
      context: the benchmark's.
      item: a name for `context.once`.
      fn: `(*row of each, *shared) -> dict` of arrays.
      each: pytrees with a leading `[trials]`.
      shared: pytrees that every trial gets whole.

    Returns:
      The dict of arrays `[trials, ...]`.
    """
    num = len(jax.tree.leaves(each)[0])
    together = _at_once()
    program = jax.jit(parallel.spread(fn, in_axes=(0,) * len(each) + (None,) * len(shared)))
    found = []
    for start in context.progress(range(0, num, together), item):
        rows = jax.tree.map(lambda leaf, start=start: leaf[start : start + together], each)
        found.append(context.once(f"{item}-{start}", lambda rows=rows: program(*rows, *shared)))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def share(name: str, hits: np.ndarray, targets: int | None = None) -> dict[str, float]:
    """The share of hits, and the ends of Wilson's 95 % interval, as three figures.

    Args:
      name: of the share.
      hits: of the trials, any shape.
      targets: how many targets the trials share, where several victims are asked about each; two figures more,
        `_low_by_target` and `_high_by_target`, are then the ends if every target counts as one trial.
    """
    figures = {name: float(np.mean(hits))}
    units = {"": np.size(hits)} | ({} if targets is None else {"_by_target": targets})
    for unit, trials in units.items():
        low, high = measure.wilson(float(np.sum(hits) * trials / np.size(hits)), float(trials))
        figures |= {f"{name}_low{unit}": float(low), f"{name}_high{unit}": float(high)}
    return figures
