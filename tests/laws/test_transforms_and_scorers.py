"""The laws of one-shot transforms of data, and of scorers."""

import jax
import jax.numpy as jnp
import pytest

from tests import oracles, problems, registry

TRANSFORMS = registry.of("transform")
SCORERS = registry.of("scorer")
by_transform = pytest.mark.parametrize("row", TRANSFORMS, ids=lambda row: row.name)
by_scorer = pytest.mark.parametrize("row", SCORERS, ids=lambda row: row.name)


@by_transform
def test_transform_laws(row):
    problem = row.problem(problems.make())
    transform = row.build(problem, row.budget)
    jitted = jax.jit(transform)
    key = jax.random.key(0)
    changed, _ = jitted(key, problem.train, problem.known)
    other = row.problem(problems.make(seed=1))
    jitted(key, other.train, other.known)
    assert jitted._cache_size() == 1
    assert oracles.trees_equal(changed, jitted(key, problem.train, problem.known)[0])
    assert not oracles.trees_equal(changed, problem.train)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), changed) == jax.tree.map(
        lambda a: (a.shape, a.dtype), problem.train
    )
    keys = jax.random.split(key, 2)
    together, _ = jax.jit(jax.vmap(transform, in_axes=(0, None, None)))(keys, problem.train, problem.known)
    alone, _ = jitted(keys[1], problem.train, problem.known)
    assert oracles.trees_close(jax.tree.map(lambda leaf: leaf[1], together), alone, rtol=1e-3, atol=1e-4)
    if row.targeted:
        goal = row.problem(problems.make(target=2)).known
        assert not oracles.trees_equal(changed, jitted(key, problem.train, goal)[0])


@by_transform
def test_transform_with_nothing_to_do_is_the_identity(row):
    problem = row.problem(problems.make())
    same, _ = row.zero(problem)(jax.random.key(0), problem.train, problem.known)
    assert oracles.trees_equal(same, problem.train)


@pytest.mark.parametrize("row", [row for row in TRANSFORMS if row.full_batch], ids=lambda row: row.name)
def test_transform_weight_zero_is_absence(row):
    problem, padded = row.problem(problems.make()), row.problem(problems.make(absent=2))
    changed, _ = jax.jit(row.build(problem, row.budget))(jax.random.key(0), problem.train, problem.known)
    beside, _ = jax.jit(row.build(padded, row.budget))(jax.random.key(0), padded.train, padded.known)
    assert oracles.trees_equal(jax.tree.map(lambda leaf: leaf[:2], beside), jax.tree.map(lambda a: a[:2], padded.train)) or (
        bool(jnp.all(jnp.isnan(beside.x[:2])))
    )
    assert oracles.trees_close(jax.tree.map(lambda leaf: leaf[2:], beside), changed, rtol=1e-3, atol=1e-3)


@by_scorer
def test_scorer_laws(row):
    problem = row.problem(problems.make())
    scorer = jax.jit(row.build(problem, row.budget))
    key = jax.random.key(0)
    train = problem.train
    scores = scorer(key, problem.params, train, problem.known)
    assert scores.shape == (train.num_rows,)
    order = jax.random.permutation(jax.random.key(1), train.num_rows)
    shuffled = jax.tree.map(lambda leaf: leaf[order], train)
    assert oracles.trees_close(scorer(key, problem.params, shuffled, problem.known), scores[order], rtol=1e-3, atol=1e-4)
    assert scorer._cache_size() == 1
    padded = row.problem(problems.make(absent=2))
    beside = jax.jit(row.build(padded, row.budget))(key, padded.params, padded.train, padded.known)
    assert oracles.trees_close(beside[2:-2], scores[:-2], rtol=1e-3, atol=1e-4)
    if row.translation_invariant:
        moved = scorer(key, problem.params, train._replace(x=train.x + 7.0), problem.known)
        assert oracles.trees_close(moved[:-2], scores[:-2], rtol=1e-3, atol=1e-4)
