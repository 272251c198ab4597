"""The one SGD loop. Trainers differ in how they differentiate it, never in what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, tree
from mlsec_jax.base import Data, Key, LossFn, Params
from mlsec_jax.losses import empirical


class Schedule(NamedTuple):
    """Which rows each step sees; a deterministic function of the key, so that a replay sees the same batches.

    Attributes:
      rows: `[num_steps, batch]` integer rows.
      mask: `[num_steps, batch]`, 1 where the slot is used.
    """

    rows: jax.Array
    mask: jax.Array


Batching = Callable[[Key, int, int], Schedule | None]  # (key, num_rows, num_steps); None = the full batch
GradFn = Callable[[Key, LossFn, Params, Data], Params]
BatchTransform = Callable[[Key, Data], Data]


def full_batch(key: Key, num_rows: int, num_steps: int) -> None:
    """Every step sees every row."""
    del key, num_rows, num_steps


def shuffled(batch_size: int) -> Batching:
    """Epochs of a fresh permutation each, cut into batches; what is left of an epoch is not used."""
    checks.count("batch_size", batch_size, 1)

    def batching(key: Key, num_rows: int, num_steps: int) -> Schedule:
        if batch_size > num_rows:
            raise ValueError(f"batch_size: expected at most the {num_rows} rows of the data, got {batch_size}.")
        per_epoch = num_rows // batch_size
        epochs = -(-num_steps // per_epoch)
        permute = lambda k: jax.random.permutation(jax.random.fold_in(key, k), num_rows)[: per_epoch * batch_size]
        rows = jax.lax.map(permute, jnp.arange(epochs)).reshape(-1, batch_size)[:num_steps]
        return Schedule(rows, jnp.ones(rows.shape, jnp.float32))

    return batching


def poisson(rate: float, capacity: int) -> Batching:
    """Poisson sampling at a fixed shape: each row joins each batch with probability `rate`, independently.

    A draw of more than `capacity` rows is cut to it, which the accountant must be told (truncated Poisson); choose
    `capacity ≥ qn + 6 sqrt(qn)` to make that negligible.
    """
    checks.between("rate", rate, 0.0, 1.0)
    checks.count("capacity", capacity, 1)

    def batching(key: Key, num_rows: int, num_steps: int) -> Schedule:
        size = min(capacity, num_rows)

        def draw(k: jax.Array) -> tuple[jax.Array, jax.Array]:
            order_key, count_key = jax.random.split(jax.random.fold_in(key, k))
            joined = jnp.sum(jax.random.bernoulli(count_key, rate, (num_rows,)))
            rows = jax.random.permutation(order_key, num_rows)[:size]
            return rows, (jnp.arange(size) < joined).astype(jnp.float32)

        return Schedule(*jax.lax.map(draw, jnp.arange(num_steps)))

    return batching


def lots(key: Key, weight: jax.Array) -> jax.Array:
    """A uniform number for each present row `[n]`, infinity for absent ones: the least are drawn, without replacement.

    The i-th present row gets the i-th number, wherever it stands: absent rows change nothing.
    """
    there = weight > 0
    drawn = jax.random.uniform(key, weight.shape, jnp.float32)
    return jnp.where(there, drawn[jnp.cumsum(there, dtype=jnp.int32) - 1], jnp.inf)


def take_batch(data: Data, rows: jax.Array, mask: jax.Array) -> Data:
    """The rows of one step, their weights multiplied by the mask."""
    batch = tree.take(data, rows)
    return batch._replace(weight=batch.weight * mask.astype(batch.weight.dtype))


def mean_gradient(key: Key, loss_fn: LossFn, params: Params, batch: Data) -> Params:
    """The gradient of the empirical loss: the default `grad_fn`."""
    return jax.grad(empirical(loss_fn))(params, batch, key)


def apply_optimizer(
    optimizer: optax.GradientTransformation, gradient: Params, state: Any, params: Params
) -> tuple[Params, Any]:
    """One update of an optax optimizer; some of them mix dtypes, so strict promotion is lifted inside."""
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state


class Slots(TypedDict, total=False):
    """The slots of the loop that every trainer built on it passes through; `sgd` documents them."""

    batching: Batching
    grad_fn: GradFn
    during: BatchTransform | None
    trainable: tree.Where


def with_transform(slots: Slots, transform: BatchTransform) -> Slots:
    """The same slots, with one more transform applied to each batch, after what is there."""
    first = slots.get("during")
    if first is None:
        return {**slots, "during": transform}

    def both(key: Key, batch: Data) -> Data:
        first_key, then_key = jax.random.split(key)
        return transform(then_key, first(first_key, batch))

    return {**slots, "during": both}


class State(NamedTuple):
    """What a step carries: the trained leaves (None elsewhere) and the optimiser's state."""

    params: Params
    optimizer: Any


class Loop(NamedTuple):
    """A training run laid out: `init(params)`, and `step(state, fixed, data, slot) -> state` for each slot of `slots`.

    Attributes:
      init: `params -> (State, fixed)`; `fixed` holds the leaves that are not trained.
      slots: `(key, num_rows) -> slots`, a pytree with leading axis `num_steps`, to be scanned over.
      gradient: `(params, fixed, data, slot) -> gradient` of one step.
      step: one step.
      read: `(state, fixed) -> params`.
    """

    init: Callable[[Params], tuple[State, Params]]
    slots: Callable[[Key, int], Any]
    gradient: Callable[[Params, Params, Data, Any], Params]
    step: Callable[[State, Params, Data, Any], State]
    read: Callable[[State, Params], Params]


def sgd(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    batching: Batching = full_batch,
    grad_fn: GradFn = mean_gradient,
    during: BatchTransform | None = None,
    trainable: tree.Where = None,
) -> Loop:
    """Lays out `num_steps` steps of an optax optimizer.

    Args:
      loss_fn: per-example loss `(params, data, key=None) -> [n]`; it is given a key, for this is training.
      optimizer: any optax optimizer.
      num_steps: static.
      batching: `full_batch`, `shuffled(batch_size)` or `poisson(rate, capacity)`.
      grad_fn: `(key, loss_fn, params, batch) -> gradient`; the default is the mean gradient, DP-SGD is another.
      during: `(key, batch) -> batch`, an augmentation or defense applied to each batch.
      trainable: which leaves are trained (`tree.mask_of`); the rest passes through.

    Returns:
      The `Loop`.
    """
    checks.count("num_steps", num_steps)

    def init(params: Params) -> tuple[State, Params]:
        chosen, fixed = tree.partition(params, trainable)
        return State(chosen, optimizer.init(chosen)), fixed

    def slots(key: Key, num_rows: int) -> Any:
        batch_key, step_key = jax.random.split(key)
        keys = jax.vmap(lambda k: jax.random.fold_in(step_key, k))(jnp.arange(num_steps))
        return keys, batching(batch_key, num_rows, num_steps)

    def gradient(chosen: Params, fixed: Params, data: Data, slot: Any) -> Params:
        key, schedule = slot
        during_key, grad_key = jax.random.split(key)
        batch = data if schedule is None else take_batch(data, schedule.rows, schedule.mask)
        if during is not None:
            batch = during(during_key, batch)
        whole = lambda params, rows, k=None: loss_fn(tree.merge(params, fixed), rows, k)
        return grad_fn(grad_key, whole, chosen, batch)

    def step(state: State, fixed: Params, data: Data, slot: Any) -> State:
        slope = gradient(state.params, fixed, data, slot)
        return State(*apply_optimizer(optimizer, slope, state.optimizer, state.params))

    return Loop(init, slots, gradient, step, lambda state, fixed: tree.merge(state.params, fixed))


def run(loop: Loop, key: Key, params: Params, data: Data) -> Params:
    """Runs a loop: one `lax.scan`."""
    state, fixed = loop.init(params)
    state, _ = jax.lax.scan(
        lambda carry, slot: (loop.step(carry, fixed, data, slot), None), state, loop.slots(key, data.num_rows)
    )
    return loop.read(state, fixed)
