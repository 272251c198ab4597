"""A network computed in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax.models._model import Model


def in_bfloat16(model: Model) -> Model:
    """The same network, computed in bfloat16: for accelerators, where it saves time and memory.

    Parameters, inputs and everything the network gives keep their dtype, and so do derivatives, which are rounded where
    they pass through the network: optimisers, attacks and losses see no difference. On CPU it is slower than float32.

    Args:
      model: a network of float32 parameters.

    >>> net = in_bfloat16(Model(None, apply=lambda w, x, key=None: x @ w, features=None))
    >>> net.apply(jnp.full((1, 1), 1.001), jnp.ones((1, 1))).tolist()  # bfloat16 has 8 bits
    [[1.0]]
    """

    def rounded(fn: Callable[..., Any]) -> Callable[..., Any]:
        def computed(params: Any, x: jax.Array, key: jax.Array | None = None) -> Any:
            half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
            return jax.tree.map(lambda leaf: leaf.astype(x.dtype), fn(half(params), half(x), key))

        return computed

    layers_fn = None if model.layers_fn is None else rounded(model.layers_fn)
    return Model(model.init, rounded(model.apply), rounded(model.features), layers_fn)
