"""Which of a few numbers is an outlier below the rest, and how far is far enough."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def anomaly_index(values: jax.Array) -> jax.Array:
    """How many robust standard deviations each value lies **below** the median: `(med - v) / (1.4826 · med |v - med|)`.

    One-sided: large and positive is suspicious, for small is (the size of a label's trigger); negative is above the
    median. A model's index is the largest of its labels'. Of ten labels the estimate is coarse: calibrate the threshold
    on clean models (`calibrate_threshold`), 2 is the published one.

    Args:
      values: `[..., k]`, one a label.

    Returns:
      `[..., k]`. Where the deviation is 0 (more than half of the values agree), 0 for those that agree, else ±infinity.

    References: Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV.C.

    >>> [round(v, 2) for v in anomaly_index(jnp.array([1.0, 9.0, 10.0, 11.0, 12.0])).tolist()]
    [6.07, 0.67, 0.0, -0.67, -1.35]
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.result_type(float))  # such as counts of pixels
    below = jnp.median(values, axis=-1, keepdims=True) - values
    deviation = jnp.asarray(1.4826, values.dtype) * jnp.median(jnp.abs(below), axis=-1, keepdims=True)
    return jnp.where(below == 0, 0, below / deviation)


def calibrate_threshold(clean: jax.Array, *, false_alarms: float) -> float:
    """The threshold that a further clean score exceeds with probability at most `false_alarms`.

    The `⌈(n + 1)(1 - α)⌉`-th smallest of n clean scores: if they and the next are exchangeable, `P(score > threshold) ≤ α`,
    whatever their distribution. Infinite where n is too small to promise it, below `1/α - 1` (19 for 5 %).

    Args:
      clean: `[n]` scores of clean models (or rows) that are used for nothing else; higher = more suspicious.
      false_alarms: α in (0, 1).

    Returns:
      The threshold; flag what is *more* than it.

    References: Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005 (inductive conformal prediction).

    >>> calibrate_threshold(jnp.arange(39.0), false_alarms=0.05)
    37.0
    """
    scores = np.sort(np.asarray(clean))
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(f"clean: expected numbers [n], got shape {scores.shape} with {np.isnan(scores).sum()} NaN.")
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms: expected between 0 and 1, got {false_alarms}.")
    rank = math.ceil((len(scores) + 1) * (1 - false_alarms) - 1e-9)
    return float(scores[rank - 1]) if rank <= len(scores) else math.inf
