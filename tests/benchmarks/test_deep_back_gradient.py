"""The deep benchmark's parts: its network, its goal, its trainers, and a back-gradient against central differences."""

import jax
import jax.numpy as jnp
import numpy as np

import mlsec_jax as mj
from benchmarks import _deep_victim
from benchmarks import deep_back_gradient as deep
from mlsec_jax import losses, models, threat


def rows(n=12, seed=0):
    key = jax.random.key(seed)
    return mj.dataset(jax.random.uniform(key, (n, 28, 28, 1)), jnp.arange(n, dtype=jnp.int32) % 10)


def test_network_is_as_large_as_promised_and_starts_alike_under_both_recipes():
    params = deep.init(jax.random.key(0), deep.CALM)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) >= 450_000
    other = deep.init(jax.random.key(0), deep.LIVELY)
    x = rows(4).x
    calm, lively = deep.features(deep.CALM, params, x), deep.features(deep.LIVELY, other, x)
    np.testing.assert_allclose(calm, lively, rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(deep.network(deep.CALM)(params, x)))) == 0.0


def test_filters_are_orthonormal_pairs():
    flat = np.asarray(_deep_victim.filters()).reshape(25, -1)
    half = flat[:, :8]
    np.testing.assert_allclose(half.T @ half, np.eye(8), atol=1e-6)
    np.testing.assert_array_equal(flat[:, 8:], -half)


def test_strided_is_the_convolution():
    x = rows(3).x
    np.testing.assert_allclose(
        _deep_victim.strided(x, _deep_victim.filters()), models.conv(x, _deep_victim.filters(), stride=2), atol=1e-5
    )


def test_misled_is_the_mean_over_the_target_and_the_mean_over_the_rest():
    goal = rows(30)
    goal = goal._replace(weight=goal.weight.at[8].set(0))
    apply_fn = lambda params, x, key=None: params * x[:, :10, 0, 0]
    value = deep.misled(apply_fn)(jnp.float32(2.0), goal, goal)
    probability = np.asarray(jax.nn.softmax(2.0 * goal.x[:, :10, 0, 0]))[np.arange(30), np.asarray(goal.y)]
    eights = [18, 28]
    others = [k for k in range(30) if k % 10 != 8]
    np.testing.assert_allclose(value, probability[eights].mean() + 1 - probability[others].mean(), rtol=1e-5)


def test_head_trains_the_linear_path_alone_and_its_back_gradient_is_right():
    train, goal = threat.reserve(rows(10), rows(2, seed=1)), rows(6, seed=2)
    params = deep.init(jax.random.key(0), deep.CALM, 1)
    trainer = deep.only_head(deep.CALM, 1.0)
    reach = threat.append_rows(2)
    loss = losses.empirical(losses.cross_entropy(deep.network(deep.CALM)))

    @jax.jit
    def objective(poison):
        trained = trainer(jax.random.key(0), params, reach.embed(poison, train))[0]
        return loss(trained, goal), trained

    poison = train.x[-2:]
    (_, trained), gradient = jax.value_and_grad(objective, has_aux=True)(poison)
    for name in params:
        moved = bool(jnp.any(trained[name] != params[name]))
        assert moved == name.startswith("linear"), name
    direction = gradient / jnp.linalg.norm(gradient)
    central = (objective(poison + 0.01 * direction)[0] - objective(poison - 0.01 * direction)[0]) / 0.02
    np.testing.assert_allclose(jnp.vdot(gradient, direction), central, rtol=0.02)


def test_bounded_availability_ignores_rows_that_are_lost():
    outer = deep.bounded_availability(lambda params, data, key=None: params * data.x[:, 0], most=6.0)
    goal = mj.dataset(jnp.array([[1.0], [100.0]]), jnp.zeros(2, jnp.int32))
    value, slope = jax.value_and_grad(outer)(jnp.float32(1.0), None, goal)
    assert float(value) == -3.5 and float(slope) == -0.5


def test_one_key_one_victim_and_another_key_another():
    trainer = deep.from_scratch(deep.CALM._replace(num_steps=5), lambda key: 15.0, width=2)
    train = rows(360)
    fit = jax.jit(lambda key: trainer(key, None, train)[0]["linear_b"])
    first, again, other = fit(jax.random.key(0)), fit(jax.random.key(0)), fit(jax.random.key(1))
    assert (first == again).all() and (first != other).any()
