"""Bad input gets one clear error, and nothing is lost."""

import jax
import jax.numpy as jnp
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, checks, combine, losses, threat
from tests import oracles, problems

KEY = jax.random.key(0)


def attack(problem, reach=None):
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 2)
    reach = reach or threat.append_rows(problem.reserved)
    return attacks.error_specific(problem.loss_fn, trainer, threat=reach, optimizer=attacks.unit_rows(0.1))


def test_nan_in_data_is_refused_at_the_border():
    problem = problems.make()
    train = problem.train._replace(x=problem.train.x.at[3, 1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"subject\.x: expected finite values, got NaN or infinity in 1 rows \(first: 3\)"):
        combine.run(attack(problem), KEY, train, problem.known, num_steps=1)


def test_labels_out_of_range_are_refused_or_poison_the_result():
    problem = problems.make()
    train = problem.train._replace(y=problem.train.y.at[0].set(7))
    with pytest.raises(ValueError, match=r"data\.y: expected labels in \[0, 3\), got 0 to 7"):
        combine.run(attack(problem), KEY, train, problem.known, num_steps=1)
    jitted = jax.jit(lambda data: losses.empirical(problem.loss_fn)(problem.params, data))
    assert bool(jnp.isnan(jitted(train))) and not bool(jnp.isnan(jitted(problem.train)))


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda d: d._replace(y=jnp.zeros_like(d.y)), r"none of \[1, 2\]"),
        (lambda d: d._replace(y=d.y.at[0].set(3)), r"labels in \[0, 3\)"),
        (lambda d: d._replace(weight=-d.weight), "non-negative"),
        (lambda d: d._replace(weight=0 * d.weight), "positive weight"),
    ],
)
def test_data_is_checked(change, match):
    problem = problems.make()
    checks.data("train", problem.train, 3)
    with pytest.raises(ValueError, match=match):
        checks.data("train", change(problem.train), 3)


def test_an_empty_budget_gives_the_input_back_and_a_large_one_is_refused():
    problem = problems.make()
    nothing = attack(problem, threat.append_rows(0))
    state, _ = combine.run(nothing, KEY, problem.train, problem.known, num_steps=2)
    assert oracles.trees_equal(nothing.read(state, problem.train), problem.train)
    with pytest.raises(ValueError, match="larger than the reserve"):
        combine.run(attack(problem, threat.append_rows(5)), KEY, problem.train, problem.known, num_steps=1)


def test_a_trainer_that_cannot_be_differentiated_is_noticed():
    problem = problems.make()
    blind = lambda key, params, data: (jax.lax.stop_gradient(params), {})
    outer = losses.goal_loss(problem.loss_fn)
    stuck = attacks.bilevel(
        outer, blind, threat=threat.append_rows(problem.reserved), optimizer=attacks.unit_rows(0.1)
    )
    with pytest.raises(ValueError, match="no poison row had a gradient"):
        attacks.require_alive(combine.run(stuck, KEY, problem.train, problem.known, num_steps=2)[1])


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: mj.dataset(jnp.zeros((3, 2)), jnp.zeros(2)), "same number of rows"),
        (lambda: mj.dataset({}, jnp.zeros(2)), "empty pytree"),
        (lambda: mj.dataset(jnp.zeros((2, 2)), jnp.zeros(2), jnp.ones(3)), "weight"),
        (lambda: mj.Known(gaol=1), "gaol"),
    ],
)
def test_shapes_and_typos_are_named(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call()
