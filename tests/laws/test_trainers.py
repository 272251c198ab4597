"""The laws of trainers."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mlsec_jax import losses, tree
from tests import oracles, problems, registry

ROWS = registry.of("trainer")
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@functools.cache
def setting(name):
    row = next(row for row in ROWS if row.name == name)
    problem = row.problem(problems.make())
    trainer = row.build(problem, row.budget)
    outer = losses.goal_loss(problem.loss_fn)

    def gradient(key, params, train, known):
        def value(x):
            data = train._replace(x=train.x.at[problem.reserved].set(x), weight=train.weight.at[problem.reserved].set(1))
            return outer(trainer(key, params, data)[0], data, known.goal)

        return jax.value_and_grad(value)(train.x[problem.reserved])

    return row, problem, trainer, jax.jit(trainer), jax.jit(gradient)


@by_row
def test_same_bits_no_retrace_structure_kept(row):
    _, problem, _, fit, gradient = setting(row.name)
    trained, _ = fit(jax.random.key(0), problem.params, problem.train)
    fit(jax.random.key(1), problem.params, row.problem(problems.make(seed=1)).train)
    assert oracles.trees_equal(trained, fit(jax.random.key(0), problem.params, problem.train)[0])
    assert fit._cache_size() == 1
    assert jax.tree.map(lambda a: (a.shape, a.dtype), trained) == jax.tree.map(
        lambda a: (a.shape, a.dtype), problem.params
    )
    first = gradient(jax.random.key(0), problem.params, problem.train, problem.known)
    assert oracles.trees_equal(first, gradient(jax.random.key(0), problem.params, problem.train, problem.known))
    assert bool(jnp.all(jnp.isfinite(first[1]))) and float(jnp.max(jnp.abs(first[1]))) > 0


@by_row
def test_jit_is_eager_and_training_lowers_the_loss(row):
    _, problem, trainer, fit, _ = setting(row.name)
    eager, info = trainer(jax.random.key(0), problem.params, problem.train)
    jitted, _ = fit(jax.random.key(0), problem.params, problem.train)
    assert oracles.trees_close(row.read(problem, eager), row.read(problem, jitted), rtol=1e-3, atol=1e-4)
    before = losses.empirical(problem.loss_fn)(problem.params, problem.train)
    assert float(losses.empirical(problem.loss_fn)(jitted, problem.train)) < float(before)
    del info


@by_row
def test_vmap_over_keys_is_a_loop(row):
    _, problem, _, fit, _ = setting(row.name)
    keys = jax.random.split(jax.random.key(5), 2)
    together, _ = jax.jit(jax.vmap(fit, in_axes=(0, None, None)))(keys, problem.params, problem.train)
    alone, _ = fit(keys[1], problem.params, problem.train)
    assert oracles.trees_close(row.read(problem, tree.take(together, 1)), row.read(problem, alone), rtol=1e-3, atol=1e-4)


@by_row
def test_weight_zero_is_absence_though_it_is_nan(row):
    _, problem, _, fit, _ = setting(row.name)
    padded = row.problem(problems.make(absent=3))
    trainer = row.build(padded, row.budget)
    alone, _ = fit(jax.random.key(0), problem.params, problem.train)
    beside, _ = jax.jit(trainer)(jax.random.key(0), padded.params, padded.train)
    assert oracles.trees_close(row.read(problem, alone), row.read(padded, beside), rtol=1e-3, atol=1e-4)


@by_row
def test_float_hyperparameters_may_be_traced(row):
    _, problem, _, fit, _ = setting(row.name)
    traced = jax.jit(lambda rate: row.build(problem, rate)(jax.random.key(0), problem.params, problem.train)[0])
    expected, _ = fit(jax.random.key(0), problem.params, problem.train)
    assert oracles.trees_close(
        row.read(problem, traced(jnp.float32(row.budget))), row.read(problem, expected), rtol=1e-3, atol=1e-3
    )
