"""Trainers that JAX differentiates step by step: unrolled, with checkpoints, truncated."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import jax
import optax

from mlsec_jax import checks, loop
from mlsec_jax.base import Data, Info, Key, LossFn, Params, Trainer
from mlsec_jax.losses import empirical

Body = Callable[[Any, Any], Any]  # (carry, slot) -> carry
REMAT = ("none", "step", "sqrt", "log")


def cut(slots: Any, start: int, stop: int) -> Any:
    """The slots of steps `start` to `stop`."""
    return jax.tree.map(lambda leaf: leaf[start:stop], slots)


def _fold(slots: Any, outer: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape((outer, -1) + leaf.shape[1:]), slots)


def plain_scan(body: Body, carry: Any, slots: Any) -> Any:
    """A scan without outputs."""
    return jax.lax.scan(lambda c, slot: (body(c, slot), None), carry, slots)[0]


def _segment(num_steps: int) -> int:
    """Steps a segment: of the divisors of T from √T to 2√T the one that keeps least; √T if there is none.

    What is kept between segments is the optimiser's state as well as the parameters, hence counted twice.
    """
    root = math.isqrt(num_steps)
    whole = [length for length in range(root, 2 * root + 1) if length * length >= num_steps and num_steps % length == 0]
    return min(whole, key=lambda length: 2 * (num_steps // length) + length, default=root)


def _sqrt_scan(body: Body, carry: Any, slots: Any, num_steps: int) -> Any:
    """Segments of about √T checkpointed steps, themselves checkpointed; what is left over is one more segment."""
    inner = _segment(num_steps)
    outer = num_steps // inner
    segment = jax.checkpoint(partial(plain_scan, jax.checkpoint(body)))
    carry = plain_scan(segment, carry, _fold(cut(slots, 0, outer * inner), outer))
    return segment(carry, cut(slots, outer * inner, num_steps)) if outer * inner < num_steps else carry


def _log_scan(body: Body, carry: Any, slots: Any, num_steps: int, base: int = 4) -> Any:
    """Checkpoints nested in base 4: one run for each digit of T, each of them `4^power` steps deep in `power` levels."""
    levels = [jax.checkpoint(body)]
    while base ** len(levels) <= num_steps:
        below = levels[-1]
        fold = partial(_fold, outer=base) if len(levels) > 1 else (lambda slots: slots)
        levels.append(jax.checkpoint(lambda c, s, below=below, fold=fold: plain_scan(below, c, fold(s))))
    start = 0
    for power in reversed(range(len(levels))):
        digit = (num_steps - start) // base**power
        stop = start + digit * base**power
        if digit:
            part = cut(slots, start, stop)
            carry = plain_scan(levels[power], carry, _fold(part, digit) if power else part)
        start = stop
    return carry


def remat_scan(remat: str, body: Body, carry: Any, slots: Any, num_steps: int) -> Any:
    """`lax.scan`, whose reverse pass keeps as many states as `remat` says."""
    if num_steps == 0:
        return carry
    if remat == "none":
        return plain_scan(body, carry, slots)
    if remat == "step":
        return plain_scan(jax.checkpoint(body), carry, slots)
    return (_sqrt_scan if remat == "sqrt" else _log_scan)(body, carry, slots, num_steps)


def final_info(loss_fn: LossFn, params: Params, data: Data) -> Info:
    """What a trainer tells: the empirical loss where it ended."""
    return {"loss": empirical(loss_fn)(params, data)}


def unrolled(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    remat: str = "none",
    **slots: Unpack[loop.Slots],
) -> Trainer:
    """Trains with an optax optimizer; reverse mode runs back through every step.

    The derivative is exact for the program that runs. States kept for the reverse pass: `none` T (and the activations
    of every step), `step` T, `sqrt` 2√T, `log` 4 log₄ T; extra forward passes: 0, 1, 2 and log₄ T.

    Args:
      loss_fn: per-example loss `(params, data, key=None) -> [n]`.
      optimizer: any optax optimizer; of Adam and its kin give `eps_root` more than 0, for √v has no derivative at v = 0.
      num_steps: static.
      remat: `"none"`, `"step"`, `"sqrt"` or `"log"`.
      **slots: `batching`, `grad_fn`, `during`, `trainable` of `loop.sgd`.

    Returns:
      A `Trainer`; info: `loss`, the empirical loss at the end.

    >>> import jax.numpy as jnp
    >>> import mlsec_jax as mj
    >>> half = lambda p, d, key=None: (d.x[:, 0] - p) ** 2 / 2
    >>> train = unrolled(half, optax.sgd(0.5), 2)
    >>> data = mj.dataset(jnp.ones((1, 1)), jnp.zeros(1))
    >>> float(train(jax.random.key(0), jnp.zeros(()), data)[0])
    0.75
    """
    return truncated(loss_fn, optimizer, num_steps, last=num_steps, remat=remat, **slots)


def truncated(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    last: int,
    remat: str = "none",
    **slots: Unpack[loop.Slots],
) -> Trainer:
    """Trains like `unrolled`, but the derivative sees the last `last` steps only.

    A biased gradient: what the earlier steps owe to the data is dropped, on purpose and by name. With
    `last = num_steps` nothing is dropped. Reference: Shaban et al., AISTATS 2019, eq. (7).

    Args:
      loss_fn: per-example loss.
      optimizer: any optax optimizer.
      num_steps: static, all steps.
      last: how many of them are differentiated.
      remat: of the differentiated steps, as in `unrolled`.
      **slots: of `loop.sgd`.

    Returns:
      A `Trainer`; info: `loss`.
    """
    checks.count("last", last)
    checks.one_of("remat", remat, REMAT)
    plan = loop.sgd(loss_fn, optimizer, num_steps, **slots)
    if last > num_steps or (last == 0 < num_steps):
        raise ValueError(f"last: expected between 1 and num_steps = {num_steps}, got {last}.")

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        state, fixed = plan.init(params)
        steps = plan.slots(key, data.num_rows)
        if last < num_steps:
            early_state, early_fixed, early_data = jax.lax.stop_gradient((state, fixed, data))
            early = lambda carry, slot: plan.step(carry, early_fixed, early_data, slot)
            state = jax.lax.stop_gradient(plain_scan(early, early_state, cut(steps, 0, num_steps - last)))
        body = lambda carry, slot: plan.step(carry, fixed, data, slot)
        state = remat_scan(remat, body, state, cut(steps, num_steps - last, num_steps), last)
        trained = plan.read(state, fixed)
        return trained, final_info(loss_fn, trained, data)

    def batched(transform: loop.BatchTransform) -> Trainer:
        more = loop.with_transform(slots, transform)
        return truncated(loss_fn, optimizer, num_steps, last=last, remat=remat, **more)

    return Trainer(fit, batched=batched)
