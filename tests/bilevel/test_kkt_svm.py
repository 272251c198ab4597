"""The exact SVM against scikit-learn, central differences with retraining, and the law of absent rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC, LinearSVC

from mlsec_jax import bilevel, losses
from mlsec_jax.base import dataset

KERNELS = {
    "linear": (bilevel.linear(), {"kernel": "linear"}),
    "polynomial": (bilevel.polynomial(3, 1.0), {"kernel": "poly", "degree": 3, "coef0": 1.0, "gamma": 1.0}),
    "rbf": (bilevel.rbf(0.5), {"kernel": "rbf", "gamma": 0.5}),
}
KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def problem(n=24, seed=0, d=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = (x[:, 0] + 0.6 * rng.normal(size=n) > 0).astype(np.int32)
    return dataset(x, y, rng.uniform(0.5, 1.5, n))


def outer_of(kernel, seed=9):
    """A smooth function of everything that `svm_apply` reads."""
    rng = np.random.default_rng(seed)
    points, weight = jnp.asarray(rng.normal(size=(7, 2))), jnp.asarray(rng.normal(size=7))
    return lambda params: jnp.vdot(weight, jnp.tanh(bilevel.svm_apply(kernel)(params, points)))


@functools.cache
def compiled(name):
    """`(data, C) -> (params, info)`, and the value, gradient and pattern that the tests of derivatives share."""
    kernel, outer = KERNELS[name][0], outer_of(KERNELS[name][0])

    def value(x, weight, C):
        data = problem()._replace(x=x, weight=weight)
        params, info = bilevel.kkt_svm(kernel=kernel, C=C)(KEY, None, data)
        return outer(params), (params, info)

    def fit(data, C):
        return bilevel.kkt_svm(kernel=kernel, C=C)(KEY, None, data)

    return jax.jit(fit), jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)), value


@pytest.mark.parametrize("name", KERNELS)
def test_the_optimum_is_that_of_scikit_learn(name):
    kernel, options = KERNELS[name]
    for C in (0.05, 1.0, 20.0):
        data = problem()
        (_, (params, info)), _ = compiled(name)[1](data.x, data.weight, C)
        x, y = np.asarray(data.x), np.asarray(data.y)
        peer = SVC(C=C, tol=1e-10, **options).fit(x, y, sample_weight=np.asarray(data.weight))
        coef = np.zeros(len(y))
        coef[peer.support_] = peer.dual_coef_[0]
        assert info["stationarity"] < 1e-11
        np.testing.assert_allclose(params.coef, coef, atol=1e-6 * C)
        np.testing.assert_allclose(params.bias, peer.intercept_[0], atol=1e-5)
        np.testing.assert_allclose(bilevel.svm_apply(kernel)(params, data.x), peer.decision_function(x), atol=2e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_the_derivative_is_that_of_retraining(name):
    _, both, value = compiled(name)
    base = problem()
    point = (base.x, base.weight, jnp.asarray(1.3))
    values = lambda *args: both(*args)[0][0]
    patterns = lambda *args: jnp.sign(jnp.abs(both(*args)[0][1][0].coef))  # who supports
    bounds = lambda *args: both(*args)[0][1][1]["num_bound"]
    gradients = both(*point)[1]
    rng, h = np.random.default_rng(1), 1e-5
    checked = 0
    for k in range(6):
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), point)
        if k < 3:  # one argument at a time, then all at once
            direction = tuple(v if i == k else jnp.zeros_like(v) for i, v in enumerate(direction))
        moved = [jax.tree.map(lambda p, v, s=s: p + s * h * v, point, direction) for s in (-2, -1, 1, 2)]
        if any(bool(jnp.any(patterns(*m) != patterns(*point))) or bounds(*m) != bounds(*point) for m in moved):
            continue
        a, b, c, d = (values(*m) for m in moved)
        difference = (a - 8 * b + 8 * c - d) / (12 * h)
        exact = sum(float(jnp.vdot(g, v)) for g, v in zip(gradients, direction))
        assert abs(exact - difference) <= 1e-6 * abs(difference) + 1e-9  # rounding over h
        checked += 1
    assert checked >= 4
    assert all(bool(jnp.any(g != 0)) for g in gradients)
    if name == "rbf":  # forward mode
        forward = jax.jit(lambda p, v: jax.jvp(lambda *args: value(*args)[0], p, v)[1])(point, direction)
        np.testing.assert_allclose(forward, exact, rtol=1e-9)


def test_the_gradient_of_the_poison_is_zero_exactly_if_it_does_not_support():
    data = problem()
    (_, (params, _)), (gradient, _, _) = compiled("linear")[1](data.x, data.weight, 1.3)
    coef = params.coef
    assert bool(jnp.any(coef == 0))
    np.testing.assert_array_equal(jnp.any(gradient != 0, axis=1), coef != 0)


def test_weight_zero_equals_absence():
    kernel, _ = KERNELS["rbf"]
    data, outer = problem(), outer_of(kernel)
    junk = jnp.full((3, 2), jnp.nan)
    padded = dataset(jnp.concatenate([junk, data.x]), jnp.append(jnp.array([1, 0, 1], jnp.int32), data.y),
                     jnp.append(jnp.zeros(3), data.weight))
    trainer = bilevel.kkt_svm(kernel=kernel)

    def run(data):
        loss = lambda x: outer(trainer(KEY, None, data._replace(x=x))[0])
        return trainer(KEY, None, data)[0], jax.grad(loss)(data.x)

    (there, there_gradient), (absent, absent_gradient) = jax.jit(run)(data), jax.jit(run)(padded)
    np.testing.assert_array_equal(absent.coef[:3], 0)
    np.testing.assert_allclose(absent.coef[3:], there.coef, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(absent.bias, there.bias, rtol=1e-11)
    np.testing.assert_array_equal(absent_gradient[:3], 0)
    np.testing.assert_allclose(absent_gradient[3:], there_gradient, rtol=1e-9, atol=1e-12)


def test_vmap_is_a_loop_and_labels_may_be_signed():
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(problem(24, seed) for seed in range(3)))
    fit = bilevel.kkt_svm(kernel=bilevel.rbf(0.5)).fit
    together = jax.jit(jax.vmap(lambda data: fit(KEY, None, data)[0]))(many)
    for k in range(3):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], many)
        alone = compiled("rbf")[0](one._replace(y=2 * one.y - 1), 1.0)[0]
        np.testing.assert_allclose(together.coef[k], alone.coef, atol=1e-10)
        np.testing.assert_allclose(together.bias[k], alone.bias, atol=1e-10)


def test_without_margin_vectors_the_bias_is_the_middle_and_so_is_its_derivative():
    x = jnp.array([[-2.0], [-1.0], [1.5], [3.0]])

    @functools.partial(jax.value_and_grad, has_aux=True)
    def train(x):
        params, info = bilevel.kkt_svm(C=0.01)(KEY, None, dataset(x, jnp.array([0, 0, 1, 1])))
        return params.bias, (params, info)

    train = jax.jit(train)
    (_, (params, info)), gradient = train(x)
    bias = lambda x: train(x)[0][0]
    assert info["num_margin"] == 0 and info["num_bound"] == 4
    w = float(jnp.vdot(params.coef, x[:, 0]))
    # y f ≤ 1 on every row: b ≤ 1 - w x for the positive rows, b ≥ -1 - w x for the negative ones
    low, high = max(-1 + 2 * w, -1 + w), min(1 - 1.5 * w, 1 - 3 * w)
    np.testing.assert_allclose(params.bias, (low + high) / 2, rtol=1e-12)
    h = 1e-5
    for i in range(4):
        step = jnp.zeros_like(x).at[i].set(h)
        np.testing.assert_allclose(gradient[i, 0], (bias(x + step) - bias(x - step)) / (2 * h), rtol=1e-7, atol=1e-9)


def test_one_class_predicts_itself_and_duplicates_stay_finite():
    x = jnp.array([[-1.0, 0.0]] * 3 + [[1.0, 0.0]] * 3)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def train(x, y):
        params, info = bilevel.kkt_svm(C=10.0)(KEY, None, dataset(x, y))
        return outer_of(bilevel.linear())(params), (params, info)

    for label in (0, 1):
        (_, (params, info)), _ = train(x, jnp.full(6, label))
        np.testing.assert_allclose(params.coef, 0, atol=1e-12)
        assert float(params.bias) == pytest.approx(2 * label - 1, abs=1e-9) and info["stationarity"] < 1e-9
    (_, (params, info)), gradient = train(x, jnp.array([0, 0, 0, 1, 1, 1]))
    np.testing.assert_allclose(params.coef @ x, jnp.array([1.0, 0.0]), atol=1e-9)
    assert info["stationarity"] < 1e-9
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_the_probe_names_the_active_set_and_the_residual_of_its_system():
    data = problem()
    params, info = compiled("rbf")[0](data, 1.0)
    ones = jax.tree.map(jnp.ones_like, params)
    probe = jax.jit(lambda data: bilevel.kkt_svm(kernel=bilevel.rbf(0.5)).probe(KEY, None, data, ones))
    report = probe(data._replace(weight=data.weight.at[0].set(0)))
    assert report["stationarity"] < 1e-12 and report["residual"] < 1e-10
    assert report["pattern"].dtype == jnp.int32 and int(report["pattern"][0]) == -1
    same = probe(data)["pattern"]
    assert int(jnp.sum(same == 1)) == int(info["num_margin"]) and int(jnp.sum(same == 2)) == int(info["num_bound"])
    np.testing.assert_array_equal(same == 0, params.coef == 0)


def test_hinge_loss_of_the_decision_function_and_bad_arguments():
    data = problem()
    apply_fn = bilevel.svm_apply(bilevel.linear())
    (_, (params, _)), _ = compiled("linear")[1](data.x, data.weight, 1.0)
    assert float(losses.empirical(losses.hinge(apply_fn))(params, data)) < 1
    with pytest.raises(ValueError, match="C: expected more than 0"):
        bilevel.kkt_svm(C=0.0)
    with pytest.raises(ValueError, match="gamma"):
        bilevel.rbf(-1.0)
    with pytest.raises(ValueError, match="degree"):
        bilevel.polynomial(0)


def test_without_a_bias_and_rows_of_tiny_weight():
    """No equality constraint: with `K + 1` the penalised bias of liblinear; a cap of 1e-8 is reached, not taken for 0."""
    data = problem(n=40, d=6)
    weight = data.weight.at[::5].set(1e-8)
    trainer = bilevel.kkt_svm(kernel=lambda a, b: a @ b.T + 1, bias=False, C=0.2)
    params, info = jax.jit(lambda weight: trainer(KEY, None, data._replace(weight=weight)))(weight)
    x, y, w = (np.asarray(leaf) for leaf in (data.x, data.y, weight))
    theta = np.asarray(params.coef) @ np.column_stack([x, np.ones(40)])
    peer = LinearSVC(loss="hinge", C=0.2, tol=1e-10, max_iter=200_000, random_state=0).fit(x, y, sample_weight=w)
    assert info["stationarity"] < 1e-11 and params.bias == 0
    np.testing.assert_allclose(theta, np.append(peer.coef_[0], peer.intercept_), atol=1e-5)
    violated = (2 * y - 1) * (x @ theta[:-1] + theta[-1]) < 0.99
    np.testing.assert_allclose(np.abs(params.coef)[violated], 0.2 * w[violated], rtol=1e-9)


def digits(first, second, scale):
    x, y = load_digits(return_X_y=True)
    chosen = np.isin(y, [first, second])
    return x[chosen][:100] * scale, (y[chosen][:100] == first).astype(np.int32)


@pytest.mark.parametrize(
    "pair,scale,C,degree", [((0, 1), 255 / 16, 1.0, 1), ((0, 1), 1 / 16, 100.0, 3), ((4, 9), 1 / 16, 100.0, 3)]
)
def test_coefficients_far_below_the_cap_are_told_apart(pair, scale, C, degree):
    """Inputs of 0 to 255, or a kernel of large values: the coefficients are 1e-6 of C."""
    x, y = digits(*pair, scale)
    kernel = bilevel.polynomial(degree, 1.0)

    def margins(x):
        params, info = bilevel.kkt_svm(kernel=kernel, C=C)(KEY, None, dataset(x, y))
        return jnp.sum(jnp.tanh(bilevel.svm_apply(kernel)(params, jnp.asarray(x_new)))), (params, info)

    x_new = x[:40] + scale * np.random.default_rng(0).normal(size=(40, 64))
    both = jax.jit(jax.value_and_grad(margins, has_aux=True))
    (_, (params, info)), gradient = both(x)
    peer = SVC(C=C, kernel="poly", degree=degree, coef0=1.0, gamma=1.0, tol=1e-8).fit(x, y)
    assert info["num_margin"] == peer.n_support_.sum() and info["stationarity"] < 1e-12
    np.testing.assert_allclose(bilevel.svm_apply(kernel)(params, x_new), peer.decision_function(x_new), rtol=1e-4, atol=1e-4)
    direction, h = scale * np.random.default_rng(1).normal(size=x.shape), 1e-6
    difference = (both(x + h * direction)[0][0] - both(x - h * direction)[0][0]) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), difference, rtol=1e-5)


@pytest.mark.parametrize("C", [1e3, 1e8])
def test_a_large_c_is_the_hard_margin(C):
    """Blobs around 8 and -8: two rows at distance d support, and w is the vector between them over d² / 2."""
    rng = np.random.default_rng(1)
    x, y = np.vstack([rng.normal(size=(20, 3)) + 8, rng.normal(size=(20, 3)) - 8]), np.repeat([1, 0], 20).astype(np.int32)
    params, info = bilevel.kkt_svm()(KEY, None, dataset(x, y, np.full(40, C)))
    apart = x[:20, None] - x[None, 20:]
    first, second = np.unravel_index(np.argmin(np.sum(apart**2, axis=-1)), (20, 20))
    w = 2 * apart[first, second] / np.sum(apart[first, second] ** 2)
    assert info["num_margin"] == 2 and info["stationarity"] < 1e-12
    np.testing.assert_allclose(params.coef @ x, w, rtol=1e-10)
    assert np.min((2 * y - 1) * (x @ w + float(params.bias))) > 1 - 1e-10
