"""The laws of attacks that are algorithms on training data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import combine, tree
from tests import oracles, problems, registry

STEPS = 4
ROWS = registry.of("attack")
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@functools.cache
def setting(name):
    """The row's problem, its algorithm, and one compiled run that all laws share."""
    row = next(row for row in ROWS if row.name == name)
    problem = row.problem(problems.make())
    algorithm = row.build(problem, row.budget)

    def run(key, train, known):
        state, infos = combine.run(algorithm, key, train, known, num_steps=STEPS)
        return state, infos, algorithm.read(state, train)

    return row, problem, algorithm, jax.jit(run)


@functools.cache
def compiled(name):
    """`init` and `step` of the row's algorithm, compiled once for the laws that call them one by one."""
    _, _, algorithm, _ = setting(name)
    return jax.jit(algorithm.init), jax.jit(algorithm.step)


def close(a, b, **tolerance):
    return oracles.trees_close(a, b, **{"rtol": 2e-3, "atol": 2e-4, **tolerance})


@by_row
def test_same_key_same_bits_and_no_retrace(row):
    _, problem, _, run = setting(row.name)
    first = run(jax.random.key(3), problem.train, problem.known)
    other = row.problem(problems.make(seed=1))
    run(jax.random.key(4), other.train, other.known)
    assert oracles.trees_equal(first, run(jax.random.key(3), problem.train, problem.known))
    assert run._cache_size() == 1


@by_row
def test_jit_is_eager(row):
    _, problem, algorithm, _ = setting(row.name)
    init, step = compiled(row.name)
    state = algorithm.init(jax.random.key(0), problem.train, problem.known)
    assert close(state, init(jax.random.key(0), problem.train, problem.known))
    eager, _ = algorithm.step(jax.random.key(1), state, problem.train, problem.known)
    jitted, _ = step(jax.random.key(1), state, problem.train, problem.known)
    assert close(eager, jitted)


@by_row
def test_vmap_over_keys_is_a_loop(row):
    _, problem, _, run = setting(row.name)
    keys = jax.random.split(jax.random.key(5), 2)
    together = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(keys, problem.train, problem.known)
    for k in range(2):
        alone = run(keys[k], problem.train, problem.known)
        assert close(tree.take(together[2], k), alone[2])


@by_row
def test_the_state_keeps_its_type(row):
    _, problem, algorithm, _ = setting(row.name)
    state = jax.eval_shape(algorithm.init, jax.random.key(0), problem.train, problem.known)
    after, _ = jax.eval_shape(algorithm.step, jax.random.key(0), state, problem.train, problem.known)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, after, state))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, after, state)))


@by_row
def test_feasible_at_every_step_and_structure_kept(row):
    _, problem, _, run = setting(row.name)
    init, step = compiled(row.name)
    threat = row.project(problem)
    state = init(jax.random.key(0), problem.train, problem.known)
    for k in range(3):
        assert oracles.trees_equal(threat.project(state.poison, problem.train), state.poison)
        state, _ = step(jax.random.key(k), state, problem.train, problem.known)
    poisoned = run(jax.random.key(0), problem.train, problem.known)[2]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), poisoned) == jax.tree.map(
        lambda a: (a.shape, a.dtype), problem.train
    )


@pytest.mark.parametrize("row", [row for row in ROWS if row.zero], ids=lambda row: row.name)
def test_zero_budget_gives_the_input_back(row):
    _, problem, _, _ = setting(row.name)
    algorithm = row.zero(problem)
    state = algorithm.init(jax.random.key(0), problem.train, problem.known)
    state, _ = jax.jit(algorithm.step)(jax.random.key(0), state, problem.train, problem.known)
    assert oracles.trees_equal(algorithm.read(state, problem.train), problem.train)


@by_row
def test_float_hyperparameters_may_be_traced(row):
    _, problem, _, run = setting(row.name)
    key = jax.random.key(3)

    @jax.jit
    def traced(budget):
        algorithm = row.build(problem, budget)
        state, _ = combine.run(algorithm, key, problem.train, problem.known, num_steps=STEPS)
        return algorithm.read(state, problem.train)

    assert close(traced(jnp.float32(row.budget)), run(key, problem.train, problem.known)[2])


@pytest.mark.parametrize("row", [row for row in ROWS if row.full_batch], ids=lambda row: row.name)
def test_weight_zero_is_absence(row):
    _, problem, _, run = setting(row.name)
    padded = row.problem(problems.make(absent=2))
    algorithm = row.build(padded, row.budget)
    state, _ = jax.jit(lambda *args: combine.run(algorithm, *args, num_steps=STEPS))(
        jax.random.key(0), padded.train, padded.known
    )
    alone, _, _ = run(jax.random.key(0), problem.train, problem.known)
    assert close(state.poison, alone.poison, rtol=1e-3, atol=1e-3)


@by_row
def test_the_target_matters_and_the_poison_moves(row):
    _, problem, _, run = setting(row.name)
    other = row.problem(problems.make(target=1))
    state, _, poisoned = run(jax.random.key(0), problem.train, problem.known)
    assert not oracles.trees_equal(poisoned.x, row.project(problem).embed(
        row.project(problem).init(jax.random.key(0), problem.train), problem.train).x)
    if row.targeted:
        assert not close(state.poison, run(jax.random.key(0), problem.train, other.known)[0].poison)


@pytest.mark.parametrize("row", [row for row in ROWS if row.lowers], ids=lambda row: row.name)
def test_it_lowers_its_loss(row):
    _, problem, _, run = setting(row.name)
    outer = np.asarray(run(jax.random.key(0), problem.train, problem.known)[1]["outer"])
    assert outer[-1] < outer[0] - 1e-4 * abs(outer[0])


@by_row
def test_what_it_needs_is_said(row):
    row, problem, algorithm, _ = setting(row.name)
    state = compiled(row.name)[0](jax.random.key(0), problem.train, problem.known)
    field = "goal" if row.targeted else "params"
    with pytest.raises(ValueError, match=rf"needs known\.{field}"):
        algorithm.step(jax.random.key(0), state, problem.train, problem.known.replace(**{field: None}))
