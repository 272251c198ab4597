"""ConvNet: five convolutions with pooling, the small network of the from-scratch attacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models import _dense, _model
from mlsec_jax.models._model import Activation, Model
from mlsec_jax.models._norm import conv_norm, conv_norm_leaves
from mlsec_jax.models._pool import global_avg_pool, max_pool


def convnet(
    *,
    width: int = 16,
    sizes: Sequence[int] = (1, 2, 2, 4, 4),
    pooled: Sequence[int] = (0, 1, 2, 3, 4),
    window: int = 2,
    num_classes: int = 10,
    groups: int | None = 8,
    averaged: bool = False,
    activation_fn: Activation = jax.nn.relu,
    dropout: Any = 0.0,
    block_dropout: Any = 0.0,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Model:
    """The ConvNet of MetaPoison (the default: 16, 32, 32, 64, 64 channels, Huang et al. 2020) or Witches' Brew.

    [3x3 convolution, norm, activation, max-pooling after those that `pooled` names] for each of `sizes`; then the
    head on everything that is left. `sizes=(1, 2, 2, 4, 4), pooled=(3, 4), window=3, width=64` is the ConvNet64 of
    Witches' Brew (Geiping et al. 2021), at some fifteen times the default's cost for the same width.

    Group norm's statistics are the whole image's: one place can be seen in every other. Without it, and with
    `averaged=True`, a class's score is a mean over places of what each place sees of its surroundings.

    Deviates from the papers' code: group norm (Wu & He 2018) in place of batch norm; Witches' Brew has none
    (`groups=None`).

    Args:
      width: the unit of `sizes`.
      sizes: output channels of the convolutions, in units of `width`.
      pooled: the convolutions (from 0) that pooling follows.
      window: side of the pooling's windows.
      num_classes: outputs.
      groups: groups of the normalisation; where it does not divide the channels, their greatest common divisor. None:
        no normalisation, and parameters without `scale`.
      averaged: whether the head reads the means over space rather than every place.
      activation_fn: the non-linearity.
      dropout: the probability that a feature is dropped before the head in training (when a key is given).
      block_dropout: likewise, before every convolution but the first.
      mean: subtracted from the inputs, a number or an array that broadcasts to a row.
      std: divides the inputs, likewise.

    Returns:
      A `Model` of images `[n, h, w, c]`; params `{"conv0", ..., "head"}`; the features are the last convolution's
      output, flattened or averaged: `[n, 4 * width]` for the default at 32x32; the layers are the convolutions' outputs
      (after pooling) and the features.

    >>> model = convnet()
    >>> params = jax.eval_shape(lambda key: model.init(key, (32, 32, 3)), jax.random.key(0))
    >>> jax.eval_shape(model.features, params, jax.numpy.ones((2, 32, 32, 3))).shape
    (2, 64)
    """
    sizes, pooled = tuple(sizes), tuple(pooled)
    if not sizes:
        raise ValueError("sizes: expected at least one number, got none.")
    for name, value in (("width", width), ("num_classes", num_classes), ("window", window)):
        checks.count(name, value, 1)
    if groups is not None:
        checks.count("groups", groups, 1)
    for size in sizes:
        checks.count("sizes", size, 1)
    if len(set(pooled)) < len(pooled) or not set(pooled) <= set(range(len(sizes))):
        raise ValueError(f"pooled: expected different convolutions of the {len(sizes)}, from 0, got {pooled}.")
    _dense.check_rate(dropout)
    _dense.check_rate(block_dropout, "block_dropout")
    normalise = _model.normaliser(mean, std)

    def body(shape: tuple[int, ...]) -> tuple[dict, int]:
        _model.require_image(shape, window ** len(pooled))
        channels = [shape[2], *(size * width for size in sizes)]
        leaves = {f"conv{i}": conv_norm_leaves(3, channels[i], channels[i + 1], groups) for i in range(len(sizes))}
        height, breadth = shape[0], shape[1]
        for _ in pooled:
            height, breadth = height // window, breadth // window
        return leaves, channels[-1] * (1 if averaged else height * breadth)

    def layers(params: Params, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, ...]:
        h = normalise(x)
        outs = []
        for i in range(len(sizes)):
            if i:
                h = _model.dropout(_model.layer_key(key, i), h, block_dropout)
            h = activation_fn(conv_norm(params[f"conv{i}"], h, groups))
            h = max_pool(h, window=window) if i in pooled else h
            outs.append(h)
        return *outs, _model.dropout(key, global_avg_pool(h) if averaged else _model.flatten(h), dropout)

    return _model.with_layers(body, layers, num_classes)
