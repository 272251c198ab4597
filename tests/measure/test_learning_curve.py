"""Backdoor learning curves against scikit-learn's fits at each weight, closed forms and differences in the weight."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.svm import SVC, LinearSVC

import mlsec_jax as mj
from mlsec_jax import bilevel, losses, measure

KEY = jax.random.key(0)
C = 0.2
BETAS = (0.0, 0.02, 0.1, 0.5, 0.99)
LIBLINEAR = lambda a, b: a @ b.T + 1
RBF = bilevel.rbf(0.05)
NUM, DIM = 60, 8


@functools.cache
def rows(seed=0):
    """`(train, poisoned, clean test, triggered test)`: the last feature is the trigger, labels are ±1."""
    rng = np.random.default_rng(seed)

    def draw(n):
        x = rng.normal(size=(n, DIM))
        x[:, -1] = 0.1 * x[:, -1]
        return x, np.where(x[:, 0] - x[:, 1] + 0.5 * rng.normal(size=n) > 0, 1, -1)

    stamp = lambda x: np.concatenate([x[:, :-1], np.full((len(x), 1), 2.0)], axis=1)
    (x, y), (test_x, test_y) = draw(NUM), draw(30)
    poisoned = np.arange(NUM) % 6 == 0
    x, y = np.where(poisoned[:, None], stamp(x), x), np.where(poisoned, -y, y)
    return x, y, poisoned, test_x, test_y, stamp(test_x), -test_y


def data_of(seed=0, dtype=np.float64):
    x, y, poisoned, test_x, test_y, trigger_x, trigger_y = rows(seed)
    make = lambda x, y: mj.dataset(x.astype(dtype), y.astype(np.int32), np.ones(len(y), dtype))
    return make(x, y), jnp.asarray(poisoned), make(test_x, test_y), make(trigger_x, trigger_y)


def network(params, x, key=None):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def start_network():
    rng = np.random.default_rng(3)
    return {"hidden": jnp.asarray(rng.normal(size=(DIM, 5))), "out": jnp.asarray(rng.normal(size=5))}


start = lambda: {"w": jnp.zeros(DIM), "b": jnp.zeros(())}
hinge = lambda apply_fn: losses.hinge(apply_fn)
VICTIMS = {  # `C -> trainer`, its start, its decision function, its loss
    "logistic": (
        lambda C: bilevel.implicit(losses.summed(losses.logistic(bilevel.glm_apply), C=C, penalise=None)),
        start,
        bilevel.glm_apply,
        losses.logistic,
    ),
    "ridge": (
        lambda C: bilevel.implicit(losses.summed(losses.squared(bilevel.glm_apply), C=2 * C)),
        start,
        bilevel.glm_apply,
        losses.squared,
    ),
    "svm": (
        lambda C: bilevel.kkt_svm(kernel=LIBLINEAR, bias=False, C=C),
        lambda: None,
        bilevel.svm_apply(LIBLINEAR),
        hinge,
    ),
    "rbf": (lambda C: bilevel.kkt_svm(kernel=RBF, C=10 * C), lambda: None, bilevel.svm_apply(RBF), hinge),
    "network": (
        lambda C: bilevel.unrolled(losses.logistic(network), optax.sgd(0.5, momentum=0.9), 40),
        start_network,
        network,
        losses.logistic,
    ),
}
PEERS = {
    "logistic": lambda: LogisticRegression(solver="liblinear", C=C, tol=1e-12, max_iter=10_000),
    "ridge": lambda: RidgeClassifier(alpha=1 / (2 * C), tol=1e-12),
    "svm": lambda: LinearSVC(loss="hinge", C=C, tol=1e-10, max_iter=200_000, random_state=0),
    "rbf": lambda: SVC(C=10 * C, gamma=0.05, tol=1e-10),
}


@functools.cache
def compiled(name):
    """`(curve at betas, slope)` of a victim, jitted; both measure clean and triggered test loss."""
    make, begin, apply_fn, loss = VICTIMS[name]
    mean_loss = losses.empirical(loss(apply_fn))

    def measured(params, clean, triggered):
        return {"clean": mean_loss(params, clean), "triggered": mean_loss(params, triggered)}

    def curve(betas, C, train, poisoned, clean, triggered):
        judge = lambda params: (measured(params, clean, triggered), apply_fn(params, clean.x))
        warm = name in ("logistic", "ridge")
        return measure.backdoor_learning_curve(KEY, make(C), begin(), train, poisoned, judge, betas=betas, warm_start=warm)

    def slope(beta, C, train, poisoned, clean, triggered):
        judge = lambda params: measured(params, clean, triggered)
        return measure.learning_slope(KEY, make(C), begin(), train, poisoned, judge, beta=beta)

    return jax.jit(curve), jax.jit(slope)


@pytest.mark.parametrize("name", PEERS)
def test_each_point_is_scikit_learns_fit(x64, name):
    x, y, poisoned, test_x, *_ = rows()
    curve, info = compiled(name)[0](jnp.asarray(BETAS), C, *data_of())
    assert np.max(info["stationarity"]) < 1e-9
    for k, beta in enumerate(BETAS):
        weight = np.where(poisoned, beta, 1.0)
        seen = weight > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = PEERS[name]().fit(x[seen], y[seen], sample_weight=weight[seen])
        np.testing.assert_allclose(curve.losses[1][k], peer.decision_function(test_x), atol=2e-5)


@pytest.mark.parametrize("name", VICTIMS)
def test_slope_is_that_of_differences_in_beta(x64, name):
    curve_of, slope_of = compiled(name)
    h = 1e-5
    points = jnp.asarray([0.0, h, 2 * h, 0.0, 0.0])  # one shape for all tests
    curve, _ = curve_of(points, C, *data_of())
    found = slope_of(1e-8, C, *data_of())
    for which in ("clean", "triggered"):
        first, second, third = curve.losses[0][which][:3]
        difference = (-3 * first + 4 * second - third) / (2 * h)  # one-sided: β cannot be negative
        np.testing.assert_allclose(found.slope[which], difference, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(found.theta[which], -2 / np.pi * np.arctan(difference), rtol=1e-3, atol=1e-7)
    assert abs(found.theta["triggered"]) > 0.1
    assert name == "ridge" or found.theta["triggered"] > 0  # the backdoor is learned; a squared loss may first rise


def test_ridge_slope_in_closed_form(x64):
    x, y, poisoned, _, _, trigger_x, trigger_y = rows()
    bar = lambda x: np.column_stack([x, np.ones(len(x))])
    clean = bar(x[~poisoned])
    hessian = 2 * C * clean.T @ clean + np.diag(np.append(np.ones(DIM), 0))
    theta = np.linalg.solve(hessian, 2 * C * clean.T @ y[~poisoned])
    pull = lambda x, y: bar(x).T @ (bar(x) @ theta - y)
    held = pull(trigger_x, trigger_y) / len(trigger_y)
    expected = -held @ np.linalg.solve(hessian, 2 * C * pull(x[poisoned], y[poisoned]))
    found = compiled("ridge")[1](1e-8, C, *data_of())
    np.testing.assert_allclose(found.slope["triggered"], expected, rtol=1e-6)


def test_lambda_and_seeds_are_axes(x64):
    seeds, strengths = (0, 1), jnp.asarray([0.1, C])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(data_of, seeds))
    run = compiled("logistic")[0]
    many = jax.jit(jax.vmap(lambda data: jax.lax.map(lambda C: run(jnp.asarray(BETAS), C, *data)[0].losses[0], strengths)))(
        stacked
    )
    for seed in seeds:
        alone, _ = run(jnp.asarray(BETAS), C, *data_of(seed))
        np.testing.assert_allclose(many["triggered"][seed, 1], alone.losses[0]["triggered"], rtol=1e-7, atol=1e-10)
    assert np.all(np.abs(many["triggered"][:, 1] - many["triggered"][:, 0]) > 1e-3)  # λ matters


def test_warm_start_changes_the_way_and_not_the_end(x64):
    train, poisoned, _, triggered = data_of()
    make, begin, apply_fn, _ = VICTIMS["logistic"]
    run = lambda warm: measure.backdoor_learning_curve(
        KEY, make(C), begin(), train, poisoned, lambda p: apply_fn(p, triggered.x),
        betas=jnp.asarray([0.5, 0.51]), warm_start=warm,
    )  # fmt: skip
    (warm, warm_info), (cold, cold_info) = run(True), run(False)
    np.testing.assert_allclose(warm.losses, cold.losses, atol=1e-9)
    assert warm_info["num_steps"][1] < cold_info["num_steps"][1]


def test_at_beta_zero_the_poison_is_absent(x64):
    train, poisoned, *test = data_of()
    spoilt = train._replace(x=jnp.where(poisoned[:, None], jnp.nan, train.x))
    run = compiled("logistic")[0]
    np.testing.assert_array_equal(
        run(jnp.zeros(5), C, spoilt, poisoned, *test)[0].losses[1], run(jnp.zeros(5), C, train, poisoned, *test)[0].losses[1]
    )


def test_deviation_of_weights_and_of_coefficients_agree():
    rng = np.random.default_rng(0)
    x, coef = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    plain = measure.parameter_deviation(jnp.asarray(coef @ x))
    kernel = measure.parameter_deviation(jnp.asarray(coef), jnp.asarray(x @ x.T))
    w = coef @ x
    cosine = w @ w[0] / np.linalg.norm(w, axis=1) / np.linalg.norm(w[0])
    np.testing.assert_allclose(plain.norm, np.linalg.norm(w, axis=1), rtol=1e-5)
    np.testing.assert_allclose(plain.angle, (1 - cosine) / 2, atol=1e-6)
    np.testing.assert_allclose(kernel.norm, plain.norm, rtol=1e-4)
    np.testing.assert_allclose(kernel.angle, plain.angle, atol=1e-5)


def test_angles_stay_between_nothing_and_half_a_turn():
    w = jax.random.normal(KEY, (50, 7))
    for sign in (1.0, -1.0):
        angle = jax.vmap(lambda w, by=sign: measure.parameter_deviation(jnp.stack([w, by * 3 * w, w / 7])).angle)(w)
        assert angle.min() >= 0 and angle.max() <= 1
    assert np.isnan(measure.parameter_deviation(jnp.eye(2)[:1].repeat(2, axis=0).at[1].set(0)).angle[1])


def test_bad_input_is_named():
    train, poisoned, *_ = data_of(dtype=np.float32)
    run = lambda **changed: measure.backdoor_learning_curve(
        **{"key": KEY, "trainer": lambda key, params, data: (params, {}), "params": jnp.zeros(()), "data": train,
           "poisoned": poisoned, "losses_fn": lambda params: params, "betas": (0.0, 1.0), **changed}
    )  # fmt: skip
    assert run()[0].losses.shape == (2,)
    with pytest.raises(ValueError, match="betas: expected at least 0"):
        run(betas=(-0.1, 1.0))
    with pytest.raises(ValueError, match=r"betas: expected \[b\]"):
        run(betas=0.5)
    with pytest.raises(ValueError, match=r"poisoned: expected bool \[60\]"):
        run(poisoned=jnp.arange(3))
    with pytest.raises(ValueError, match="beta: expected more than 0"):
        measure.learning_slope(KEY, None, None, train, poisoned, None, beta=0.0)
    with pytest.raises(ValueError, match="path: expected"):
        measure.parameter_deviation(jnp.zeros(3))
    with pytest.raises(ValueError, match="gram: expected shape"):
        measure.parameter_deviation(jnp.zeros((2, 3)), jnp.eye(2))
    with pytest.raises(ValueError, match="C: expected more than 0"):
        losses.summed(losses.logistic(bilevel.glm_apply), C=0.0)
