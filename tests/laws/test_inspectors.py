"""The laws of inspectors: a record with one entry a label, for a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles, problems, registry

ROWS = registry.of("inspector")
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
KEY = jax.random.key(0)


@by_row
def test_inspector_laws(row):
    problem = row.problem(problems.make())
    inspect = row.build(problem, row.budget)
    jitted = jax.jit(inspect)
    record = jitted(KEY, problem.params, problem.known)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(record)} == {problems.CLASSES}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(record))
    other = jax.tree.map(lambda leaf: leaf + jax.random.normal(KEY, leaf.shape), problem.params)
    assert not oracles.trees_equal(record, jitted(KEY, other, problem.known))
    assert oracles.trees_equal(record, jitted(KEY, problem.params, problem.known)) and jitted._cache_size() == 1
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(inspect, in_axes=(0, None, None)))(keys, problem.params, problem.known)
    alone = jitted(keys[1], problem.params, problem.known)
    assert oracles.trees_close(jax.tree.map(lambda leaf: leaf[1], together), alone, rtol=1e-3, atol=1e-4)
    traced = jax.jit(lambda budget: row.build(problem, budget)(KEY, problem.params, problem.known))
    assert oracles.trees_close(traced(jnp.float32(row.budget)), record, rtol=1e-3, atol=1e-4)


@by_row
def test_absent_clean_rows_change_nothing(row):
    problem = row.problem(problems.make())
    clean = problem.known.clean
    nothing = clean._replace(x=jnp.full_like(clean.x, jnp.nan), y=jnp.zeros_like(clean.y), weight=jnp.zeros_like(clean.weight))
    padded = problem.known.replace(clean=jax.tree.map(lambda a, b: jnp.concatenate([a, b]), nothing, clean))
    jitted = jax.jit(row.build(problem, row.budget))
    record = jitted(KEY, problem.params, problem.known)
    assert oracles.trees_close(jitted(KEY, problem.params, padded), record, rtol=1e-3, atol=1e-4)
