"""The laws of certified ensembles: `(trainer, predict_fn)`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles, problems, registry

ROWS = registry.of("ensemble")
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
KEY = jax.random.key(0)


@functools.cache
def setting(name):
    row = next(row for row in ROWS if row.name == name)
    problem = row.problem(problems.make())
    trainer, predict_fn = row.build(problem, row.budget)
    return problem, trainer, jax.jit(trainer), jax.jit(predict_fn)


@by_row
def test_same_bits_no_retrace_and_jit_is_eager(row):
    problem, trainer, fit, predict = setting(row.name)
    models, _ = fit(KEY, problem.params, problem.train)
    fit(jax.random.key(1), problem.params, row.problem(problems.make(seed=1)).train)
    assert fit._cache_size() == 1
    assert oracles.trees_equal(models, fit(KEY, problem.params, problem.train)[0])
    assert oracles.trees_close(models, trainer(KEY, problem.params, problem.train)[0], rtol=1e-3, atol=1e-4)
    assert oracles.trees_equal(predict(models, problem.known.goal.x), predict(models, problem.known.goal.x))


@by_row
def test_a_prediction_is_a_label_and_a_radius_and_better_than_chance(row):
    problem, _, fit, predict = setting(row.name)
    models, _ = fit(KEY, problem.params, problem.train)
    label, info = predict(models, problem.known.clean.x)
    assert label.shape == info["radius"].shape == problem.known.clean.y.shape
    assert label.dtype == info["radius"].dtype == jnp.int32
    assert np.mean(label == problem.known.clean.y) > 0.5  # of three classes, from a dozen rows among the models
    assert (np.asarray(info["radius"]) >= -1).all()
    if "votes" in info:
        votes = np.asarray(info["votes"])
        assert (votes.sum(1) == votes.sum(1)[0]).all() and (votes.argmax(1) == np.asarray(label)).all()


@by_row
def test_weight_zero_is_absence_though_it_is_nan(row):
    problem, _, fit, predict = setting(row.name)
    padded = row.problem(problems.make(absent=3))
    beside_fit, beside_predict = row.build(padded, row.budget)
    alone = predict(fit(KEY, problem.params, problem.train)[0], problem.known.goal.x)
    beside = beside_predict(beside_fit(KEY, padded.params, padded.train)[0], padded.known.goal.x)
    assert oracles.trees_close(alone, beside, rtol=1e-3, atol=1e-4)


@by_row
def test_vmap_over_keys_is_a_loop(row):
    problem, _, fit, predict = setting(row.name)
    both = lambda key: predict(fit(key, problem.params, problem.train)[0], problem.known.goal.x)
    keys = jax.random.split(jax.random.key(5), 2)
    together = jax.jit(jax.vmap(both))(keys)
    assert oracles.trees_close(jax.tree.map(lambda leaf: leaf[1], together), both(keys[1]), rtol=1e-3, atol=1e-4)


@by_row
def test_a_traced_hyper_parameter_gives_the_same(row):
    problem, _, fit, predict = setting(row.name)

    def traced(budget):
        trainer, predict_fn = row.build(problem, budget)
        return predict_fn(trainer(KEY, problem.params, problem.train)[0], problem.known.goal.x)

    expected = predict(fit(KEY, problem.params, problem.train)[0], problem.known.goal.x)
    assert oracles.trees_close(jax.jit(traced)(jnp.float32(row.budget)), expected, rtol=1e-3, atol=1e-4)
