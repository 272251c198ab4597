"""MobileNetV2: inverted residual blocks around a depthwise convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models import _dense, _model
from mlsec_jax.models._depthwise import depthwise
from mlsec_jax.models._model import Activation, Leaf, Model
from mlsec_jax.models._norm import conv_norm, conv_norm_leaves, group_norm
from mlsec_jax.models._pool import global_avg_pool

# (expansion, channels at width 32, stride of the first block) of each stage: the paper's table 2, with stride 1 where
# it has 2 in the stem and the second stage, as is done for 32x32.
_STAGES = ((1, 16, 1), (6, 24, 1), (6, 32, 2), (6, 64, 2), (6, 96, 1), (6, 160, 2), (6, 320, 1))
_FEATURES = 1280


def mobilenet(
    *,
    width: int = 16,
    blocks: Sequence[int] = (1, 2, 3, 4, 3, 3, 1),
    num_classes: int = 10,
    groups: int = 8,
    activation_fn: Activation = jax.nn.relu,
    dropout: Any = 0.0,
    block_dropout: Any = 0.0,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Model:
    """MobileNetV2 for images of 32x32, Sandler et al. 2018; `width=32` is the usual one.

    stem: 3x3 convolution of `width` channels, norm, activation; seven stages of `blocks[i]` inverted residual blocks;
    1x1 convolution to `40 * width` channels, norm, activation; mean over space; head.

    block: 1x1 convolution to `expansion` times the channels, norm, activation; depthwise 3x3 convolution, norm,
    activation; 1x1 convolution, norm; plus the shortcut where the stride is 1: the input, or where the number of
    channels changes its 1x1 convolution.

    Deviates from the paper: group norm (Wu & He 2018) in place of batch norm; the strides, the plain `relu` and the
    1x1 shortcut are those of the 32x32 version that the clean-label attacks use.

    Args:
      width: channels of the stem; a multiple of 4.
      blocks: blocks in each of the seven stages.
      num_classes: outputs.
      groups: groups of the normalisation; where it does not divide the channels, their greatest common divisor.
      activation_fn: the non-linearity.
      dropout: the probability that a feature is dropped before the head in training (when a key is given).
      block_dropout: likewise, after the depthwise convolution of each block (Zhu et al. 2019).
      mean: subtracted from the inputs, a number or an array that broadcasts to a row.
      std: divides the inputs, likewise.

    Returns:
      A `Model` of images `[n, h, w, c]`; params `{"stem", "stage0_block0", ..., "last", "head"}`; the features are
      `[n, 40 * width]`; the layers are the blocks' outputs and the features.

    >>> model = mobilenet(width=8)
    >>> params = jax.eval_shape(lambda key: model.init(key, (32, 32, 3)), jax.random.key(0))
    >>> jax.eval_shape(model.features, params, jax.numpy.ones((2, 32, 32, 3))).shape
    (2, 320)
    """
    blocks = tuple(blocks)
    if len(blocks) != len(_STAGES):
        raise ValueError(f"blocks: expected {len(_STAGES)} numbers, got {len(blocks)}.")
    for number in blocks:
        checks.count("blocks", number, 1)
    for name, value in (("width", width), ("groups", groups), ("num_classes", num_classes)):
        checks.count(name, value, 1)
    if width % 4:
        raise ValueError(f"width: expected a multiple of 4, got {width}.")
    _dense.check_rate(dropout)
    _dense.check_rate(block_dropout, "block_dropout")
    normalise = _model.normaliser(mean, std)
    # (name, input channels, expansion, output channels, stride) of every block
    plan: list[tuple[str, int, int, int, int]] = []
    size = width
    for stage, (number, (expansion, channels, stride)) in enumerate(zip(blocks, _STAGES, strict=True)):
        for block in range(number):
            fan_in, size = size, channels * width // 32
            plan.append((f"stage{stage}_block{block}", fan_in, expansion, size, stride if block == 0 else 1))

    def body(shape: tuple[int, ...]) -> tuple[dict, int]:
        _model.require_image(shape, 8)
        leaves: dict = {"stem": conv_norm_leaves(3, shape[2], width)}
        for name, fan_in, expansion, size, stride in plan:
            hidden = expansion * fan_in
            leaves[name] = {
                "expand": conv_norm_leaves(1, fan_in, hidden),
                "depthwise": {
                    "w": Leaf((3, 3, hidden), math.sqrt(2 / 9)),
                    "b": Leaf((hidden,)),
                    "scale": Leaf((hidden,), fill=1.0),
                },
                "project": conv_norm_leaves(1, hidden, size),
            }
            if stride == 1 and fan_in != size:
                leaves[name]["shortcut"] = conv_norm_leaves(1, fan_in, size)
        features = _FEATURES * width // 32
        return leaves | {"last": conv_norm_leaves(1, plan[-1][3], features)}, features

    def inner(params: Params, h: jax.Array, key: jax.Array | None, stride: int) -> jax.Array:
        h = activation_fn(conv_norm(params["expand"], h, groups))
        taps = params["depthwise"]
        h = group_norm(depthwise(h, taps["w"], stride=stride), taps["scale"], taps["b"], groups)
        return conv_norm(params["project"], _model.dropout(key, activation_fn(h), block_dropout), groups)

    def layers(params: Params, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, ...]:
        h = activation_fn(conv_norm(params["stem"], normalise(x), groups))
        outs = []
        for i, (name, fan_in, _, size, stride) in enumerate(plan):
            block = params[name]
            added = inner(block, h, _model.layer_key(key, i), stride)
            if stride == 1:
                added = added + (h if fan_in == size else conv_norm(block["shortcut"], h, groups))
            h = added
            outs.append(h)
        last = activation_fn(conv_norm(params["last"], h, groups))
        return *outs, _model.dropout(key, global_avg_pool(last), dropout)

    return _model.with_layers(body, layers, num_classes)
