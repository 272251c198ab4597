"""A scaled-down AlexNet for small images: two convolutions, two dense layers."""

from __future__ import annotations

from typing import Any

import jax

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models import _dense, _model
from mlsec_jax.models._model import Activation, Model
from mlsec_jax.models._norm import conv_norm, conv_norm_leaves
from mlsec_jax.models._pool import max_pool

_WINDOW, _STRIDE = 3, 2  # AlexNet's overlapping pooling


def alexnet(
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
    """The scaled-down AlexNet for CIFAR-10 that Poison Frogs attacks end to end (Shafahi et al. 2018).

    [5x5 convolution, norm, activation, 3x3 max-pooling of stride 2] twice, of `width` channels; [dense, activation,
    dropout] of `6 * width` and `3 * width` units; the head. `width=64` has the layers 64, 64, 384, 192 of the network
    that is commonly meant (TensorFlow's CIFAR-10 tutorial).

    Deviates from it: group norm (Wu & He 2018) in place of local response normalisation, before the activation, and
    pooling without padding (15x15 and 7x7 are left of 32x32).

    Args:
      width: channels of the convolutions.
      num_classes: outputs.
      groups: groups of the normalisation; where it does not divide the channels, their greatest common divisor.
      activation_fn: the non-linearity.
      dropout: the probability that a dense hidden unit is dropped in training (when a key is given), the last layer's
        before the head included.
      block_dropout: likewise, for what enters the second convolution and the first dense layer.
      mean: subtracted from the inputs, a number or an array that broadcasts to a row.
      std: divides the inputs, likewise.

    Returns:
      A `Model` of images `[n, h, w, c]` of at least 7x7; params `{"conv0", "conv1", "layer0", "layer1", "head"}`; the
      features are the last dense hidden layer `[n, 3 * width]`; the layers are the convolutions' outputs (after
      pooling) and the features.

    >>> model = alexnet()
    >>> params = jax.eval_shape(lambda key: model.init(key, (32, 32, 3)), jax.random.key(0))
    >>> jax.eval_shape(model.features, params, jax.numpy.ones((2, 32, 32, 3))).shape
    (2, 48)
    """
    for name, value in (("width", width), ("groups", groups), ("num_classes", num_classes)):
        checks.count(name, value, 1)
    _dense.check_rate(dropout)
    _dense.check_rate(block_dropout, "block_dropout")
    normalise = _model.normaliser(mean, std)
    widths = (6 * width, 3 * width)
    pool = lambda side: (side - _WINDOW) // _STRIDE + 1

    def body(shape: tuple[int, ...]) -> tuple[dict, int]:
        _model.require_image(shape, _STRIDE * _WINDOW + 1)
        leaves = {"conv0": conv_norm_leaves(5, shape[2], width), "conv1": conv_norm_leaves(5, width, width)}
        height, breadth = (pool(pool(side)) for side in shape[:2])
        return leaves | _dense.hidden_leaves(height * breadth * width, widths), widths[-1]

    def layers(params: Params, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, ...]:
        h = normalise(x)
        outs = []
        for i in range(2):
            h = activation_fn(conv_norm(params[f"conv{i}"], h, groups))
            h = max_pool(h, window=_WINDOW, stride=_STRIDE)
            outs.append(h)
            h = _model.dropout(_model.layer_key(key, 2 + i), h, block_dropout)
        return *outs, _dense.hidden(params, _model.flatten(h), key, 2, activation_fn, dropout)

    return _model.with_layers(body, layers, num_classes)
