"""Smoothing over random labels: linear least squares that r flipped labels cannot change (Rosenfeld et al., ICML 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, losses
from mlsec_jax.base import Data, Info, Key, Params, Trainer

PredictFn = Callable[[Params, Any], tuple[jax.Array, Info]]


class Smoothed(NamedTuple):
    """What predictions are made of: `α_i(x) = share_i + rows_i · (x - mean)`, and the labels.

    Attributes:
      rows: `[n, d]`.
      share: `[n]`, the weights over their sum.
      mean: `[d]`.
      y: `[n]`.
    """

    rows: jax.Array
    share: jax.Array
    mean: jax.Array
    y: jax.Array


def label_flip_smoothing(
    *, flip_rate: Any, l2: Any, num_classes: int, num_steps: int = 12
) -> tuple[Trainer, PredictFn]:
    """Least squares on one-hot labels, averaged over labels flipped at random; the average is computed, not sampled.

    A prediction of least squares is linear in the labels: `s_c(x) = Σ_i α_i(x) [y_i = c]`, and the class is the largest
    score's. Each label is replaced, with probability q, by one of the K - 1 others; the smoothed classifier says what is
    said most often. Chernoff bounds how often a rival c' beats c, for every t > 0:

        P(s_c' ≥ s_c) ≤ exp h(t),  h(t) = Σ_i log(A_i e^{-t α_i} + B_i e^{t α_i} + 1 - A_i - B_i)

    `A_i = 1 - q` where `y_i = c`, else `q/(K-1)`; `B_i` likewise of c'; h is convex. Then `p_1 = 1 - Σ_c' exp h` and
    `p_2 = max_c' exp h`, and no r flipped labels change the prediction if

        r (1 - q - q/(K-1)) log((1-q)(K-1)/q) < -log(1 - p_1 - p_2 + 2 sqrt(p_1 p_2))

    For two classes that is the paper's `r ≤ -½ log(4 p (1 - p)) / ((1 - 2q) log((1-q)/q))`.

    Threat: changes - labels of training rows; sees - everything; budget - the radius for each prediction; assumes - inputs
    (features) that owe nothing to the labels.

    Args:
      flip_rate: q in (0, (K-1)/K).
      l2: λ > 0 of the ridge penalty, on the scale of the mean loss; the intercept is free.
      num_classes: K ≥ 2, static.
      num_steps: of Newton's method in t, static. Any t gives a bound that holds; more steps make it tighter.

    Returns:
      `(trainer, predict_fn)`. The trainer solves in closed form, whatever the key and the starting parameters, and gives a
      `Smoothed`; info: `objective`, the mean squared error `½ Σ_c (s_c - [y = c])²` of the fit and its penalty.
      `predict_fn(params, x) -> (label [m], info)` with `radius [m]`, -1 where p_1 ≤ p_2 (abstention), and
      `log_error [m]`, `log(1 - p_1)`, at most 0.

    Edge cases: rows of weight 0 have α = 0. Float32 bounds err by the rounding of sums over n rows.

    References: Rosenfeld, Winston, Ravikumar & Kolter, ICML 2020, eq. (6) and theorem 1, and their appendix on several
      classes. Deviates from the paper in: a free intercept (`Σ α_i = 1`, so that the threshold ½ and the largest of two scores
      agree); for K > 2 a union bound over rivals.
    """
    checks.count("num_classes", num_classes, 2)
    checks.count("num_steps", num_steps, 1)
    checks.above("l2", l2, 0)
    checks.above("flip_rate", flip_rate, 0)
    if checks.is_concrete(flip_rate) and not flip_rate < (num_classes - 1) / num_classes:
        raise ValueError(f"flip_rate: expected less than {(num_classes - 1) / num_classes}, got {flip_rate}.")

    def fit(key: Key, params: Params, data: Data) -> tuple[Smoothed, Info]:
        del key, params
        checks.labels("data.y", data.y, data.weight, num_classes)
        x = losses.present(data).x
        x = x.reshape(x.shape[0], -1).astype(np.promote_types(x.dtype, np.float32))
        weight = data.weight.astype(x.dtype)
        share = weight / jnp.maximum(jnp.sum(weight), jnp.finfo(x.dtype).tiny)
        mean = share @ x
        centred = x - mean[None]
        lam = jnp.asarray(l2, x.dtype)
        system = centred.T @ (share[:, None] * centred) + lam * jnp.eye(x.shape[1], dtype=x.dtype)
        rows = share[:, None] * jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system), centred.T).T
        hot = jax.nn.one_hot(data.y, num_classes, dtype=x.dtype)
        slopes = rows.T @ hot
        residual = (share @ hot)[None] + centred @ slopes - hot
        value = jnp.sum(share[:, None] * jnp.square(residual)) / 2 + lam / 2 * jnp.sum(jnp.square(slopes))
        return Smoothed(rows, share, mean, data.y), {"objective": value}

    def predict(params: Smoothed, x: Any) -> tuple[jax.Array, Info]:
        q = jnp.asarray(flip_rate, params.rows.dtype)
        classes = jnp.arange(num_classes, dtype=params.y.dtype)

        def one(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            alpha = params.share + params.rows @ (x - params.mean)
            hot = params.y[None] == classes[:, None]
            label = jnp.argmax(hot.astype(alpha.dtype) @ alpha).astype(jnp.int32)
            log_p = jax.vmap(lambda rival: _chernoff(alpha, hot[label], rival, q, num_classes, num_steps))(hot)
            log_p = jnp.where(jnp.arange(num_classes, dtype=jnp.int32) == label, -jnp.inf, log_p)
            log_error = jnp.minimum(jax.nn.logsumexp(log_p), 0)
            return label, _radius(log_p, log_error, q, num_classes), log_error

        label, radius, log_error = jax.lax.map(one, x.reshape(x.shape[0], -1).astype(params.rows.dtype))
        return label, {"radius": radius, "log_error": log_error}

    return Trainer(fit), predict


def _chernoff(alpha: jax.Array, own: jax.Array, rival: jax.Array, q: jax.Array, num_classes: int, num_steps: int) -> jax.Array:
    """The least `h(t)` on the way of Newton's method on `[0, ∞)`: an upper bound of `log P(s_rival ≥ s_own)`, at most 0."""
    share = q / (num_classes - 1)
    to_own, to_rival = jnp.where(own, 1 - q, share), jnp.where(rival, 1 - q, share)
    neither = jnp.maximum(1 - to_own - to_rival, 0)

    def h(t: jax.Array) -> jax.Array:
        u = t * alpha
        most = jax.lax.stop_gradient(jnp.abs(u))
        inside = to_own * jnp.exp(-u - most) + to_rival * jnp.exp(u - most) + neither * jnp.exp(-most)
        return jnp.sum(jnp.log(inside) + most)

    def slopes(t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        (value, first), (_, second) = jax.jvp(jax.value_and_grad(h), (t,), (jnp.ones_like(t),))
        return value, first, jnp.maximum(second, jnp.finfo(t.dtype).tiny)

    def step(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        t, best = state
        value, first, second = slopes(t)
        return (jnp.clip(t - first / second, t / 4, 4 * t), jnp.minimum(best, value)), None

    _, first, second = slopes(jnp.zeros((), alpha.dtype))
    start = jnp.maximum(-first / second, 0)  # zero stays zero: a rival that leads on average has no bound
    (_, best), _ = jax.lax.scan(step, (start, jnp.zeros((), alpha.dtype)), None, length=num_steps)
    return best


def _radius(log_p: jax.Array, log_error: jax.Array, q: jax.Array, num_classes: int) -> jax.Array:
    """How many flips leave `p_1 > p_2`; in logarithms throughout, for probabilities of 1e-100 count."""
    log_second = jnp.max(log_p)
    rest = jax.nn.logsumexp(jnp.where(jnp.arange(num_classes) == jnp.argmax(log_p), -jnp.inf, log_p))
    log_first = jnp.log(-jnp.expm1(log_error))
    distance = -jnp.logaddexp(rest, math.log(2) + (log_first + log_second) / 2)
    each = (1 - q - q / (num_classes - 1)) * (jnp.log((1 - q) / q) + math.log(num_classes - 1))
    flips = jnp.ceil(distance / each * (1 - 32 * jnp.finfo(q.dtype).eps)) - 1
    return jnp.where(log_first > log_second, jnp.maximum(flips, 0), -1).astype(jnp.int32)
