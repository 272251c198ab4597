"""The laws of threats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import checks, losses, threat
from tests import oracles, problems, registry

ROWS = registry.of("threat")
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def far(poison, scale=2.0):
    """A poison far outside."""
    return jax.tree.map(lambda leaf: leaf + scale * jax.random.normal(jax.random.key(9), leaf.shape, leaf.dtype), poison)


@by_row
def test_project_is_idempotent_and_keeps_feasible_points(row):
    problem = row.problem(problems.make())
    reach = row.build(problem, row.budget)
    start = reach.init(jax.random.key(0), problem.train)
    projected = jax.jit(reach.project)(far(start), problem.train)
    assert oracles.trees_close(reach.project(projected, problem.train), projected, rtol=1e-6, atol=1e-7)
    inside = reach.project(start, problem.train)
    assert oracles.trees_equal(reach.project(inside, problem.train), inside)
    assert not oracles.trees_equal(projected, far(start))


@by_row
def test_zero_budget_gives_the_input_back(row):
    problem = row.problem(problems.make())
    reach = row.zero(problem)
    poison = reach.init(jax.random.key(0), problem.train)
    back = reach.embed(reach.project(far(poison), problem.train), problem.train)
    assert oracles.trees_equal(back, problem.train)


@by_row
def test_embed_changes_its_rows_only(row):
    problem = row.problem(problems.make())
    reach = row.build(problem, row.budget)
    poisoned = reach.embed(reach.project(far(reach.init(jax.random.key(0), problem.train)), problem.train), problem.train)
    others = jnp.setdiff1d(jnp.arange(problem.train.num_rows), jnp.asarray(problem.touched if reach.rows is None else reach.rows))
    pick = lambda data: jax.tree.map(lambda leaf: leaf[others], data)
    assert oracles.trees_equal(pick(poisoned), pick(problem.train))
    assert not oracles.trees_equal(poisoned, problem.train)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), poisoned) == jax.tree.map(
        lambda a: (a.shape, a.dtype), problem.train
    )


@by_row
def test_a_traced_budget_gives_the_same_set(row):
    problem = row.problem(problems.make())
    poison = far(row.build(problem, row.budget).init(jax.random.key(0), problem.train))
    traced = jax.jit(lambda budget: row.build(problem, budget).project(poison, problem.train))(jnp.float32(row.budget))
    assert oracles.trees_close(traced, row.build(problem, row.budget).project(poison, problem.train))


def test_radii_are_kept():
    problem = problems.make()
    base = problem.train.x[problem.touched]
    for norm, size in (("linf", lambda d: jnp.max(jnp.abs(d), axis=1)), ("l2", lambda d: jnp.linalg.norm(d, axis=1))):
        reach = threat.perturb_rows(problem.touched, radius=0.2, norm=norm)
        moved = reach.project(far(base), problem.train)
        assert float(jnp.max(size(moved - base))) <= 0.2 + 1e-6
        assert float(moved.min()) >= 0 and float(moved.max()) <= 1


def to_one(rows, into=None):
    return threat.backdoor(threat.blend(jnp.ones(problems.DIM), opacity=0.5), rows, relabel=threat.to_class(1), into=into)


BY_ROWS = {
    "append_rows": threat.append_rows,
    "perturb_rows": threat.perturb_rows,
    "flip_labels": lambda rows: threat.flip_labels(rows, budget=1.0),
    "reweigh": lambda rows: threat.reweigh(rows, radius=0.1),
    "backdoor": to_one,
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_are_an_array_or_a_count_of_the_last(name):
    train = problems.make().train
    train = train._replace(y=losses.soft_labels(train.y, problems.CLASSES)) if name == "flip_labels" else train

    def poisoned(rows):
        reach = BY_ROWS[name](rows)
        poison = reach.init(jax.random.key(0), train)
        moved = poison if name == "backdoor" else reach.project(jnp.full_like(poison, 0.5), train)
        named = checks.rows("rows", rows) if reach.rows is None else reach.rows  # a trigger has no axis of rows
        return reach.embed(moved, train), jnp.arange(train.num_rows)[jnp.asarray(named)]

    two = poisoned([train.num_rows - 2, train.num_rows - 1])
    assert two[1].tolist() == [12, 13] and not oracles.trees_equal(two[0], train)
    for rows in (2, np.int64(2), np.array([-2, -1])):
        assert oracles.trees_equal(poisoned(rows), two)
    for nothing in ([], 0, np.zeros(0)):
        assert oracles.trees_equal(poisoned(nothing)[0], train)


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda p: threat.perturb_rows([0], radius=-1.0), "radius"),
        (lambda p: threat.perturb_rows([0], radius=jnp.nan), "radius"),
        (lambda p: threat.perturb_rows([99], radius=1.0).init(None, p.train), "rows"),
        (lambda p: threat.append_rows(-1), "rows"),
        (lambda p: threat.append_rows(5).init(None, p.train), "larger than the reserve"),
        (lambda p: threat.append_rows(99).init(None, p.train), "at most the 14 rows"),
        (lambda p: threat.append_rows([99]).init(None, p.train), "rows: expected rows of the data, -14 to 13"),
        (lambda p: threat.append_rows(jnp.int32(2)), "rows: expected integer rows"),
        (lambda p: threat.perturb_rows([0.0]), "rows: expected integer rows"),
        (lambda p: threat.perturb_rows([True, False]), "rows: expected integer rows"),
        (lambda p: threat.reweigh([0, 14], radius=0.1).init(None, p.train), "rows"),
        (lambda p: to_one([0], into=[0, 1]), "into"),
        (lambda p: to_one([0], into=[14]).embed(None, p.train), "into"),
        (lambda p: threat.flip_labels([0], budget=1.0).init(None, p.train), "soft labels"),
        (lambda p: threat.reweigh([0], radius=-0.1), "radius"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(problems.make())
