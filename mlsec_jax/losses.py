"""Per-example losses, the weighted empirical loss, and the objectives and goals made of them.

A `loss_fn` is `(params, data, key=None) -> [n]`. Constructors here wrap an `apply_fn` `(params, x, key=None)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, tree
from mlsec_jax.base import ApplyFn, Data, LossFn, OuterFn, Params


def soft_labels(y: jax.Array, num_classes: int, dtype: Any = None) -> jax.Array:
    """Labels as distributions `[n, c]`; soft labels come back as they are."""
    return jax.nn.one_hot(y, num_classes, dtype=dtype) if jnp.issubdtype(y.dtype, jnp.integer) else y


def cross_entropy(apply_fn: ApplyFn) -> LossFn:
    """Softmax cross-entropy `-Σ_c y_c log softmax(f(x))_c`; labels integer `[n]` or soft `[n, c]`.

    An integer label outside `[0, c)` raises where it can be seen; traced, it costs NaN and so do the derivatives, never 0.

    >>> zero = lambda params, x, key=None: jnp.zeros((x.shape[0], 2))
    >>> from mlsec_jax.base import dataset
    >>> round(float(cross_entropy(zero)(None, dataset(jnp.ones((1, 3)), jnp.array([1])))[0]), 4)
    0.6931
    """

    def loss_fn(params: Params, data: Data, key: jax.Array | None = None) -> jax.Array:
        logits = apply_fn(params, data.x, key)
        if logits.ndim != 2 or data.y.ndim > 2 or (data.y.ndim == 2 and data.y.shape != logits.shape):
            raise ValueError(f"apply_fn: expected logits [n, c] for labels [n] or [n, c], got {logits.shape}, {data.y.shape}.")
        if data.y.ndim == 1 and not jnp.issubdtype(data.y.dtype, jnp.integer):
            raise ValueError(f"data.y: expected integer labels [n] or soft ones [n, c], got {data.y.dtype}{data.y.shape}.")
        log_p = jax.nn.log_softmax(logits)
        target = _indicator(data, log_p) if data.y.ndim == 1 else data.y.astype(log_p.dtype)
        return -jnp.sum(log_p * target, axis=-1)

    return loss_fn


def _indicator(data: Data, logits: jax.Array) -> jax.Array:
    """Integer labels as `[n, c]`, like the logits; NaN, and so is every derivative, for a present row of a label outside."""
    num_classes = logits.shape[-1]
    checks.labels("data.y", data.y, data.weight, num_classes)
    fine = (data.weight <= 0) | ((data.y >= 0) & (data.y < num_classes))
    return jnp.where(fine[:, None], jax.nn.one_hot(data.y, num_classes, dtype=logits.dtype), jnp.nan)


def _signed(apply_fn: ApplyFn, params: Params, data: Data, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """One real output a row, and its label in {-1, +1} (from {0, 1} or {-1, +1}; others raise, or are NaN if traced)."""
    out = apply_fn(params, data.x, key)
    out = out.reshape(out.shape[0])
    checks.binary("data.y", data.y, data.weight)
    fine = (data.weight <= 0) | (jnp.abs(data.y) == 1) | (data.y == 0)
    return out, jnp.where(fine, jnp.where(data.y > 0, 1, -1).astype(out.dtype), jnp.nan)


def logistic(apply_fn: ApplyFn) -> LossFn:
    """`log(1 + exp(-s f(x)))` of a single output, `s = ±1` the sign of a binary label."""

    def loss_fn(params: Params, data: Data, key: jax.Array | None = None) -> jax.Array:
        out, sign = _signed(apply_fn, params, data, key)
        return jax.nn.softplus(-sign * out)

    return loss_fn


def hinge(apply_fn: ApplyFn, temperature: Any = 0.0) -> LossFn:
    """`max(0, 1 - s f(x))`; a positive `temperature` t smooths it to `t log(1 + exp((1 - s f(x)) / t))`."""
    checks.at_least("temperature", temperature, 0)

    def loss_fn(params: Params, data: Data, key: jax.Array | None = None) -> jax.Array:
        out, sign = _signed(apply_fn, params, data, key)
        gap = 1 - sign * out
        if checks.is_concrete(temperature) and not np.any(temperature):
            return jax.nn.relu(gap)
        return temperature * jax.nn.softplus(gap / temperature)

    return loss_fn


def squared(apply_fn: ApplyFn) -> LossFn:
    """`½ (f(x) - y)²` of a single output and a real label."""

    def loss_fn(params: Params, data: Data, key: jax.Array | None = None) -> jax.Array:
        out = apply_fn(params, data.x, key)
        out = out.reshape(out.shape[0])
        return jnp.square(out - data.y.astype(out.dtype)) / 2

    return loss_fn


def margin(apply_fn: ApplyFn, floor: float = -100.0) -> LossFn:
    """Carlini-Wagner margin `max(max_{c≠y} f_c - f_y, floor)` of integer labels: negative when the label is predicted."""

    def loss_fn(params: Params, data: Data, key: jax.Array | None = None) -> jax.Array:
        logits = apply_fn(params, data.x, key)
        checks.integer_labels("data.y", data.y)
        label = _indicator(data, logits)
        chosen = jnp.sum(logits * label, axis=-1)
        other = jnp.max(jnp.where(label > 0, -jnp.inf, logits), axis=-1)
        return jnp.maximum(other - chosen, floor)

    return loss_fn


def present(data: Data) -> Data:
    """The same data with the inputs and real labels of weight-0 rows replaced by zeros, so that a NaN there cannot leak."""
    keep = data.weight > 0
    seen = lambda leaf: jnp.where(tree.per_row(keep, leaf), leaf, jnp.zeros_like(leaf))
    return data._replace(x=jax.tree.map(seen, data.x), y=seen(data.y) if tree.is_float(data.y) else data.y)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """`Σ w v / Σ w` over the rows of positive weight; 0 if there is none.

    >>> float(weighted_mean(jnp.array([1.0, jnp.nan]), jnp.array([2.0, 0.0])))
    1.0
    """
    if values.shape != weight.shape:
        raise ValueError(f"values: expected one number a row, {weight.shape}, got shape {values.shape}.")
    if not tree.is_float(values):
        values = values.astype(jnp.result_type(weight.dtype, float) if tree.is_float(weight) else float)
    weight = weight.astype(values.dtype)
    total = jnp.sum(weight)
    summed = jnp.sum(jnp.where(weight > 0, values * weight, 0))
    return jnp.where(total > 0, summed / jnp.where(total > 0, total, 1), 0)


def empirical(loss_fn: LossFn) -> Callable[..., jax.Array]:
    """`(params, data, key=None) -> Σ w·ℓ / Σ w`, the loss that training minimises; weight 0 equals absence."""

    def mean_loss(params: Params, data: Data, key: jax.Array | None = None) -> jax.Array:
        return weighted_mean(loss_fn(params, present(data), key), data.weight)

    return mean_loss


class Objective(NamedTuple):
    """A regularised training objective, one object for the fit and for its derivative.

    `smooth(params, data) + l1 · Σ_{penalised} |params|`

    Attributes:
      smooth: `(params, data) -> scalar`, everything that has a gradient (the L2 penalty included).
      l1: weight of the non-smooth part; 0 when there is none.
      penalise: which leaves the penalties cover (see `tree.mask_of`).
    """

    smooth: Callable[[Params, Data], jax.Array]
    l1: Any = 0.0
    penalise: Any = None

    def value(self, params: Params, data: Data) -> jax.Array:
        """The whole objective, the L1 part included."""
        smooth = self.smooth(params, data)
        chosen, _ = tree.partition(params, self.penalise)
        size = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(chosen))
        return smooth + jnp.asarray(self.l1, smooth.dtype) * size


def not_bias(path: str, leaf: Any) -> bool:
    """Chooses every leaf but the biases (names ending in `b` or `bias`; Flax nnx puts `/value` behind them)."""
    del leaf
    return path.removesuffix("/value").rsplit("/", 1)[-1] not in ("b", "bias")


def regularised(loss_fn: LossFn, *, l2: Any = 0.0, l1: Any = 0.0, penalise: Any = not_bias) -> Objective:
    """The mean loss plus `l2/2 ‖θ‖² + l1 ‖θ‖₁` over the penalised leaves.

    Args:
      loss_fn: per-example loss `-> [n]`.
      l2: λ of the ridge penalty, at least 0, on the scale of the *mean* loss (scikit-learn's `C` is `1 / (n λ)`).
      l1: λ of the LASSO penalty, on the same scale. Elastic net: both.
      penalise: which leaves (`tree.mask_of`); default: all but the biases.
    """
    checks.at_least("l2", l2, 0)
    checks.at_least("l1", l1, 0)
    mean_loss = empirical(loss_fn)

    def smooth(params: Params, data: Data) -> jax.Array:
        chosen, _ = tree.partition(params, penalise)
        loss = mean_loss(params, data)
        return loss + (jnp.asarray(l2, loss.dtype) / 2) * tree.dot(chosen, chosen).astype(loss.dtype)

    return Objective(smooth, l1, penalise)


def summed(loss_fn: LossFn, *, C: Any, penalise: Any = not_bias) -> Objective:
    """`C Σ w·ℓ + ½ ‖θ‖²`, scikit-learn's objective: a row's pull doesn't depend on the other rows' weights.

    Args:
      loss_fn: per-example loss `-> [n]`.
      C: positive, the inverse of λ; `regularised` with `l2 = 1 / (C Σ w)` has the same optimum.
      penalise: which leaves ½ ‖θ‖² covers (`tree.mask_of`); None: all of them, as in liblinear.
    """
    checks.above("C", C, 0)

    def smooth(params: Params, data: Data) -> jax.Array:
        chosen, _ = tree.partition(params, penalise)
        values = loss_fn(params, present(data))
        weight = data.weight.astype(values.dtype)
        total = jnp.sum(jnp.where(weight > 0, values * weight, 0))
        return jnp.asarray(C, values.dtype) * total + tree.dot(chosen, chosen).astype(values.dtype) / 2

    return Objective(smooth, 0.0, penalise)


def goal_loss(loss_fn: LossFn) -> OuterFn:
    """The attacker's goal as a loss: the mean loss on `goal`, a `Data` with the labels that the attacker desires."""
    mean_loss = empirical(loss_fn)
    return lambda params, data, goal: mean_loss(params, goal)


def availability(loss_fn: LossFn) -> OuterFn:
    """Denial of service: the negative mean loss on `goal`, a `Data` with the true labels."""
    mean_loss = empirical(loss_fn)
    return lambda params, data, goal: -mean_loss(params, goal)
