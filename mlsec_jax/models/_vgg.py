"""VGG: stacks of 3x3 convolutions with pooling between them."""

from __future__ import annotations

from typing import Any

import jax

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models import _dense, _model
from mlsec_jax.models._model import Activation, Model
from mlsec_jax.models._norm import conv_norm, conv_norm_leaves
from mlsec_jax.models._pool import global_avg_pool, max_pool

_BLOCKS = ((1,), (2,), (4, 4), (8, 8), (8, 8))  # VGG-11: the convolutions between two poolings, in units of `width`


def vgg(
    *,
    width: int = 16,
    num_classes: int = 10,
    groups: int = 8,
    activation_fn: Activation = jax.nn.relu,
    dropout: Any = 0.0,
    block_dropout: Any = 0.0,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Model:
    """VGG-11 for images of 32x32, Simonyan & Zisserman 2015; `width=64` is the usual one.

    [3x3 convolution, norm, activation] once or twice, then 2x2 max-pooling: five blocks of (1), (2), (4, 4), (8, 8),
    (8, 8) times `width` channels; then the head.

    Deviates from the paper: group norm (Wu & He 2018) where the 32x32 version has batch norm, and one linear head in
    place of three dense layers, as that version has it.

    Args:
      width: channels of the first convolution.
      num_classes: outputs.
      groups: groups of the normalisation; where it does not divide the channels, their greatest common divisor.
      activation_fn: the non-linearity.
      dropout: the probability that a feature is dropped before the head in training (when a key is given).
      block_dropout: likewise, after the first convolution of each block.
      mean: subtracted from the inputs, a number or an array that broadcasts to a row.
      std: divides the inputs, likewise.

    Returns:
      A `Model` of images `[n, h, w, c]` of at least 32x32; params `{"block0": {"conv0", ...}, ..., "head"}`; the
      features are the means over space of the last block (of 1x1 at 32x32), `[n, 8 * width]`; the layers are the
      blocks' outputs and the features.

    >>> model = vgg(width=8)
    >>> params = jax.eval_shape(lambda key: model.init(key, (32, 32, 3)), jax.random.key(0))
    >>> jax.eval_shape(model.features, params, jax.numpy.ones((2, 32, 32, 3))).shape
    (2, 64)
    """
    for name, value in (("width", width), ("groups", groups), ("num_classes", num_classes)):
        checks.count(name, value, 1)
    _dense.check_rate(dropout)
    _dense.check_rate(block_dropout, "block_dropout")
    normalise = _model.normaliser(mean, std)

    def body(shape: tuple[int, ...]) -> tuple[dict, int]:
        _model.require_image(shape, 2 ** len(_BLOCKS))
        leaves: dict = {}
        fan_in = shape[2]
        for i, sizes in enumerate(_BLOCKS):
            leaves[f"block{i}"] = {}
            for j, size in enumerate(sizes):
                leaves[f"block{i}"][f"conv{j}"] = conv_norm_leaves(3, fan_in, size * width)
                fan_in = size * width
        return leaves, fan_in

    def layers(params: Params, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, ...]:
        h = normalise(x)
        outs = []
        for i, sizes in enumerate(_BLOCKS):
            for j in range(len(sizes)):
                h = activation_fn(conv_norm(params[f"block{i}"][f"conv{j}"], h, groups))
                if j == 0:
                    h = _model.dropout(_model.layer_key(key, i), h, block_dropout)
            h = max_pool(h)
            outs.append(h)
        return *outs, _model.dropout(key, global_avg_pool(h), dropout)

    return _model.with_layers(body, layers, num_classes)
