"""Is one thing better than the other on the same cases? Exact tests, counted in whole numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from mlsec_jax import checks


class PairedTest(NamedTuple):
    """Cases where the first was larger, smaller, and equal; and how often chance alone does as much."""

    wins: int
    losses: int
    ties: int
    p_value: float


def sign_test(first: Any, second: Any, *, alternative: str = "two-sided") -> PairedTest:
    """Tests whether `first` exceeds `second` in as many cases as not, whatever their distribution.

    Ties are set aside. Under the hypothesis the wins are Binomial(wins + losses, 1/2).

    Args:
      first: `[m]` figures, one a seed.
      second: `[m]`, of the same seeds.
      alternative: `"two-sided"`, or `"greater"`: first tends to be larger.

    Returns:
      `PairedTest`; without a win or a loss the p-value is 1.

    >>> sign_test([2, 3, 4, 5, 6], [1, 1, 1, 1, 1]).p_value
    0.0625
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"first and second: expected the same shape [m], got {first.shape} and {second.shape}.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("first and second: expected finite values, got NaN or infinity.")
    wins, losses = int(np.sum(first > second)), int(np.sum(first < second))
    return PairedTest(wins, losses, first.size - wins - losses, _binomial(wins, losses, alternative))


def mcnemar(first_correct: Any, second_correct: Any, *, alternative: str = "two-sided") -> PairedTest:
    """McNemar's exact test: do two models err equally often on the same rows?

    Only the rows count that one gets right and the other wrong; under the hypothesis they split evenly.

    Args:
      first_correct: boolean `[n]`.
      second_correct: boolean `[n]`, of the same rows.
      alternative: `"two-sided"`, or `"greater"`: the first is right more often.

    Returns:
      `PairedTest`: wins are the rows that only the first gets right.

    Reference: Q. McNemar, Psychometrika 12, 1947 (his statistic's exact, binomial form).

    >>> mcnemar([True, True, False], [False, True, False]).wins
    1
    """
    first, second = np.asarray(first_correct), np.asarray(second_correct)
    if first.dtype != bool or second.dtype != bool:
        raise ValueError(f"first_correct and second_correct: expected booleans, got {first.dtype} and {second.dtype}.")
    return sign_test(first.astype(int), second.astype(int), alternative=alternative)


def _binomial(wins: int, losses: int, alternative: str) -> float:
    """P(as extreme | each of wins + losses is a fair coin), from exact integers."""
    checks.one_of("alternative", alternative, ("two-sided", "greater"))
    n = wins + losses
    tail = lambda most: sum(math.comb(n, k) for k in range(most + 1))  # 2ⁿ P(at most so many)
    if alternative == "greater":
        return tail(losses) / 2**n
    return min(1.0, 2 * tail(min(wins, losses)) / 2**n)
