"""LeNet: convolution, pooling, twice or more, then dense layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models import _dense, _model
from mlsec_jax.models._conv import conv
from mlsec_jax.models._model import Activation, Model
from mlsec_jax.models._pool import avg_pool, max_pool


def lenet(
    *,
    channels: Sequence[int] = (32, 64),
    widths: Sequence[int] = (128,),
    num_classes: int = 10,
    kernel: int = 5,
    pooling: str = "avg",
    activation_fn: Activation = jax.nn.relu,
    dropout: Any = 0.0,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Model:
    """A LeNet-style convolutional network.

    [convolution k x k, activation, pooling 2 x 2] for each of `channels`, then [dense, activation, dropout] for each
    of `widths`, then the head. The defaults have 454,922 parameters on 28x28x1; `channels=(8, 16), widths=(64,)`
    makes the small one of 54,314.

    Args:
      channels: output channels of the convolutions.
      widths: widths of the dense layers (at least one).
      num_classes: outputs.
      kernel: side of the convolutions' kernels, with "SAME" padding.
      pooling: "avg" (smooth, without ties: hypergradients are exact everywhere) or "max" (the first wins a tie).
      activation_fn: the non-linearity.
      dropout: the probability that a dense hidden unit is dropped in training (when a key is given).
      mean: subtracted from the inputs, a number or an array that broadcasts to a row.
      std: divides the inputs, likewise.

    Returns:
      A `Model` of images `[n, h, w, c]`; params `{"conv0", ..., "layer0", ..., "head"}`; the features are the last
      dense hidden layer `[n, widths[-1]]`, the layers before them each convolution's pooled maps.

    >>> model = lenet()
    >>> params = jax.eval_shape(lambda key: model.init(key, (28, 28, 1)), jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    454922
    """
    channels, widths = tuple(channels), tuple(widths)
    for name, sizes in (("channels", channels), ("widths", widths)):
        if not sizes:
            raise ValueError(f"{name}: expected at least one number, got none.")
        for size in sizes:
            checks.count(name, size, 1)
    checks.count("num_classes", num_classes, 1)
    checks.count("kernel", kernel, 1)
    checks.one_of("pooling", pooling, ("avg", "max"))
    _dense.check_rate(dropout)
    pool = {"avg": avg_pool, "max": max_pool}[pooling]
    normalise = _model.normaliser(mean, std)

    def body(shape: tuple[int, ...]) -> tuple[dict, int]:
        _model.require_image(shape, 2 ** len(channels))
        height, width, fan_in = shape
        leaves = {}
        for i, size in enumerate(channels):
            leaves[f"conv{i}"] = _model.conv_leaves(kernel, fan_in, size)
            height, width, fan_in = height // 2, width // 2, size
        return leaves | _dense.hidden_leaves(height * width * fan_in, widths), widths[-1]

    def layers(params: Params, x: jax.Array, key: jax.Array | None = None) -> tuple:
        maps, h = [], normalise(x)
        for i in range(len(channels)):
            layer = params[f"conv{i}"]
            h = pool(activation_fn(conv(h, layer["w"]) + layer["b"][None, None, None]))
            maps.append(h)
        return *maps, _dense.hidden(params, _model.flatten(h), key, len(widths), activation_fn, dropout)

    return _model.with_layers(body, layers, num_classes)
