"""The laws of transforms of parameters."""

import jax
import jax.numpy as jnp
import pytest

from tests import oracles, problems, registry

ROWS = registry.of("repair")
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
KEY = jax.random.key(0)


def trained(problem):
    """Parameters that are not zero, with a counter beside them that no repair may touch."""
    noisy = lambda leaf: leaf + jax.random.normal(jax.random.key(5), leaf.shape, leaf.dtype)
    return jax.tree.map(noisy, problem.params)


@by_row
def test_repair_laws(row):
    problem = row.problem(problems.make())
    params = trained(problem)
    repair = row.build(problem, row.budget)
    jitted = jax.jit(repair)
    changed, _ = jitted(KEY, params, problem.known)
    assert not oracles.trees_equal(changed, params)
    assert oracles.trees_equal(changed, jitted(KEY, params, problem.known)[0]) and jitted._cache_size() == 1
    assert oracles.trees_close(changed, repair(KEY, params, problem.known)[0], rtol=1e-3, atol=1e-4)
    shape = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(shape, changed) == jax.tree.map(shape, params)
    together, _ = jax.jit(jax.vmap(repair, in_axes=(0, None, None)))(jax.random.split(KEY, 2), params, problem.known)
    alone, _ = jitted(jax.random.split(KEY, 2)[1], params, problem.known)
    assert oracles.trees_close(jax.tree.map(lambda leaf: leaf[1], together), alone, rtol=1e-3, atol=1e-4)


@by_row
def test_a_traced_budget_gives_the_same(row):
    problem = row.problem(problems.make())
    params = trained(problem)
    traced = jax.jit(lambda budget: row.build(problem, budget)(KEY, params, problem.known)[0])(jnp.float32(row.budget))
    assert oracles.trees_close(traced, row.build(problem, row.budget)(KEY, params, problem.known)[0], rtol=1e-3, atol=1e-4)


@by_row
def test_a_repair_without_budget_changes_nothing(row):
    problem = row.problem(problems.make())
    params = trained(problem)
    assert oracles.trees_equal(row.zero(problem)(KEY, params, problem.known)[0], params)
