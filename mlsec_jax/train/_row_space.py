"""Training on few long rows, in the space that the rows span: the same steps, with n numbers an input instead of d."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import losses, tree
from mlsec_jax.base import Data, Info, Key, Params, Trainer


@jax.custom_jvp
def _basis(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`xᵀ = Q R`: orthonormal directions `[d, r]`, and the rows' coordinates along them, transposed `[r, n]`."""
    q, r = jnp.linalg.qr(x.T)
    return q, r


@_basis.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError("train.row_space: the inputs cannot be differentiated, for the basis of dependent rows has no "
                     "derivative; differentiate the trainer itself.")  # fmt: skip


def row_space(trainer: Any, where: tree.Where) -> Trainer:
    """The trainer's own iterates, computed in the span of the rows: the speed of few rows of many numbers.

    A layer `z = x W` moves in the span of its inputs only. With `Xᵀ = Q R`, `r = min(n, d)` orthonormal columns in Q, the
    trainer sees the inputs `Rᵀ` `[n, r]` and the weights `V = Qᵀ W`; then `W' = W + Q (V' - V)`. That rotation leaves
    every inner product as it is, so plain and heavy-ball or Nesterov gradient descent make the same steps to rounding,
    in batches too, at r/d of the multiplications.

    Not for optimisers that look at single coordinates (Adam), and not for a network that shifts or crops its inputs. A
    penalty or decay on W is that of the whole of W only where W starts in the span (at zero, say): what lies outside
    is left as it is.

    Args:
      trainer: `(key, params, data) -> (params, info)`.
      where: the leaves `[d, h]` that multiply the flattened inputs (`tree.mask_of`).

    Returns:
      A `Trainer` on x `[n, ...]`. Labels and weights can be differentiated; inputs raise.

    >>> import optax
    >>> import mlsec_jax as mj
    >>> from mlsec_jax import bilevel
    >>> fit = bilevel.unrolled(losses.squared(lambda w, x, key=None: x @ w), optax.sgd(0.1), 3)
    >>> data, start = mj.dataset(jnp.ones((2, 50)), jnp.ones(2)), jnp.zeros((50, 1))
    >>> same = [each(jax.random.key(0), start, data)[0] for each in (fit, row_space(fit, None))]
    >>> bool(jnp.allclose(*same, atol=1e-6))
    True
    """

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        x = losses.present(data).x
        x = x.reshape(x.shape[0], -1)
        chosen, rest = tree.partition(params, where)
        for leaf in jax.tree.leaves(chosen):
            if leaf.ndim != 2 or leaf.shape[0] != x.shape[1]:
                raise ValueError(f"where: expected leaves [{x.shape[1]}, h] that multiply the inputs, got {leaf.shape}.")
        q, r = _basis(x)
        start = jax.tree.map(lambda leaf: q.T @ leaf, chosen)
        trained, info = trainer(key, tree.merge(start, rest), data._replace(x=r.T))
        ended, others = tree.partition(trained, where)
        back = jax.tree.map(lambda leaf, v, v0: leaf + q @ (v - v0), chosen, ended, start)
        return tree.merge(back, others), info

    return Trainer(fit)
