"""Bagging: its radius against the condition of the paper, and against every attack on a toy whose draws can all be listed."""

import bisect
import decimal
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mlsec_jax as mj
from mlsec_jax import defenses
from mlsec_jax.defenses._bagging import _radius

KEY = jax.random.key(0)


def centroids(key, params, data):
    del key
    hot = jax.nn.one_hot(data.y, 2, dtype=data.x.dtype) * data.weight[:, None]
    total = jnp.sum(hot, axis=0)[:, None]
    return jnp.where(total > 0, hot.T @ data.x / jnp.maximum(total, 1), params), {}


def nearest(params, x, key=None):
    return -jnp.sum(jnp.square(x[:, None] - params[None]), axis=2)


START = jnp.array([[9.0], [-9.0]])


def condition(n, k, r, gap):
    """The published one, for every n'."""
    sizes = np.arange(n - r, n + r + 1, dtype=np.float64)
    return (((sizes / n) ** k - 2 * ((np.maximum(n, sizes) - r) / n) ** k + 1) < gap).all()


def test_the_radius_is_the_largest_that_the_condition_holds_for():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for n, k in ((5, 1), (12, 2), (40, 3), (1000, 30), (60_000, 100)):
            gaps = rng.uniform(-0.1, 1.0, 12)
            ours = np.asarray(_radius(jnp.asarray(gaps), jnp.asarray(n), k))
            for gap, r in zip(gaps, ours):
                assert r == -1 or condition(n, k, r, gap)
                assert not condition(n, k, r + 1, gap)


@pytest.mark.parametrize("k", [1, 3, 100, 1000, 10_000])
def test_rounding_never_raises_a_radius_and_seldom_lowers_it(k):
    """In float32 against 50 digits: gaps at the edge of a radius, and any."""
    below = total = 0
    with decimal.localcontext(prec=50):
        for n in (50, 13_007, 60_000):
            needed = (2 - 2 * (1 - decimal.Decimal(r) / n) ** k for r in range(n))
            needed = list(itertools.takewhile(lambda gap: gap < 1, needed))
            edges = np.array(needed, np.float32)
            edges = np.concatenate([edges, np.nextafter(edges, np.float32(2)), np.nextafter(edges, np.float32(-1))])
            gaps = np.concatenate([edges, np.random.default_rng(0).uniform(0, 1, 200).astype(np.float32)])
            ours = np.asarray(_radius(jnp.asarray(gaps), jnp.asarray(n), k))
            exact = np.array([bisect.bisect_left(needed, decimal.Decimal(float(gap))) - 1 for gap in gaps])
            assert (ours <= exact).all() and (ours >= exact - 1).all()
            below, total = below + (ours < exact)[edges.size :].sum(), total + 200
    assert below < 0.02 * total


def listed(data, x, num_draws):
    """Every draw from all rows, and what its model says of each x: `[draws, k]`, `[draws, m]`."""
    draws = np.array(list(itertools.product(range(data.num_rows), repeat=num_draws)))
    whole = data._replace(weight=jnp.ones_like(data.weight))
    model = lambda draw: centroids(None, START, jax.tree.map(lambda leaf: leaf[draw], whole))[0]
    says = jax.jit(jax.vmap(lambda draw: jnp.argmax(nearest(model(draw), x), 1)))(jnp.asarray(draws))
    return draws, np.asarray(says)


def truth(draws, says, weight):
    """The exact share of draws from the present rows whose model says 1: `[m]`."""
    possible = np.asarray(weight)[draws].all(axis=1)
    return says[possible].mean(axis=0)


def toy():
    rng = np.random.default_rng(3)
    y = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    x = np.concatenate([2.0 * y[:8] - 1 + 0.3 * rng.normal(size=8), [4.0, 3.0]])  # the last two an attacker would add
    return mj.dataset(jnp.asarray(x[:, None], jnp.float32), jnp.asarray(y, jnp.int32),
                      jnp.asarray(np.arange(10) < 8, jnp.float32)), jnp.linspace(-2, 2, 9)[:, None]  # fmt: skip


@pytest.mark.parametrize("num_draws", [1, 2])
def test_no_change_within_the_radius_changes_a_prediction(num_draws):
    """With the exact probabilities: rows deleted, added, and replaced (one of each, which counts once)."""
    data, x = toy()
    draws, says = listed(data, x, num_draws)
    clean = truth(draws, says, data.weight)
    lead = np.maximum(clean, 1 - clean)
    radius = np.asarray(_radius(jnp.asarray(2 * lead - 1, jnp.float32), jnp.asarray(8), num_draws))
    assert radius.max() >= 1 and (num_draws == 1 or radius.min() < radius.max())
    checked = changed = 0
    for removed, added in itertools.product(range(3), range(3)):
        for out in itertools.combinations(range(8), removed):
            for into in itertools.combinations((8, 9), added):
                weight = np.array(data.weight)
                weight[list(out)], weight[list(into)] = 0, 1
                cost = max(removed, added)
                poisoned = truth(draws, says, weight)
                moved = (poisoned > 0.5) != (clean > 0.5)
                assert not moved[(radius >= cost) & (radius >= 0)].any()
                checked, changed = checked + int((radius >= cost).sum()), changed + int(moved.sum())
    assert checked > 100 and changed > 0


@pytest.mark.slow
def test_bounds_hold_and_grow_tight_with_the_number_of_models():
    data, x = toy()
    share = truth(*listed(data, x, 2), data.weight)
    exact = np.abs(2 * share - 1)
    gaps = {}
    for num_models in (50, 2000):
        fit, predict = defenses.bagging(centroids, nearest, num_models=num_models, num_draws=2, over="vmap")
        label, info = jax.jit(lambda key, fit=fit, predict=predict: predict(fit(key, START, data)[0], x))(KEY)
        gaps[num_models] = np.asarray(info["gap"])
        assert (gaps[num_models] <= exact + 1e-6).all()
        assert (np.asarray(info["radius"]) == np.asarray(_radius(info["gap"], jnp.asarray(8), 2))).all()
    assert (gaps[2000] >= gaps[50]).all() and np.mean(exact - gaps[2000]) < 0.15 < np.mean(exact - gaps[50])
    assert np.asarray(label).tolist() == (share > 0.5).astype(int).tolist()


def test_the_bounds_are_simultaneous():
    data, x = toy()
    fit, _ = defenses.bagging(centroids, nearest, num_models=40, num_draws=2)
    models, _ = fit(KEY, START, data)
    told = lambda **options: defenses.bagging(centroids, nearest, num_models=40, num_draws=2, **options)[1](models, x)[1]
    info = told(alpha=0.05)
    votes = np.asarray(info["votes"])
    top, level = votes.max(1), 0.05 / (2 * 9)
    low = stats.beta.ppf(level, top, 41 - top)
    np.testing.assert_allclose(info["gap"], low - (1 - low), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(info["gap"], told(alpha=0.05, num_tests=9)["gap"])
    assert (np.asarray(told(alpha=0.05, num_tests=90)["gap"]) < np.asarray(info["gap"])).all()


def test_draws_are_uniform_over_the_present_rows():
    data, _ = toy()
    index = data._replace(x=jnp.arange(10, dtype=jnp.float32)[:, None], weight=data.weight.at[3].set(0))
    counted = lambda key, params, rows: (jnp.zeros(10).at[rows.x[:, 0].astype(jnp.int32)].add(1), {})
    fit, _ = defenses.bagging(counted, nearest, num_models=4000, num_draws=3, over="vmap")
    bag = fit(KEY, None, index)[0]
    drawn = np.asarray(jnp.sum(bag.models, axis=0))
    assert int(bag.num_rows) == 7 and drawn[[3, 8, 9]].tolist() == [0, 0, 0]
    seen = np.delete(drawn, [3, 8, 9])
    assert np.square(seen - seen.mean()).sum() / seen.mean() < 22.5  # chi-square, 6 degrees, p = 0.001


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="alpha"):
        defenses.bagging(centroids, nearest, num_models=2, num_draws=1, alpha=0.0)
    with pytest.raises(ValueError, match="num_draws"):
        defenses.bagging(centroids, nearest, num_models=2, num_draws=0)
    with pytest.raises(ValueError, match="num_tests"):
        defenses.bagging(centroids, nearest, num_models=2, num_draws=1, num_tests=0)
