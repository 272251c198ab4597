"""Channels of a layer in any parameter pytree: how active they are, and what switches them off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlsec_jax import tree
from mlsec_jax.base import Data, Params
from mlsec_jax.losses import present, weighted_mean

ActivationsFn = Callable[..., jax.Array]  # (params, x [n, ...]) -> [n, ..., channels]


class Layer(NamedTuple):
    """A layer's channels, as functions of the whole model's parameters; `layer` makes one by name.

    Attributes:
      activations_fn: `(params, x [n, ...]) -> [n, ..., channels]`, after the non-linearity.
      prune_fn: `(params, keep [channels]) -> params` in which channel k gives `keep_k` times what it gave, where it is
        1 or 0; linear in `keep`. Everything outside the layer passes through.
      shift_fn: `(params, by [channels]) -> params` with the biases lowered.
    """

    activations_fn: ActivationsFn
    prune_fn: Callable[[Params, jax.Array], Params]
    shift_fn: Callable[[Params, jax.Array], Params]


def layer(name: str, activations_fn: ActivationsFn, *, axis: int = -1) -> Layer:
    """The layer of that name, for the networks of `models`, Flax and Haiku; with `axis=0` for Equinox.

    Args:
      name: where its parameters are, such as `"conv1"` or `"features/conv1"`; `""` for a tree that is one layer.
      activations_fn: what it gives, `lambda params, x: model.layers(params, x)[1]` for the second block of a `Model`.
      axis: of the channels in every leaf of the layer.

    Returns:
      A `Layer`.
    """
    return Layer(activations_fn, prune_channels(name, axis=axis), shift_bias(name, axis=axis))


def prune_channels(name: str, *, axis: int = -1) -> Callable[[Params, jax.Array], Params]:
    """`(params, keep [channels]) -> params` with the layer's weights and biases multiplied by `keep`.

    Under ReLU a channel without weights and bias gives 0: it might as well not be there. In a layer with a `scale`,
    that is one whose convolution is normalised, scale and bias are multiplied and the weights are left, for other
    channels share the statistics that they feed.

    >>> params = {"conv": {"w": jnp.ones((1, 2)), "b": jnp.ones(2)}, "head": jnp.ones(2)}
    >>> pruned = prune_channels("conv")(params, jnp.array([1, 0]))
    >>> pruned["conv"]["b"].tolist(), pruned["head"].tolist()
    ([1.0, 0.0], [1.0, 1.0])
    """

    def prune(params: Params, keep: jax.Array) -> Params:
        leaves = _leaves_of(params, name)
        normalised = any(_last(path) == "scale" for path in leaves)
        chosen = lambda path, leaf: path in leaves and not (normalised and leaf.ndim > 1)
        return _act(params, chosen, keep, axis, lambda leaf, factor: leaf * factor)

    return prune


def shift_bias(name: str, *, axis: int = -1) -> Callable[[Params, jax.Array], Params]:
    """`(params, by [channels]) -> params` with the layer's bias (a leaf called `b` or `bias`) lowered by `by`."""

    def shift(params: Params, by: jax.Array) -> Params:
        leaves = {path for path in _leaves_of(params, name) if _last(path) in ("b", "bias")}
        if not leaves:
            raise ValueError(f"name: expected a layer with a bias ('b' or 'bias'), got {name!r}, which has none.")
        return _act(params, lambda path, leaf: path in leaves, by, axis, lambda leaf, value: leaf - value)

    return shift


def mean_activation(layer: Layer, params: Params, data: Data) -> jax.Array:
    """`a_k = E_x mean_{hw} g_k(x)`, the mean over rows (by weight) and places of each channel: `[channels]`."""
    active = layer.activations_fn(params, present(data).x)
    if active.ndim < 2:
        raise ValueError(f"activations_fn: expected [n, ..., channels], got shape {active.shape}.")
    each = jnp.mean(active.reshape(active.shape[0], -1, active.shape[-1]), axis=1)
    return jax.vmap(weighted_mean, in_axes=(1, None))(each, data.weight)


def along(
    prune_fn: Callable[[Params, jax.Array], Params],
    params: Params,
    order: jax.Array,
    measure_fn: Callable[[Params], Any],
    *,
    num_levels: int | None = None,
) -> Any:
    """What `measure_fn(params)` gives along a pruning path: after none, the first, the first two, … channels of `order`.

    Args:
      prune_fn: of a `Layer`.
      params: of the whole model.
      order: `[channels]`, a permutation; the first goes first.
      measure_fn: `params -> ` numbers, such as accuracy or an attack's success.
      num_levels: how many to prune at most; None: every channel.

    Returns:
      What it gave, with a leading axis `[num_levels + 1]`: one scan.
    """
    levels = jnp.arange((order.shape[0] if num_levels is None else num_levels) + 1)
    rank = ranks(order)
    return jax.lax.map(lambda level: measure_fn(prune_fn(params, rank >= level)), levels)


def ranks(order: jax.Array) -> jax.Array:
    """The place of each channel in `order`: the inverse permutation."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))


def _leaves_of(params: Params, name: str) -> set[str]:
    """The paths of the layer's floating leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [tree.name(path) for path, leaf in flat if tree.is_float(leaf)]
    found = {path for path in paths if not name or path == name or path.startswith(name + "/")}
    if not found:
        raise ValueError(f"name: expected a layer of parameters called {', '.join(paths)}, got {name!r}.")
    return found


def _last(path: str) -> str:
    """What a leaf is called; Flax nnx wraps it in a `value`."""
    return path.removesuffix("/value").rsplit("/", 1)[-1]


def _act(
    params: Params,
    chosen: Callable[[str, Any], bool],
    vector: jax.Array,
    axis: int,
    fn: Callable[[jax.Array, jax.Array], jax.Array],
) -> Params:
    """`fn(leaf, vector along the axis)` of the chosen leaves."""

    def act(path: Any, leaf: Any) -> Any:
        if not chosen(tree.name(path), leaf):
            return leaf
        if leaf.ndim == 0 or leaf.shape[axis] != vector.shape[0]:
            raise ValueError(
                f"axis: expected {vector.shape[0]} channels on axis {axis} of {tree.name(path)}, got shape {leaf.shape}."
            )
        shape = [1] * leaf.ndim
        shape[axis] = vector.shape[0]
        return fn(leaf, jnp.broadcast_to(vector.astype(leaf.dtype).reshape(shape), leaf.shape))

    return jax.tree_util.tree_map_with_path(act, params)
