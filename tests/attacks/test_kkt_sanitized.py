"""The KKT attack: its convex problem against SciPy, the stationarity it promises, and harm through the sanitizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses, scores, threat
from mlsec_jax.attacks import _kkt_sanitized as kkt
from tests.attacks.linear_models import single

K, L2 = 12, 0.01
HINGE = losses.hinge(single, 0.1)


def cloud(n=60, d=3):
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    x = np.clip(0.5 + 0.12 * rng.normal(size=(n, d)) + 0.15 * (2 * y[:, None] - 1) * np.eye(d)[0], 0, 1)
    return mj.dataset(jnp.asarray(x), jnp.asarray(y))


def slsqp(objective, start, feasible, w, b, sign):
    """SciPy's minimiser over one class's feasible set."""
    k = int(sign > 0)
    mean, axis = np.asarray(feasible.means[k]), np.asarray(feasible.axis)
    constraints = [
        lambda x: float(feasible.radius[k]) ** 2 - np.sum((x - mean) ** 2),
        lambda x: float(feasible.slab[k]) - (x - mean) @ axis,
        lambda x: float(feasible.slab[k]) + (x - mean) @ axis,
        lambda x: 1 - sign * (x @ w + b),
        lambda x: sign * (x @ w + b) - 1 + float(feasible.loss[k]),
    ]
    box = [tuple(np.asarray(feasible.box))] * len(mean)
    rules = [{"type": "ineq", "fun": c} for c in constraints]
    return minimize(objective, start, bounds=box, constraints=rules, options={"ftol": 1e-14, "maxiter": 500}).x


@pytest.fixture
def convex(x64):
    w, b = np.array([4.0, -2.5, 1.0]), -1.4
    feasible = kkt.feasible_set(cloud(), jnp.asarray(w), jnp.asarray(b), percentile=0.9, lo=0.0, hi=1.0)
    return w, b, feasible


def test_feasible_set_is_made_of_percentiles(convex):
    w, b, feasible = convex
    data = cloud()
    x, y = np.asarray(data.x), np.asarray(data.y)
    for k in (0, 1):
        rows = x[y == k]
        distance = np.sort(np.linalg.norm(rows - rows.mean(0), axis=1))
        np.testing.assert_allclose(feasible.radius[k], distance[26])  # ⌈.9 · 30⌉ = 27th
        np.testing.assert_allclose(feasible.loss[k], np.sort(np.maximum(1 - (2 * k - 1) * (rows @ w + b), 0))[26])


def test_projection_is_the_nearest_feasible_point(convex):
    w, b, feasible = convex
    points = np.array([[0.9, -0.3, 0.6], [-0.2, 1.4, 0.1]])
    ours, violation = kkt.project_feasible(jnp.asarray(points), feasible, jnp.asarray(w), jnp.asarray(b), num_steps=600)
    assert float(violation.max()) < 1e-6
    for k in (0, 1):
        best = slsqp(lambda x, k=k: np.sum((x - points[k]) ** 2), np.asarray(ours[k]), feasible, w, b, 2 * k - 1)
        np.testing.assert_allclose(ours[k], best, atol=1e-4)


def test_the_convex_problem_is_solved(convex):
    w, b, feasible = convex
    pull, split = np.array([0.02, 0.01, -0.03]), np.array([0.02, 0.03])
    decoy = (jnp.asarray(w), jnp.asarray(b))
    points, info = kkt.solve_poisons(decoy, jnp.asarray(pull), jnp.asarray(split), feasible, num_steps=300)
    left = lambda pair: np.sum((pull + split[0] * pair[0] - split[1] * pair[1]) ** 2)
    np.testing.assert_allclose(info["residual"] ** 2, left(np.asarray(points)), rtol=1e-9)
    best = np.array(points)
    for _ in range(3):  # block descent by SciPy from our answer finds nothing better
        for k in (0, 1):
            pair = best.copy()
            change = lambda x, k=k, pair=pair: left(np.where(np.arange(2)[:, None] == k, x[None], pair))
            best[k] = slsqp(change, best[k], feasible, w, b, 2 * k - 1)
    assert float(info["violation"].max()) < 1e-6
    assert left(np.asarray(points)) <= left(best) * (1 + 1e-3) + 1e-9


@pytest.fixture(scope="module")
def attacked():
    """The breast-cancer table, 30 features in [0, 1]: 120 rows to train, 12 poisons, sphere and slab defenses."""
    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x = ((x - x.min(0)) / (x.max(0) - x.min(0)))[order].astype(np.float32)
    cut = lambda a, b: mj.dataset(jnp.asarray(x[a:b]), jnp.asarray(y[order][a:b].astype(np.int32)))
    train, holdout, test = cut(0, 120), cut(120, 220), cut(220, None)
    penalised = lambda p, d, key=None: HINGE(p, d) + L2 / 2 * jnp.vdot(p["w"], p["w"])
    trainer = bilevel.unrolled(penalised, optax.sgd(0.3, momentum=0.9), 60)
    cuts = [scores.within_class(s, fraction=0.1) for s in (scores.sphere(), scores.slab())]
    victim = combine.defended(trainer, before=[combine.filter_top(c, fraction=0.1, reads_model=False) for c in cuts])
    known = mj.Known(params={"w": jnp.zeros(30), "b": jnp.zeros(())}, holdout=holdout)
    subject = threat.reserve(train, jax.tree.map(lambda leaf: leaf[:K], train))
    attack = attacks.kkt_sanitized(
        single, trainer, victim, num_poisons=K, l2=L2, quantiles=(0.1, 0.4), copies=(4.0, 12.0), splits=(0.0,),
        num_steps=40, num_sweeps=15,
    )
    data, info = jax.jit(lambda known: attack(jax.random.key(0), subject, known))(known)

    @jax.jit
    def error(data):
        params, told = victim(jax.random.key(1), known.params, data)
        wrong = (single(params, test.x) > 0) != (test.y > 0)
        return jnp.mean(wrong.astype(jnp.float32)), jnp.sum(told["weight"][-K:] > 0)

    return train, subject, data, info, error


def test_poisons_pass_the_sanitizers_and_harm(attacked):
    train, subject, data, info, error = attacked
    flipped = subject._replace(y=subject.y.at[-K:].set(1 - subject.y[-K:]), weight=jnp.ones_like(subject.weight))
    (clean, _), (control, kept_flips), (ours, kept) = error(subject), error(flipped), error(data)
    assert ours >= clean + 0.02 and ours >= control + 0.02, (clean, control, ours)
    assert kept == K and kept_flips < K // 2
    assert float(info["violation"].max()) < 1e-4
    assert info["losses"].shape == (2 * 2 * 2,)
    assert len(np.unique(np.asarray(data.x[-K:]), axis=0)) <= 2  # two distinct poisons, copied
    assert int(jnp.sum(data.y[-K:])) == int(info["num_positive"])
    np.testing.assert_array_equal(data.x[:-K], train.x)
    np.testing.assert_array_equal(data.weight, np.ones(120 + K))


def test_empty_and_unreserved_budgets(attacked):
    train, _, _, _, _ = attacked
    trainer = lambda key, params, data: (params, {})
    known = mj.Known(params={"w": jnp.zeros(30), "b": jnp.zeros(())}, holdout=train)
    none = attacks.kkt_sanitized(single, trainer, num_poisons=0, l2=L2)
    np.testing.assert_array_equal(none(jax.random.key(0), train, known)[0].x, train.x)
    with pytest.raises(ValueError, match="reserved rows"):
        attacks.kkt_sanitized(single, trainer, num_poisons=3, l2=L2)(jax.random.key(0), train, known)


def test_decoy_rows_are_the_flipped_smallest_margins():
    train = mj.dataset(jnp.zeros((2, 1)), jnp.array([0, 1]))
    holdout = mj.dataset(jnp.arange(4.0)[:, None], jnp.array([0, 1, 0, 1]), jnp.array([1.0, 1, 0, 1]))
    data = kkt.decoy_data(train, holdout, jnp.array([3.0, -1.0, -9.0, 2.0]), 0.5, 4.0)
    np.testing.assert_array_equal(data.y[2:], [1, 0, 1, 0])
    np.testing.assert_array_equal(data.weight, [1, 1, 0, 4, 0, 4])
