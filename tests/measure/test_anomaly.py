"""The anomaly index by hand, and a calibrated threshold's promise by leaving each score out in turn."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import measure


def test_the_index_by_hand():
    # median 64, deviations 48, 4, 0, 6, 16 -> their median 6
    values = jnp.array([16.0, 60.0, 64.0, 70.0, 80.0])
    expected = np.array([48, 4, 0, -6, -16]) / (1.4826 * 6)
    np.testing.assert_allclose(measure.anomaly_index(values), expected, rtol=1e-6)
    np.testing.assert_allclose(measure.anomaly_index(3 * values + 5), expected, rtol=1e-5)
    np.testing.assert_allclose(measure.anomaly_index(jnp.stack([values, 80 - values]))[1], -expected, rtol=1e-6)


def test_it_estimates_a_gaussians_standard_deviation():
    values = np.random.default_rng(0).normal(7, 3, size=20001).astype(np.float32)
    np.testing.assert_allclose(measure.anomaly_index(jnp.asarray(values)).std(), 1, atol=0.03)


def test_where_most_agree_the_rest_is_infinitely_far():
    index = measure.anomaly_index(jnp.array([2.0, 2.0, 2.0, 1.0, 3.0]))
    assert index.tolist() == [0, 0, 0, math.inf, -math.inf]


@pytest.mark.parametrize("n", [18, 19, 20, 39, 50])
def test_the_threshold_keeps_its_promise_for_every_score_left_out(n):
    """Exchangeability by enumeration: each of n + 1 scores takes its turn as the next one."""
    scores = np.random.default_rng(n).normal(size=n + 1)
    alarms = [scores[i] > measure.calibrate_threshold(np.delete(scores, i), false_alarms=0.05) for i in range(n + 1)]
    assert np.mean(alarms) == math.floor((n + 1) * 0.05) / (n + 1)


def test_too_few_clean_scores_promise_nothing_and_nonsense_is_refused():
    assert measure.calibrate_threshold(np.arange(18.0), false_alarms=0.05) == math.inf
    assert measure.calibrate_threshold(np.arange(19.0), false_alarms=0.05) == 18
    with pytest.raises(ValueError, match="with 1 NaN"):
        measure.calibrate_threshold(np.array([1.0, np.nan]), false_alarms=0.05)
    with pytest.raises(ValueError, match="false_alarms"):
        measure.calibrate_threshold(np.arange(3.0), false_alarms=1.0)


def test_counts_of_pixels_have_the_index_of_the_numbers():
    values = jnp.array([1, 9, 10, 11, 12])
    np.testing.assert_allclose(measure.anomaly_index(values), measure.anomaly_index(values.astype(float)))
