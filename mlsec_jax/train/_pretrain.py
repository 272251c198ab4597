"""Pre-training of a network on images: the recipe of feature extractors, surrogates and victims from scratch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlsec_jax import checks, loop, losses, tree
from mlsec_jax.base import Data, Info, Key, Params, auto_axes
from mlsec_jax.train._augment import augment


class Recipe(NamedTuple):
    """How to pre-train: SGD with Nesterov momentum, a linear warm-up and a cosine to zero, crops and flips.

    Attributes:
      num_epochs: over the physical rows.
      batch_size: rows a step.
      learning_rate: at the end of the warm-up.
      momentum: of Nesterov's kind.
      weight_decay: added to the gradient of every trained leaf, as in PyTorch's SGD.
      warmup: the fraction of the steps in which the learning rate rises.
      pad: the largest shift of the augmentation, in pixels.
      flip: whether it mirrors.
    """

    num_epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2
    pad: int = 4
    flip: bool = True


def pretrain(
    key: Key, model: Any, train: Data, recipe: Recipe, *, mesh: Mesh | None = None, trainable: tree.Where = None
) -> tuple[Params, Info]:
    """Trains a network from scratch on images, by a recipe.

    It is a pure function: jit it once, outside. Several networks of one architecture are a `vmap` or `lax.map` over
    keys (`parallel.spread` puts them on several devices), and `memo` keeps what it gives on disk.

    Args:
      key: draws the initial parameters, the batches, the augmentation and the dropout.
      model: a network of `mlsec_jax.models` (anything with `init` and `apply`); `models.in_bfloat16` of it on accelerators.
      train: images `[n, h, w, c]` in the units that the network takes, labels integer `[n]` or soft `[n, c]`.
      recipe: the `Recipe`.
      mesh: spreads the rows of each batch over the devices of a mesh of one axis, whose number must divide
        `batch_size`; the data and parameters are copied to each. None: one device.
      trainable: which leaves are trained; of an adapted network `models.adapt.trainable`, or the decay shrinks its frozen
        statistics.

    Returns:
      `(params, info)`; info: `loss`, the mean training loss at the end, without augmentation and dropout.
    """
    checks.count("recipe.num_epochs", recipe.num_epochs)
    checks.count("recipe.batch_size", recipe.batch_size, 1)
    checks.count("train.num_rows", train.num_rows, recipe.batch_size)
    checks.between("recipe.warmup", recipe.warmup, 0, 1)
    if mesh is not None and recipe.batch_size % mesh.size:
        raise ValueError(f"recipe.batch_size: expected a multiple of {mesh.size} devices, got {recipe.batch_size}.")
    loss_fn = losses.cross_entropy(model.apply)
    num_steps = recipe.num_epochs * (train.num_rows // recipe.batch_size)
    rising = int(recipe.warmup * num_steps)
    share = optax.warmup_cosine_decay_schedule(0.0, 1.0, rising, max(num_steps, rising + 1))
    sgd = optax.sgd(lambda step: recipe.learning_rate * share(step), recipe.momentum, nesterov=True)
    transform = augment(pad=recipe.pad, flip=recipe.flip)

    def during(key: Key, batch: Data) -> Data:
        if mesh is not None:
            rows = NamedSharding(auto_axes(mesh), PartitionSpec(mesh.axis_names))
            batch = jax.lax.with_sharding_constraint(batch, rows)
        return transform(key, batch)

    init_key, train_key = jax.random.split(key)
    params = model.init(init_key, train.x[:1])
    optimizer = optax.chain(optax.add_decayed_weights(recipe.weight_decay), sgd)
    plan = loop.sgd(
        loss_fn,
        optimizer,
        num_steps,
        batching=loop.shuffled(recipe.batch_size),
        during=during if num_steps else None,
        trainable=trainable,
    )
    params = loop.run(plan, train_key, params, train)
    one = lambda row: loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row))[0]
    each = jax.lax.map(one, losses.present(train), batch_size=recipe.batch_size)
    return params, {"loss": losses.weighted_mean(each, train.weight)}
