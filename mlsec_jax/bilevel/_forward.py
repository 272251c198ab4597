"""Forward mode: the derivative of training with respect to a few rows, carried along with it."""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from mlsec_jax import checks, loop, tree
from mlsec_jax.base import Data, Info, Key, LossFn, Params, Trainer
from mlsec_jax.bilevel._hoist import hoist
from mlsec_jax.bilevel._unrolled import final_info


def _unknown(leaf: Any) -> Any:
    """The cotangent of something that forward mode did not differentiate: NaN, so that it can never pass for zero."""
    if tree.is_float(leaf):
        return jnp.full_like(leaf, jnp.nan)
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def forward(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    rows: Any,
    chunk: int = 32,
    **slots: Unpack[loop.Slots],
) -> Trainer:
    """Trains with an optax optimizer; the derivative with respect to the inputs of `rows` is taken in forward mode.

    One tangent `∂θ_t / ∂x_ij` for each coordinate of each row, `chunk` of them at a time: memory of one copy of the
    state a tangent, whatever T is; time `k·d / chunk` trainings of `chunk` tangents. For few poisons of low dimension.

    Only the inputs of `rows` are differentiated. The cotangents of everything else (other rows, labels, weights, initial
    parameters, what loss and optimizer close over, such as a traced learning rate) are NaN, never zero;
    `threat.append_rows` and `perturb_rows` do not read them.

    Args:
      loss_fn: per-example loss.
      optimizer: any optax optimizer.
      num_steps: static.
      rows: `[k]` rows of the data, or an integer k for the last k.
      chunk: tangents carried at once.
      **slots: of `loop.sgd`.

    Returns:
      A `Trainer`; info: `loss`.
    """
    checks.count("chunk", chunk, 1)
    plan = loop.sgd(loss_fn, optimizer, num_steps, **slots)
    chosen = checks.rows("rows", rows)

    def plain(params: Params, _: Any, args: Any) -> Params:
        return loop.run(plan, args[0], params, args[1])

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def train(run: Any, key: Key, params: Params, data: Data, hoisted: list[Any]) -> Params:
        return run(params, jnp.int32(0), ((key, data), hoisted))

    def train_fwd(run: Any, *operands: Any) -> tuple[Params, Any]:
        return train(run, *operands), operands

    def train_bwd(run: Any, saved: Any, cotangent: Params) -> tuple[Any, Any, Any, Any]:
        key, params, data, hoisted = saved
        flat, unravel = ravel_pytree(tree.take(data.x, chosen))
        float_cotangent, _ = tree.partition(cotangent)

        def with_rows(vector: jax.Array) -> Params:
            moved = data._replace(x=tree.put(data.x, chosen, unravel(vector)))
            return tree.partition(run(params, jnp.int32(0), ((key, moved), hoisted)))[0]

        def along(index: jax.Array) -> jax.Array:
            basis = jnp.zeros_like(flat).at[index].set(1)
            return tree.dot(jax.jvp(with_rows, (flat,), (basis,))[1], float_cotangent).astype(flat.dtype)

        slopes = jax.lax.map(along, jnp.arange(flat.size), batch_size=min(chunk, flat.size)) if flat.size else flat
        x = jax.tree.map(
            lambda leaf, part: jnp.full_like(leaf, jnp.nan).at[chosen].set(part), data.x, unravel(slopes)
        )
        key_cotangent = np.zeros(key.shape, jax.dtypes.float0)
        rest = jax.tree.map(_unknown, (params, data.y, data.weight, hoisted))
        return key_cotangent, rest[0], Data(x, *rest[1:3]), rest[3]

    train.defvjp(train_fwd, train_bwd)

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        checks.rows_within("rows", chosen, data.num_rows)
        pure, hoisted = hoist(plain, params, (key, data))
        run = pure if hoisted else lambda params, step, both: plain(params, step, both[0])
        trained = train(run, key, params, data, hoisted)
        return trained, jax.lax.stop_gradient(final_info(loss_fn, trained, data))

    def batched(transform: loop.BatchTransform) -> Trainer:
        more = loop.with_transform(slots, transform)
        return forward(loss_fn, optimizer, num_steps, rows=rows, chunk=chunk, **more)

    return Trainer(fit, batched=batched)
