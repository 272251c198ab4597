"""Error rates, attack success and their uncertainty, against scikit-learn, SciPy and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from mlsec_jax import base, measure

RNG = np.random.default_rng(0)
N, C = 60, 4
TRUE = RNG.integers(C, size=N)
LOGITS = RNG.normal(size=(N, C)).astype(np.float32)
WEIGHT = np.where(RNG.random(N) < 0.2, 0, RNG.random(N)).astype(np.float32)
ROWS = base.dataset(np.zeros((N, 1), np.float32), TRUE.astype(np.int32), WEIGHT)
PREDICTED = LOGITS.argmax(axis=1)


def test_rates_match_scikit_learn():
    kept = WEIGHT > 0
    assert float(measure.accuracy(LOGITS, ROWS)) == pytest.approx(
        sklearn.metrics.accuracy_score(TRUE, PREDICTED, sample_weight=WEIGHT), rel=1e-5
    )
    assert float(measure.error(PREDICTED, ROWS)) == pytest.approx(1 - float(measure.accuracy(LOGITS, ROWS)), abs=1e-6)
    counts = sklearn.metrics.confusion_matrix(TRUE, PREDICTED, sample_weight=WEIGHT)
    np.testing.assert_allclose(measure.confusion(LOGITS, ROWS, C), counts, rtol=1e-5)
    recall = sklearn.metrics.recall_score(TRUE[kept], PREDICTED[kept], average=None, sample_weight=WEIGHT[kept])
    np.testing.assert_allclose(measure.per_class_error(LOGITS, ROWS, C), 1 - recall, rtol=1e-5)
    np.testing.assert_allclose([measure.error_on(LOGITS, ROWS, c) for c in range(C)], 1 - recall, rtol=1e-5)
    chosen = np.isin(TRUE, [1, 3])
    expected = np.average(TRUE[chosen] != PREDICTED[chosen], weights=WEIGHT[chosen])
    assert float(measure.error_on(PREDICTED, ROWS, (1, 3))) == pytest.approx(expected, rel=1e-5)


def test_weight_zero_is_absence_and_jit_is_eager():
    kept = WEIGHT > 0
    fewer = jax.tree.map(lambda leaf: leaf[kept], ROWS)
    spoiled = ROWS._replace(y=jnp.where(kept, ROWS.y, 99))
    for rate in (measure.accuracy, measure.error, lambda p, d: measure.confusion(p, d, C)):
        np.testing.assert_allclose(rate(PREDICTED, spoiled), rate(PREDICTED[kept], fewer), rtol=1e-6)
        np.testing.assert_array_equal(jax.jit(rate)(PREDICTED, spoiled), rate(PREDICTED, spoiled))


def test_soft_labels_and_absent_class():
    soft = ROWS._replace(y=jax.nn.one_hot(ROWS.y, C))
    assert float(measure.accuracy(LOGITS, soft)) == float(measure.accuracy(LOGITS, ROWS))
    assert math.isnan(float(measure.per_class_error(PREDICTED, ROWS, C + 1)[C]))
    assert math.isnan(float(measure.error_on(PREDICTED, ROWS, C)))


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match=r"data\.y: expected between 0 and 2"):
        measure.confusion(PREDICTED, ROWS, 3)
    with pytest.raises(ValueError, match="predicted: expected integer"):
        measure.accuracy(PREDICTED.astype(float), ROWS)
    with pytest.raises(ValueError, match="as many rows"):
        measure.accuracy(PREDICTED[:-1], ROWS)


def test_attack_success_counts_eligible_rows_only():
    rows = base.dataset(jnp.zeros((6, 1)), jnp.array([8, 8, 8, 3, 8, 1]), jnp.array([1.0, 2.0, 0.0, 1.0, 1.0, 1.0]))
    predicted = jnp.array([3, 8, 3, 3, 3, 3])
    got = measure.attack_success(predicted, rows, 3)  # row 2 is absent, row 3 is a 3 already
    assert (int(got.successes), int(got.trials), float(got.rate)) == (3, 4, 0.75)
    got = measure.attack_success(predicted, rows, 3, eligible=rows.y == 8)
    assert (int(got.successes), int(got.trials)) == (2, 3)
    interval = scipy.stats.binomtest(2, 3).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose([got.low, got.high], [interval.low, interval.high], rtol=1e-5)
    got = measure.attack_success(predicted, rows, jnp.array([8, 3, 3, 3, 3, 3]))  # a label for each; row 0 is an 8
    assert (int(got.successes), int(got.trials)) == (2, 3)
    none = measure.attack_success(predicted, rows, 3, eligible=jnp.zeros(6, bool))
    assert math.isnan(float(none.rate)) and (float(none.low), float(none.high)) == (0, 1)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_matches_scipy(confidence):
    hits, trials = np.meshgrid([0, 1, 5, 40], [40, 100, 1000])
    low, high = jax.jit(lambda h, n: measure.wilson(h, n, confidence=confidence))(hits, trials)
    for i in np.ndindex(hits.shape):
        ci = scipy.stats.binomtest(int(hits[i]), int(trials[i])).proportion_ci(confidence, "wilson")
        np.testing.assert_allclose([low[i], high[i]], [ci.low, ci.high], atol=2e-6)
    with pytest.raises(ValueError, match="confidence"):
        measure.wilson(1, 2, confidence=95)


@pytest.mark.parametrize("m", [2, 3, 4, 5, 10, 11, 101])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_mean_interval_is_students(m, confidence):
    values = RNG.normal(size=m)
    got = measure.mean_interval(values, confidence=confidence)
    expected = scipy.stats.t.interval(confidence, m - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    np.testing.assert_allclose([got.low, got.high], expected, rtol=1e-9)
    assert got.mean == pytest.approx(values.mean())


def test_mean_interval_edges():
    assert measure.mean_interval([0.3]) == (0.3, -math.inf, math.inf)
    assert measure.mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    for bad in ([], [[1.0]], [1.0, math.nan]):
        with pytest.raises(ValueError, match="values: expected"):
            measure.mean_interval(bad)


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_paired_tests_match_scipys_binomial(alternative):
    first, second = RNG.integers(5, size=(2, 40))
    got = measure.sign_test(first, second, alternative=alternative)
    assert got[:3] == ((first > second).sum(), (first < second).sum(), (first == second).sum())
    oracle = scipy.stats.binomtest(got.wins, got.wins + got.losses, alternative=alternative)
    assert got.p_value == pytest.approx(oracle.pvalue, rel=1e-12)
    a, b = RNG.random((2, 5000)) < np.array([[0.7], [0.68]])
    got = measure.mcnemar(a, b, alternative=alternative)
    oracle = scipy.stats.binomtest(int((a & ~b).sum()), int((a != b).sum()), alternative=alternative)
    assert got.p_value == pytest.approx(oracle.pvalue, rel=1e-9)


def test_paired_edges():
    assert measure.sign_test([1, 2], [1, 2]) == (0, 0, 2, 1.0)
    assert measure.sign_test(range(9), [-1] * 9, alternative="greater").p_value == 1 / 512
    with pytest.raises(ValueError, match="finite"):
        measure.sign_test([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="booleans"):
        measure.mcnemar([1, 0], [0, 1])
    with pytest.raises(ValueError, match="alternative: expected one of"):
        measure.sign_test([1], [2], alternative="less")


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int32])
def test_a_row_of_nan_is_missing_from_no_count_whatever_the_labels_dtype(dtype):
    data = base.dataset(jnp.zeros((4, 1)), jnp.array([0, 0, 1, 1], dtype))
    logits = jnp.eye(2)[jnp.array([0, 0, 1, 1])].at[1].set(jnp.nan)
    counts = jax.jit(lambda logits: measure.confusion(logits, data, 2))(logits)
    assert np.isnan(counts[0]).any() and counts[1].tolist() == [0, 2]
    assert measure.error(logits, data) == 0.25
    with pytest.raises(ValueError, match="predicted: expected between 0 and 1"):
        measure.confusion(logits, data, 2)
