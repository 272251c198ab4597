"""A slim residual network with group normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models import _dense, _model
from mlsec_jax.models._model import Activation, Model
from mlsec_jax.models._norm import conv_norm, conv_norm_leaves
from mlsec_jax.models._pool import global_avg_pool


def resnet(
    *,
    width: int = 16,
    blocks: Sequence[int] = (1, 1, 1),
    num_classes: int = 10,
    groups: int = 8,
    activation_fn: Activation = jax.nn.relu,
    dropout: Any = 0.0,
    block_dropout: Any = 0.0,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Model:
    """A residual network for small images (32x32x3, 28x28x1), He et al. 2016, of depth `2 + 2 * sum(blocks)`.

    stem: 3x3 convolution, norm, activation; stage i: `blocks[i]` blocks of `width * 2**i` channels, the first of
    stages 1, 2, ... with stride 2;  block: h' = activation(norm(conv(activation(norm(conv(h))))) + shortcut(h)).

    Deviates from the paper in its normalisation: group norm (Wu & He 2018) in place of batch norm, because a network
    whose loss on one row depends on the other rows of the batch has no per-example loss. A record must say so beside
    a paper's batch-norm figure. `blocks=(2, 2, 2, 2), width=64` is ResNet-18 for 32x32.

    Args:
      width: channels of the stem and the first stage.
      blocks: residual blocks in each stage.
      num_classes: outputs.
      groups: groups of the normalisation; must divide `width`.
      activation_fn: the non-linearity.
      dropout: the probability that a feature is dropped before the head in training (when a key is given).
      block_dropout: likewise, in the middle of each block (Zhu et al. 2019).
      mean: subtracted from the inputs, a number or an array that broadcasts to a row.
      std: divides the inputs, likewise.

    Returns:
      A `Model` of images `[n, h, w, c]`; params `{"stem", "stage0_block0", ..., "head"}`; the features are the means
      over space of the last stage, `[n, width * 2**(len(blocks) - 1)]`; the layers are the blocks' outputs and the
      features.

    >>> model = resnet(width=8)
    >>> params = jax.eval_shape(lambda key: model.init(key, (32, 32, 3)), jax.random.key(0))
    >>> jax.eval_shape(model.features, params, jax.numpy.ones((2, 32, 32, 3))).shape
    (2, 32)
    """
    blocks = tuple(blocks)
    if not blocks:
        raise ValueError("blocks: expected at least one stage, got none.")
    for number in blocks:
        checks.count("blocks", number, 1)
    for name, value in (("width", width), ("groups", groups), ("num_classes", num_classes)):
        checks.count(name, value, 1)
    if width % groups:
        raise ValueError(f"groups: expected a divisor of width {width}, got {groups}.")
    _dense.check_rate(dropout)
    _dense.check_rate(block_dropout, "block_dropout")
    normalise = _model.normaliser(mean, std)
    # (name, input channels, output channels, stride) of every block
    plan: list[tuple[str, int, int, int]] = []
    for stage, number in enumerate(blocks):
        for block in range(number):
            size = width * 2**stage
            first = block == 0 and stage > 0
            plan.append((f"stage{stage}_block{block}", size // 2 if first else size, size, 2 if first else 1))

    def body(shape: tuple[int, ...]) -> tuple[dict, int]:
        _model.require_image(shape, 2 ** (len(blocks) - 1))
        leaves: dict = {"stem": conv_norm_leaves(3, shape[2], width)}
        for name, fan_in, size, stride in plan:
            leaves[name] = {"conv0": conv_norm_leaves(3, fan_in, size), "conv1": conv_norm_leaves(3, size, size)}
            if stride > 1:
                leaves[name]["shortcut"] = conv_norm_leaves(1, fan_in, size)
        return leaves, plan[-1][2]

    def layers(params: Params, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, ...]:
        h = activation_fn(conv_norm(params["stem"], normalise(x), groups))
        outs = []
        for i, (name, _, _, stride) in enumerate(plan):
            block = params[name]
            inner = activation_fn(conv_norm(block["conv0"], h, groups, stride))
            inner = conv_norm(block["conv1"], _model.dropout(_model.layer_key(key, i), inner, block_dropout), groups)
            h = activation_fn(inner + (conv_norm(block["shortcut"], h, groups, stride) if stride > 1 else h))
            outs.append(h)
        return *outs, _model.dropout(key, global_avg_pool(h), dropout)

    return _model.with_layers(body, layers, num_classes)
