"""Networks of dense layers: linear and logistic models, and the multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models import _model
from mlsec_jax.models._model import Activation, Model


def linear(*, num_outputs: int = 1, mean: Any = 0.0, std: Any = 1.0, scale: float = 0.0) -> Model:
    """The linear model of ridge, LASSO and elastic-net regression: `f(x) = W^T (x - mean) / std + b`.

    Args:
      num_outputs: outputs a row; a single one comes as `[n, 1]`.
      mean: subtracted from the inputs, a number or an array that broadcasts to a row.
      std: divides the inputs, likewise.
      scale: standard deviation of the initial weights. At 0 every key gives the same start, which is all that a
        convex problem needs.

    Returns:
      A `Model`. Rows of any shape are flattened; the features are the normalised inputs `[n, d]`.

    >>> model = linear()
    >>> params = model.init(jax.random.key(0), (3,))
    >>> model.apply(params, jax.numpy.ones((2, 3))).shape
    (2, 1)
    """
    checks.count("num_outputs", num_outputs, 1)
    checks.at_least("scale", scale, 0)
    normalise = _model.normaliser(mean, std)

    def features(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del params, key
        return _model.flatten(normalise(x))

    return _model.with_head(lambda shape: ({}, math.prod(shape)), features, num_outputs, scale)


def softmax_regression(*, num_classes: int = 10, mean: Any = 0.0, std: Any = 1.0, scale: float = 0.0) -> Model:
    """Multinomial logistic regression: `num_classes` logits, for `losses.cross_entropy`. Options as in `linear`.

    >>> model = softmax_regression(num_classes=3)
    >>> params = model.init(jax.random.key(0), (8, 8, 1))
    >>> model.apply(params, jax.numpy.ones((2, 8, 8, 1))).shape
    (2, 3)
    """
    checks.count("num_classes", num_classes, 2)
    return linear(num_outputs=num_classes, mean=mean, std=std, scale=scale)


def logistic_regression(*, mean: Any = 0.0, std: Any = 1.0, scale: float = 0.0) -> Model:
    """Binary logistic regression (and the linear SVM): **one** logit `[n, 1]`, positive for the class of label 1.

    It goes with losses of a single output (`losses.logistic`, `losses.hinge`), whose optimum is unique. For two
    logits and an arg-max take `softmax_regression(num_classes=2)`: its two logits are determined up to a shift only,
    so its Hessian is singular without a penalty. Options as in `linear`.

    >>> model = logistic_regression()
    >>> model.apply(model.init(jax.random.key(0), (4,)), jax.numpy.ones((2, 4))).shape
    (2, 1)
    """
    return linear(num_outputs=1, mean=mean, std=std, scale=scale)


def mlp(
    *,
    widths: Sequence[int] = (100,),
    num_classes: int = 10,
    activation_fn: Activation = jax.nn.relu,
    dropout: Any = 0.0,
    mean: Any = 0.0,
    std: Any = 1.0,
) -> Model:
    """A multilayer perceptron.

    h_0 = (x - mean) / std flattened,  h_{l+1} = dropout(activation(h_l W_l + b_l)),  logits = h_L W + b

    Args:
      widths: the hidden layers' widths, the first nearest to the input.
      num_classes: outputs.
      activation_fn: the non-linearity. A smooth one (`jax.nn.softplus`, `jax.nn.tanh`) makes hypergradients smoother.
      dropout: the probability that a hidden unit is dropped in training (when a key is given).
      mean: subtracted from the inputs, a number or an array that broadcasts to a row.
      std: divides the inputs, likewise.

    Returns:
      A `Model`; params `{"layer0": ..., "head": ...}`; the features are the last hidden layer `[n, widths[-1]]`.

    >>> model = mlp(widths=(16, 8), num_classes=3)
    >>> params = model.init(jax.random.key(0), (5,))
    >>> sorted(params), model.features(params, jax.numpy.ones((2, 5))).shape
    (['head', 'layer0', 'layer1'], (2, 8))
    """
    widths = tuple(widths)
    if not widths:
        raise ValueError("widths: expected at least one hidden layer; without any, take softmax_regression.")
    for width in widths:
        checks.count("widths", width, 1)
    checks.count("num_classes", num_classes, 1)
    check_rate(dropout)
    normalise = _model.normaliser(mean, std)

    def body(shape: tuple[int, ...]) -> tuple[dict, int]:
        return hidden_leaves(math.prod(shape), widths), widths[-1]

    def features(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return hidden(params, _model.flatten(normalise(x)), key, len(widths), activation_fn, dropout)

    return _model.with_head(body, features, num_classes)


def check_rate(rate: Any, name: str = "dropout") -> None:
    """A dropout rate lies in [0, 1)."""
    checks.between(name, rate, 0, 1)
    if checks.is_concrete(rate) and rate >= 1:
        raise ValueError(f"{name}: expected less than 1, got {rate}.")


def hidden_leaves(fan_in: int, widths: Sequence[int]) -> dict:
    """Dense layers `layer0`, `layer1`, ..., of He's variance 2 / fan_in."""
    sizes = (fan_in, *widths)
    return {f"layer{i}": _model.dense_leaves(sizes[i], sizes[i + 1], gain=2.0) for i in range(len(widths))}


def hidden(
    params: Params, h: jax.Array, key: jax.Array | None, depth: int, activation_fn: Callable, rate: Any
) -> jax.Array:
    """The hidden layers of `hidden_leaves`, each followed by its activation and dropout."""
    for i in range(depth):
        h = activation_fn(_model.dense(params[f"layer{i}"], h))
        h = _model.dropout(_model.layer_key(key, i), h, rate)
    return h
