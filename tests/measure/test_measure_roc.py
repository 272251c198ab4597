"""ROC curves against scikit-learn, ties, weights and absent rows included; transfer measures against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from mlsec_jax import base, measure

RNG = np.random.default_rng(1)
curve_of = jax.jit(measure.roc)


def draw(n=80, ties=True):
    scores = RNG.normal(size=n).astype(np.float32)
    positive = RNG.random(n) < 1 / (1 + np.exp(-scores))
    weight = np.where(RNG.random(n) < 0.2, 0, RNG.random(n) + 0.1).astype(np.float32)
    return (np.round(scores * 2) / 2 if ties else scores), positive, weight


@pytest.mark.parametrize("ties", [False, True])
def test_roc_and_auc_match_scikit_learn(ties):
    scores, positive, weight = draw(ties=ties)
    curve = curve_of(scores, positive, weight)
    kept = weight > 0
    fpr, tpr, _ = sklearn.metrics.roc_curve(
        positive[kept], scores[kept], sample_weight=weight[kept], drop_intermediate=False
    )
    ours = np.unique(np.round(np.stack([curve.fpr, curve.tpr], axis=1), 5), axis=0)
    theirs = np.unique(np.round(np.stack([fpr, tpr], axis=1), 5), axis=0)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    expected = sklearn.metrics.roc_auc_score(positive[kept], scores[kept], sample_weight=weight[kept])
    assert float(measure.auc(curve)) == pytest.approx(expected, abs=1e-5)
    for most in (0.0, 0.01, 0.1, 0.5, 1.0):
        assert float(measure.tpr_at_fpr(curve, most)) == pytest.approx(tpr[fpr <= most].max(), abs=1e-5)


def test_all_tied_scores_say_nothing():
    curve = measure.roc(jnp.ones(6), jnp.array([1, 1, 1, 0, 0, 0]))
    assert float(measure.auc(curve)) == pytest.approx(0.5)
    assert float(measure.tpr_at_fpr(curve, 0.5)) == 0.0  # no threshold reaches it, whatever the order of the rows


def test_thresholds_give_the_rates_they_stand_for():
    scores, positive, weight = draw()
    curve = curve_of(scores, positive, weight)
    for t, rate in zip(np.asarray(curve.thresholds), np.asarray(curve.tpr)):
        assert rate == pytest.approx(weight[positive & (scores >= t)].sum() / weight[positive].sum(), abs=1e-5)


def test_absent_rows_are_not_read_and_present_nans_show():
    scores, positive, weight = draw()
    spoiled = np.where(weight == 0, np.nan, scores)
    for a, b in zip(curve_of(spoiled, positive, weight), curve_of(scores, positive, weight)):
        np.testing.assert_array_equal(a, b)
    spoiled = np.where(np.arange(80) == np.flatnonzero(weight)[0], np.nan, scores).astype(np.float32)
    curve = curve_of(spoiled, positive, weight)
    assert math.isnan(float(measure.auc(curve))) and math.isnan(float(measure.tpr_at_fpr(curve, 0.1)))
    curve = curve_of(scores, np.ones(80, bool), weight)
    assert math.isnan(float(measure.auc(curve))) and math.isnan(float(measure.tpr_at_fpr(curve, 0.1)))


def test_integer_scores_and_shapes():
    curve = measure.roc(jnp.array([3, 2, 1]), jnp.array([True, False, True]))
    assert float(measure.auc(curve)) == 0.5
    with pytest.raises(ValueError, match="one shape"):
        measure.roc(jnp.ones(3), jnp.ones(2))


def linear_loss(params, data, key=None):
    """ℓ = ½ (x·w - y)²: the input gradient is (x·w - y) w."""
    del key
    return 0.5 * (data.x["a"] @ params["w"] + data.x["b"][:, 0] * params["v"] - data.y) ** 2


ROWS = base.dataset(
    {"a": RNG.normal(size=(7, 3)).astype(np.float32), "b": RNG.normal(size=(7, 1)).astype(np.float32)},
    RNG.normal(size=7).astype(np.float32),
    np.array([1, 2, 0, 1, 0.5, 1, 1], np.float32),
)
PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "v": jnp.asarray(3.0)}


@pytest.mark.parametrize("norm", [1, 2, jnp.inf])
def test_input_gradient_size_of_a_linear_model(norm):
    residual = ROWS.x["a"] @ PARAMS["w"] + ROWS.x["b"][:, 0] * PARAMS["v"] - ROWS.y
    slope = np.linalg.norm([1.0, -2.0, 0.5, 3.0], norm)
    expected = np.average(np.abs(residual), weights=ROWS.weight) * slope
    hole = ROWS._replace(x={**ROWS.x, "a": ROWS.x["a"].at[2].set(jnp.nan)})
    for rows in (ROWS, hole):
        assert float(measure.input_gradient_size(linear_loss, PARAMS, rows, norm)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="norm: expected one of"):
        measure.input_gradient_size(linear_loss, PARAMS, ROWS, 3)


def test_gradient_alignment_is_the_mean_cosine():
    a = {"p": RNG.normal(size=(6, 2, 2)).astype(np.float32), "q": RNG.normal(size=(6, 3)).astype(np.float32)}
    b = {"p": RNG.normal(size=(6, 2, 2)).astype(np.float32), "q": RNG.normal(size=(6, 3)).astype(np.float32)}
    flat = lambda tree: np.concatenate([tree["p"].reshape(6, -1), tree["q"]], axis=1)
    cosines = (flat(a) * flat(b)).sum(1) / np.linalg.norm(flat(a), axis=1) / np.linalg.norm(flat(b), axis=1)
    assert float(measure.gradient_alignment(a, b)) == pytest.approx(cosines.mean(), rel=1e-5)
    weight = np.array([0, 1, 2, 1, 0, 3], np.float32)
    expected = np.average(cosines, weights=weight)
    assert float(measure.gradient_alignment(a, b, weight)) == pytest.approx(expected, rel=1e-5)
    tiny = jax.tree.map(lambda leaf: leaf * np.float32(1e-30), a)  # squares underflow in float32; directions do not
    assert float(measure.gradient_alignment(tiny, a)) == pytest.approx(1, abs=1e-5)
    zeros = jax.tree.map(np.zeros_like, a)
    assert float(measure.gradient_alignment(zeros, a)) == 0.0
    with pytest.raises(ValueError, match="same shape"):
        measure.gradient_alignment(a["p"], a["q"])


def test_surrogate_variance_is_the_variance_of_the_loss_over_surrogates():
    stacked = {"w": RNG.normal(size=(5, 3)).astype(np.float32), "v": RNG.normal(size=5).astype(np.float32)}
    losses = np.stack([linear_loss(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), ROWS) for i in range(5)])
    variance = (losses.astype(np.float64) ** 2).mean(0) - losses.astype(np.float64).mean(0) ** 2  # E[ℓ²] - E[ℓ]²
    hole = ROWS._replace(x={**ROWS.x, "a": ROWS.x["a"].at[2].set(jnp.nan)})
    for rows in (ROWS, hole):
        got = float(measure.surrogate_variance(linear_loss, stacked, rows))
        assert got == pytest.approx(np.average(variance, weights=ROWS.weight), rel=1e-4)
    same = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PARAMS)
    assert float(measure.surrogate_variance(linear_loss, same, ROWS)) < 1e-9
