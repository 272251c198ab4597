"""Group normalisation, and the convolution followed by it that the deep networks are made of."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from mlsec_jax.base import Params
from mlsec_jax.models import _model
from mlsec_jax.models._conv import conv


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int) -> jax.Array:
    """Each image's channels, group by group, to mean 0 and variance 1; then a scale and a bias a channel.

    Wu & He 2018. It stands in for batch norm everywhere here, because a network whose loss on one row depends on the
    other rows of the batch has no per-example loss.

    Args:
      x: `[n, h, w, c]`.
      scale: `[c]`.
      bias: `[c]`.
      groups: how many; where it does not divide c, their greatest common divisor.
    """
    n, c = x.shape[0], x.shape[3]
    groups = math.gcd(groups, c)
    size = c // groups

    def mean(v: jax.Array) -> jax.Array:
        """Over space first, then over a group's channels: one sum over five axes is five times slower on CPU."""
        of_group = jnp.mean(jnp.mean(v, axis=(1, 2)).reshape(n, groups, size), axis=2, keepdims=True)
        return jnp.broadcast_to(of_group, (n, groups, size)).reshape(n, 1, 1, c)

    centred = x - mean(x)
    factor = lax.rsqrt(mean(jnp.square(centred)) + 1e-5) * scale[None, None, None]
    return centred * factor + bias[None, None, None]


def conv_norm_leaves(side: int, fan_in: int, size: int, groups: int | None = 1) -> dict:
    """A convolution and its normalisation: `{"w": [side, side, fan_in, size], "b": [size], "scale": [size]}`.

    Without normalisation (`groups=None`) there is no scale.
    """
    leaves = _model.conv_leaves(side, fan_in, size)
    return leaves if groups is None else leaves | {"scale": _model.Leaf((size,), fill=1.0)}


def conv_norm(params: Params, x: jax.Array, groups: int | None, stride: int = 1) -> jax.Array:
    """The convolution and its normalisation, which brings the bias; `groups=None` for the bias alone."""
    out = conv(x, params["w"], stride=stride)
    if groups is None:
        return out + params["b"][None, None, None]
    return group_norm(out, params["scale"], params["b"], groups)
