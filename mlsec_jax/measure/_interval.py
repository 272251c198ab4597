"""How sure a number is: intervals for a share, and for a mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks


class Interval(NamedTuple):
    """A mean over seeds, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def wilson(
    successes: jax.Array | float, trials: jax.Array | float, *, confidence: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Wilson's score interval for a share: the p with |p̂ - p| ≤ z sqrt(p (1 - p) / n).

        (p̂ + z²/2n ± z sqrt(p̂ (1 - p̂)/n + z²/4n²)) / (1 + z²/n)

    Args:
      successes: counts, any shape.
      trials: counts `n`, the same shape; 0 gives [0, 1].
      confidence: in (0, 1), static.

    Returns:
      `(low, high)`, floating, within [0, 1].

    Reference: E. B. Wilson, JASA 22, 1927.

    >>> low, high = wilson(9, 10)
    >>> round(float(low), 3), round(float(high), 3)
    (0.596, 0.982)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected between 0 and 1, got {confidence}.")
    if checks.is_concrete((successes, trials)) and np.any((np.asarray(successes) < 0) | (np.asarray(successes) > trials)):
        raise ValueError(f"successes: expected from 0 to {trials} trials, got {successes}.")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    hits, n = jnp.asarray(successes).astype(float), jnp.asarray(trials).astype(float)
    # Both sides times n, so that n = 0 needs no case of its own.
    spread = z * jnp.sqrt(hits * (n - hits) / jnp.maximum(n, 1) + z**2 / 4)
    centre, scale = hits + z**2 / 2, n + z**2
    low = jnp.where(hits == 0, 0.0, (centre - spread) / scale)
    high = jnp.where(hits == n, 1.0, (centre + spread) / scale)
    return low, high


def clopper_pearson(
    successes: Sequence[int] | np.ndarray, trials: int, *, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Clopper and Pearson's exact interval for a share: never covers less often than it says.

    `low` is the p with `P(Bin(n, p) ≥ s) = (1 - confidence) / 2`, `high` the one with `P(Bin(n, p) ≤ s)` the same. Each
    end alone is a one-sided bound at level `(1 - confidence) / 2`.

    Args:
      successes: counts, any shape, on the host.
      trials: n, at least 1.
      confidence: in (0, 1).

    Returns:
      `(low, high)`, float64, of the shape of `successes`; rounding aside, on the safe side.

    Reference: C. J. Clopper & E. S. Pearson, Biometrika 26, 1934.

    >>> low, high = clopper_pearson([9], 10)
    >>> round(float(low[0]), 3), round(float(high[0]), 3)
    (0.555, 0.997)
    """
    hits = np.asarray(successes)
    if trials < 1 or hits.dtype.kind not in "iu" or np.any((hits < 0) | (hits > trials)):
        raise ValueError(f"successes: expected integers from 0 to {trials} of at least 1 trial, got {successes}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected between 0 and 1, got {confidence}.")
    level = (1 - confidence) / 2
    counts, place = np.unique(np.concatenate([hits.ravel(), trials - hits.ravel()]), return_inverse=True)
    logs = np.array([math.lgamma(trials + 1) - math.lgamma(j + 1) - math.lgamma(trials - j + 1) for j in range(trials + 1)])
    j = np.arange(trials + 1)
    low, high = np.zeros(counts.size), np.ones(counts.size)
    for _ in range(100):
        p = np.where(counts == 0, 0.5, (low + high) / 2)[:, None]
        mass = np.exp(logs + j * np.log(p) + (trials - j) * np.log1p(-p))
        below = np.sum(np.where(j >= counts[:, None], mass, 0), axis=1) < level
        low, high = np.where(below, p[:, 0], low), np.where(below, high, p[:, 0])
    ends = np.where(counts == 0, 0, low)[place]
    return ends[: hits.size].reshape(hits.shape), 1 - ends[hits.size :].reshape(hits.shape)


def mean_interval(values: Sequence[float] | np.ndarray | jax.Array, *, confidence: float = 0.95) -> Interval:
    """The mean over seeds with Student's interval: mean ± t_{m-1} s / sqrt(m).

    Args:
      values: `[m]`, one figure a seed.
      confidence: in (0, 1).

    Returns:
      `Interval` of floats. A single seed says nothing about the spread: its interval is (-inf, inf).

    >>> [round(value, 3) for value in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values: expected one figure a seed, [m], got shape {array.shape}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected between 0 and 1, got {confidence}.")
    if not np.isfinite(array).all():
        raise ValueError(f"values: expected finite figures, got {array.tolist()}.")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, -math.inf, math.inf)
    half = _student_quantile(confidence, array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half)


def _student_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| ≤ t) = confidence, by bisection on the angle atan(t / sqrt(freedom))."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_mass(middle, freedom) < confidence else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _student_mass(angle: float, freedom: int) -> float:
    """P(|T| ≤ tan(angle) sqrt(freedom)): a finite series for whole degrees (Abramowitz & Stegun 26.7.3-4)."""
    odd = freedom % 2
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
