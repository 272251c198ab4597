"""What trainers make of unusual parameters, rows and starts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, combine, losses

KEY = jax.random.key(0)
linear = lambda params, x, key=None: x @ params["w"] + (params["b"][None] if jnp.ndim(params["b"]) else params["b"])


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def problem(num_rows=10):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, 3))
    return mj.dataset(x, x @ [1.0, -1.0, 0.5] + 3)


TRAINERS = {
    "unrolled": lambda loss: bilevel.unrolled(loss, optax.sgd(0.1), 20),
    "exact": lambda loss: bilevel.back_gradient(loss, 0.1, 20, momentum=0.9, reversal="exact"),
    "implicit": lambda loss: bilevel.implicit(losses.regularised(loss, l2=0.1)),
    "glm": lambda loss: bilevel.glm(losses.squared, l2=0.1),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_python_number_among_the_parameters_is_trained(name):
    train, start = TRAINERS[name](losses.squared(linear)), {"w": jnp.zeros(3), "b": 0.0}
    eager, jitted = train(KEY, start, problem())[0], jax.jit(train)(KEY, start, problem())[0]
    assert abs(eager["b"]) > 1
    np.testing.assert_allclose(eager["b"], jitted["b"], rtol=1e-12)


def test_a_mask_that_is_none_is_refused():
    start = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    chosen, rest = mj.tree.partition(start, {"w": jnp.array(True), "b": np.array(False)})
    assert chosen["b"] is None and rest["w"] is None
    with pytest.raises(ValueError, match="mask: expected None, a pytree of bools"):
        bilevel.unrolled(losses.squared(linear), optax.sgd(0.1), 3, trainable="w")(KEY, start, problem())


def test_glm_does_not_see_absent_rows():
    data, start = problem(8), {"w": jnp.zeros(3), "b": jnp.zeros(())}
    without = jax.tree.map(lambda leaf: leaf[1:], data)
    x, y, weight = data.x.at[0].set(jnp.nan), data.y.at[0].set(jnp.nan), data.weight.at[0].set(0)
    plain = bilevel.glm(losses.squared, l2=0.1)
    for train in (plain, bilevel.glm(losses.squared, l2=0.1, known_gram=bilevel.gram(x), rows=1)):
        trained, info = train(KEY, start, mj.Data(x, y, weight))
        np.testing.assert_allclose(trained["w"], plain(KEY, start, without)[0]["w"], rtol=1e-12)
        assert info["stationarity"] < 1e-10
    labels = jnp.array([7, 0, 1, 0, 1, 0, 1, 0])
    assert bilevel.glm(losses.logistic, l2=0.1)(KEY, start, mj.Data(x, labels, weight))[1]["stationarity"] < 1e-10


def hessian_error(train, hessian=jax.hessian):
    """Relative distance of the second derivative in one training input from differences of the first."""
    data, start = problem(), {"w": 0.1 * jnp.ones(3), "b": jnp.zeros(())}
    y = (data.y > 3).astype(jnp.int32)

    def outer(row):
        trained = train(KEY, start, mj.dataset(data.x.at[0].set(row), y))[0]
        return jnp.sum(jnp.sin(linear(trained, data.x)))

    row, h = data.x[0], 1e-5
    columns = [(jax.grad(outer)(row + h * e) - jax.grad(outer)(row - h * e)) / (2 * h) for e in jnp.eye(3)]
    return float(jnp.linalg.norm(hessian(outer)(row) - jnp.stack(columns)) / jnp.linalg.norm(jnp.stack(columns)))


def test_second_derivatives_are_right_or_refused():
    assert hessian_error(bilevel.glm(losses.logistic, l2=0.1)) < 1e-8
    exact = bilevel.back_gradient(losses.logistic(linear), 0.1, 5, momentum=0.9, reversal="exact")
    with pytest.raises(ValueError, match="can't be differentiated again; take 'stored'"):
        hessian_error(exact, lambda fn: jax.jacrev(jax.grad(fn)))
    with pytest.raises(TypeError, match="forward-mode"):
        hessian_error(exact)


def test_a_derivative_of_exact_that_stands_still_may_be_part_of_another():
    data, start = problem(), {"w": 0.1 * jnp.ones(3), "b": jnp.zeros(())}
    train = bilevel.back_gradient(losses.squared(linear), 0.1, 5, momentum=0.5, reversal="exact")
    goal = losses.goal_loss(losses.squared(linear))
    value = lambda x: goal(train(KEY, start, data._replace(x=x))[0], data, data)
    still = jax.grad(lambda x: jnp.sum(jax.lax.stop_gradient(jax.grad(value)(x)) * x))(data.x)
    np.testing.assert_allclose(still, jax.grad(value)(data.x), rtol=1e-12)


def test_newton_leaves_a_saturated_start():
    rng = np.random.default_rng(2)
    data = mj.dataset(rng.normal(size=(40, 3)), rng.integers(0, 3, 40))
    start = {"w": 10 * rng.normal(size=(3, 3)), "b": 10 * rng.normal(size=3)}
    fit = jax.jit(bilevel.implicit(losses.regularised(losses.cross_entropy(linear), l2=0.1)))
    info = fit(KEY, start, data)[1]
    assert info["stationarity"] < 1e-10 and info["num_steps"] < 100
    flat = jax.tree.map(lambda leaf: leaf.astype(np.float32), (start, data.x))
    assert fit(KEY, flat[0], mj.dataset(flat[1], data.y))[1]["num_steps"] < 100  # ends where rounding is all that is left


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_exact_retraining_is_fine_enough_for_differences(momentum):
    rng = np.random.default_rng(3)
    data = mj.dataset(rng.normal(size=(40, 5)), rng.integers(0, 3, 40))
    start = {"w": rng.normal(size=(5, 3)), "b": rng.normal(size=3)}
    train = bilevel.back_gradient(losses.cross_entropy(linear), 0.05, 60, momentum=momentum, reversal="exact")
    goal = losses.goal_loss(losses.cross_entropy(linear))
    found = bilevel.diagnose(train, KEY, start, data, outer=goal, goal=data, rows=2)
    assert found["rel_error"] < 1e-6


def test_a_filter_that_changes_its_mind_is_told():
    data, start = problem(), {"w": jnp.zeros(3), "b": jnp.zeros(())}
    data = data._replace(x=data.x.at[0, 0].set(5.0).at[1, 0].set(5.0 + 1e-7))
    cut = combine.filter_top(lambda key, params, rows, known: rows.x[:, 0], fraction=0.1, reads_model=False)
    inner = bilevel.implicit(losses.regularised(losses.squared(linear), l2=0.1))
    halve = lambda key, params, known: (jax.tree.map(lambda leaf: leaf / 2, params), {})
    train, goal = combine.defended(inner, before=[cut], after=[halve]), losses.goal_loss(losses.squared(linear))
    found = bilevel.diagnose(train, KEY, start, data, outer=goal, goal=data, rows=jnp.arange(2))
    assert found["crossed"] and found["stationarity"] < 1e-10
    calm = bilevel.diagnose(train, KEY, start, data, outer=goal, goal=data, rows=jnp.arange(5, 8))
    assert not calm["crossed"] and calm["rel_error"] < 1e-6


def test_learning_rates_of_other_kinds():
    loss, start = losses.squared(linear), {"w": jnp.zeros(3), "b": jnp.zeros(())}
    train = lambda rate: bilevel.back_gradient(loss, rate, 2, reversal="approximate")
    slope = lambda rate: jax.grad(lambda x: jnp.sum(train(rate)(KEY, start, problem()._replace(x=x))[0]["w"]))(problem().x)
    np.testing.assert_array_equal(slope(1), slope(1.0))
    with pytest.raises(ValueError, match="a schedule is for 'stored'"):
        bilevel.back_gradient(loss, optax.constant_schedule(0.1), 2, momentum=0.9, reversal="exact")
