"""Clopper-Pearson against SciPy's beta quantiles, and its coverage by summing the binomial."""

import numpy as np
import pytest
from scipy import stats

from mlsec_jax import measure


@pytest.mark.parametrize("n, confidence", [(1, 0.9), (7, 0.95), (300, 0.99), (300, 1 - 2e-8)])
def test_the_ends_are_scipys(n, confidence):
    s = np.arange(n + 1)
    low, high = measure.clopper_pearson(s, n, confidence=confidence)
    level = (1 - confidence) / 2
    np.testing.assert_allclose(low[1:], stats.beta.ppf(level, s[1:], n - s[1:] + 1), rtol=1e-9)
    np.testing.assert_allclose(high[:-1], stats.beta.isf(level, s[:-1] + 1, n - s[:-1]), rtol=1e-9)
    assert low[0] == 0 and high[-1] == 1 and (low < high).all()


def test_it_covers_what_it_says():
    low, high = measure.clopper_pearson(np.arange(13), 12, confidence=0.9)
    for p in np.linspace(0.01, 0.99, 50):
        inside = (low <= p) & (p <= high)
        assert stats.binom.pmf(np.arange(13), 12, p)[inside].sum() >= 0.9 - 1e-12


def test_shapes_and_bad_input():
    low, _ = measure.clopper_pearson(np.array([[0, 3], [2, 4]]), 4)
    assert low.shape == (2, 2) and low[0, 0] == 0
    with pytest.raises(ValueError, match="successes"):
        measure.clopper_pearson([5], 4)
    with pytest.raises(ValueError, match="confidence"):
        measure.clopper_pearson([1], 4, confidence=1.0)
