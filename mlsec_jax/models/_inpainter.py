"""A network that paints holes of small images, and the critic that judges what it paints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models import _model
from mlsec_jax.models._conv import conv
from mlsec_jax.models._model import Activation, Model


def inpainter(
    *,
    width: int = 16,
    num_downs: int = 2,
    dilations: Sequence[int] = (1, 2, 4),
    activation_fn: Activation = jax.nn.elu,
    mean: Any = 0.5,
) -> Model:
    """A completion network: convolutions down to a dilated bottleneck, and up again.

    5x5 convolution to `width` channels; 3x3 with stride 2 and twice the channels, `num_downs` times; a dilated 3x3 for each
    of `dilations`; [nearest upsampling, 3x3] back; 3x3 to the image and a sigmoid.

    Args:
      width: channels of the first convolution.
      num_downs: halvings of the side, which must be a multiple of `2**num_downs`.
      dilations: of the bottleneck's convolutions; taps that fall outside its maps see zeros.
      activation_fn: the non-linearity.
      mean: what the network sees in the hole, a number or `[c]`, usually the data's mean pixel.

    Returns:
      A `Model` of `[x, mask]` `[n, h, w, c + 1]`: an image in [0, 1] and where its hole is (1), whose pixels it does not read;
      its output is an image `[n, h, w, c]` in [0, 1]; params `{"stem", "down0", ..., "dilated0", ..., "up0", ..., "head"}`;
      the features are the last maps `[n, h, w, width]`.

    References: Iizuka, Simo-Serra & Ishikawa, "Globally and Locally Consistent Image Completion", ACM TOG 2017, table 1.
      Deviates from it in: slim; no normalisation (batch norm there); upsampling in place of transposed convolutions.

    >>> model = inpainter()
    >>> params = jax.eval_shape(lambda key: model.init(key, (32, 32, 4)), jax.random.key(0))
    >>> jax.eval_shape(model.apply, params, jnp.ones((2, 32, 32, 4))).shape
    (2, 32, 32, 3)
    """
    checks.count("width", width, 1)
    checks.count("num_downs", num_downs)
    dilations = tuple(dilations)
    for dilation in dilations:
        checks.count("dilations", dilation, 1)
    sizes = [width * 2**i for i in range(num_downs + 1)]

    def leaves(shape: tuple[int, ...]) -> dict:
        _model.require_image(shape, 2**num_downs)
        if shape[0] % 2**num_downs or shape[1] % 2**num_downs or shape[2] < 2:
            raise ValueError(f"x: expected [x, mask] [n, h, w, c + 1] with sides a multiple of {2**num_downs}, got rows of "
                             f"shape {shape}.")  # fmt: skip
        found = {"stem": _model.conv_leaves(5, shape[2], width)}
        for i in range(num_downs):
            found[f"down{i}"] = _model.conv_leaves(3, sizes[i], sizes[i + 1])
            found[f"up{i}"] = _model.conv_leaves(3, sizes[-1 - i], sizes[-2 - i])
        found |= {f"dilated{i}": _model.conv_leaves(3, sizes[-1], sizes[-1]) for i in range(len(dilations))}
        head = {"w": _model.Leaf((3, 3, width, shape[2] - 1), math.sqrt(1 / (9 * width))), "b": _model.Leaf((shape[2] - 1,))}
        return found | {"head": head}

    def init(key: jax.Array, x: Any) -> Params:
        shape, dtype = _model.row_spec(x)
        return _model.draw(key, leaves(shape), dtype)

    def features(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        checks.floating("x", x)
        image, mask = x[..., :-1], x[..., -1:]
        blank = jnp.broadcast_to(jnp.asarray(mean, x.dtype), image.shape[1:])[None]
        h = jnp.concatenate([jnp.where(mask > 0, blank, image) - blank, mask], axis=3)
        h = activation_fn(_biased(params["stem"], h))
        for i in range(num_downs):
            h = activation_fn(_biased(params[f"down{i}"], h, stride=2))
        for i, dilation in enumerate(dilations):
            h = activation_fn(_biased(params[f"dilated{i}"], h, dilation=dilation))
        for i in range(num_downs):
            h = activation_fn(_biased(params[f"up{i}"], jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)))
        return h

    def apply(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return jax.nn.sigmoid(_biased(params["head"], features(params, x, key)))

    return Model(init, apply, features)


def patch_critic(*, width: int = 16, num_downs: int = 3) -> Model:
    """A critic of patches: one real number for how genuine an image looks, the mean over its overlapping patches.

    [3x3 convolution with stride 2, leaky ReLU], the channels doubling from `width`, `num_downs` times; a 1x1 head; the mean
    over places. Without normalisation, for the gradient penalty is of each row on its own.

    Args:
      width: channels of the first convolution.
      num_downs: halvings of the side.

    Returns:
      A `Model` of `[x, mask]` `[n, h, w, c + 1]` whose output is `[n, 1]`; the features are `[n, width * 2**(num_downs - 1)]`.

    >>> model = patch_critic()
    >>> params = jax.eval_shape(lambda key: model.init(key, (32, 32, 4)), jax.random.key(0))
    >>> jax.eval_shape(model.apply, params, jnp.ones((2, 32, 32, 4))).shape
    (2, 1)
    """
    checks.count("width", width, 1)
    checks.count("num_downs", num_downs, 1)
    sizes = [width * 2**i for i in range(num_downs)]

    def body(shape: tuple[int, ...]) -> tuple[dict, int]:
        _model.require_image(shape)
        fans = [shape[2], *sizes[:-1]]
        return {f"down{i}": _model.conv_leaves(3, fans[i], sizes[i]) for i in range(num_downs)}, sizes[-1]

    def features(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        for i in range(num_downs):
            x = jax.nn.leaky_relu(_biased(params[f"down{i}"], x, stride=2), 0.2)
        return jnp.mean(x, axis=(1, 2))

    return _model.with_head(body, features, 1)


def _biased(layer: Params, x: jax.Array, **options: Any) -> jax.Array:
    """A convolution and its bias."""
    return conv(x, layer["w"], **options) + layer["b"][None, None, None]
