"""What a network is, and the few layers that several of them share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlsec_jax import checks
from mlsec_jax.base import ApplyFn, Params

Activation = Callable[[jax.Array], jax.Array]


class Model(NamedTuple):
    """A network as pure functions over a pytree of parameters.

    The last layer of the networks built here is `params["head"]`, so that `trainable=` can choose it by name:
    `lambda path, leaf: path.startswith("head")`. Weights are called `w`, biases `b`.

    Attributes:
      init: `(key, x) -> params`. `x` is a batch of inputs `[n, ...]` (only its shape and floating dtype are read), or
        the shape of one row as a tuple, such as `(28, 28, 1)`, for parameters in JAX's default floating dtype.
      apply: `(params, x [n, ...], key=None) -> outputs [n, c]`. `key=None` is evaluation, a key is training
        (dropout).
      features: `(params, x, key=None)`, what the head reads: `[n, d]`, or a pytree of such.
      layers_fn: `(params, x, key=None) -> tuple`, see `layers`; None for a network that shows its features only.
    """

    init: Callable[[jax.Array, Any], Params]
    apply: ApplyFn
    features: Callable[..., Any]
    layers_fn: Callable[..., tuple] | None = None

    def layers(self, params: Params, x: jax.Array, key: jax.Array | None = None) -> tuple:
        """What each block gives, from the first to the last, and then the features.

        Attacks on several layers at once take the last few: `lambda *args: model.layers(*args)[-3:]`; under `jit`
        the others cost nothing. A network without blocks gives the features alone.
        """
        if self.layers_fn is None:
            return (self.features(params, x, key),)
        return self.layers_fn(params, x, key)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter to be: `fill`, plus Gaussian noise of standard deviation `std` (None: no noise)."""

    shape: tuple[int, ...]
    std: Any = None
    fill: float = 0.0


def draw(key: jax.Array, leaves: Any, dtype: Any) -> Params:
    """The parameters that a pytree of `Leaf`s describes, from one draw of noise: one random kernel to compile."""
    plan, structure = jax.tree.flatten(leaves)
    sizes = [math.prod(leaf.shape) if leaf.std is not None else 0 for leaf in plan]
    noise = jax.random.normal(key, (sum(sizes),), dtype)
    out, start = [], 0
    for leaf, size in zip(plan, sizes, strict=True):
        value = jnp.full(leaf.shape, leaf.fill, dtype)
        if leaf.std is not None:
            value = value + jnp.asarray(leaf.std, dtype) * noise[start : start + size].reshape(leaf.shape)
        out.append(value)
        start += size
    return jax.tree.unflatten(structure, out)


def with_head(
    body: Callable[[tuple[int, ...]], tuple[dict, int]],
    features: Callable[..., jax.Array],
    num_outputs: int,
    head_std: Any = None,
) -> Model:
    """A body that computes features, and a linear head on them.

    Args:
      body: `shape of a row -> (Leafs of the body's parameters, number of features)`.
      features: `(params, x, key=None) -> [n, d]`.
      num_outputs: outputs of the head.
      head_std: standard deviation of the head's initial weights; None: `1 / sqrt(d)`.
    """

    def init(key: jax.Array, x: Any) -> Params:
        shape, dtype = row_spec(x)
        leaves, width = body(shape)
        head = dense_leaves(width, num_outputs, gain=1.0)
        if head_std is not None:
            head["w"] = Leaf(head["w"].shape, head_std)
        return draw(key, leaves | {"head": head}, dtype)

    def apply(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        hidden = features(params, x, key)
        return dense(params["head"], hidden)

    return Model(init, apply, features)


def with_layers(
    body: Callable[[tuple[int, ...]], tuple[dict, int]], layers: Callable[..., tuple], num_outputs: int
) -> Model:
    """As `with_head`, for a body that tells what each of its blocks gives; the last entry is the features."""

    def features(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return layers(params, x, key)[-1]

    return with_head(body, features, num_outputs)._replace(layers_fn=layers)


def row_spec(x: Any) -> tuple[tuple[int, ...], Any]:
    """The shape of a row and the dtype of the parameters, from a batch or a row's shape."""
    if isinstance(x, tuple):
        for size in x:
            checks.count("x", size, 1)
        return x, jnp.result_type(float)
    if not hasattr(x, "shape") or len(x.shape) < 2:
        raise ValueError(f"x: expected a batch [n, ...] or the shape of a row as a tuple, got {x!r}.")
    checks.floating("x", x)
    return tuple(x.shape[1:]), x.dtype


def normaliser(mean: Any, std: Any) -> Callable[[jax.Array], jax.Array]:
    """`x -> (x - mean) / std`, the first thing every network does, so that radii keep the data's own units.

    `mean` and `std` are numbers, or arrays that broadcast to a row (`[c]` for images `[h, w, c]`).
    """
    checks.above("std", std, 0)
    plain = all(isinstance(value, (int, float)) for value in (mean, std)) and mean == 0 and std == 1

    def normalise(x: jax.Array) -> jax.Array:
        checks.floating("x", x)
        if plain:
            return x
        centre, scale = (jnp.broadcast_to(jnp.asarray(v, x.dtype), x.shape[1:])[None] for v in (mean, std))
        return (x - centre) / scale

    return normalise


def dense_leaves(fan_in: int, fan_out: int, gain: float) -> dict:
    """A dense layer `{"w": [fan_in, fan_out], "b": [fan_out]}`: weights of variance gain / fan_in, biases 0."""
    return {"w": Leaf((fan_in, fan_out), math.sqrt(gain / fan_in)), "b": Leaf((fan_out,))}


def conv_leaves(side: int, fan_in: int, fan_out: int) -> dict:
    """A convolution `{"w": [side, side, fan_in, fan_out], "b": [fan_out]}` of He's variance 2 / fan_in."""
    std = math.sqrt(2 / (side * side * fan_in))
    return {"w": Leaf((side, side, fan_in, fan_out), std), "b": Leaf((fan_out,))}


def dense(params: Params, x: jax.Array) -> jax.Array:
    """`x w + b`: `[n, fan_in] -> [n, fan_out]`."""
    return x @ params["w"] + params["b"][None]


def dropout(key: jax.Array | None, x: jax.Array, rate: Any) -> jax.Array:
    """Keeps each entry with probability `1 - rate`, scaled by its inverse; the identity without a key."""
    if key is None or (isinstance(rate, (int, float)) and rate == 0):
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


def layer_key(key: jax.Array | None, index: int) -> jax.Array | None:
    """The key of one layer; None, evaluation, stays None."""
    return None if key is None else jax.random.fold_in(key, index)


def flatten(x: jax.Array) -> jax.Array:
    """`[n, ...] -> [n, d]`."""
    return x.reshape(x.shape[0], -1)


def require_image(shape: tuple[int, ...], side: int = 1) -> None:
    """Raises unless a row is an image `[h, w, c]` of at least the given side."""
    if len(shape) != 3 or min(shape[:2]) < side:
        raise ValueError(f"x: expected images [n, h, w, c] of at least {side}x{side}, got rows of shape {shape}.")
