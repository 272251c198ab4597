"""What attacks make of empty budgets, unusual models and wrong operands."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, data, losses, measure, threat

KEY = jax.random.key(0)
linear = lambda params, x, key=None: x.reshape(x.shape[0], -1) @ params
loss_fn = losses.cross_entropy(linear)
NOBODY = threat.perturb_rows([])
ADAM = optax.adam(0.02)

EMPTY = {
    "feature_collision": lambda: attacks.feature_collision(linear, threat=NOBODY),
    "feature_collision with Adam": lambda: attacks.feature_collision(linear, threat=NOBODY, optimizer=ADAM),
    "convex_polytope": lambda: attacks.convex_polytope(linear, threat=NOBODY, optimizer=ADAM),
    "bullseye_polytope": lambda: attacks.bullseye_polytope(linear, threat=NOBODY, optimizer=ADAM),
    "gradient_matching": lambda: attacks.gradient_matching(loss_fn, threat=NOBODY, optimizer=ADAM),
    "hidden_trigger": lambda: attacks.hidden_trigger(linear, lambda key, x: x, threat=NOBODY, optimizer=ADAM),
    "sleeper_agent": lambda: attacks.sleeper_agent(
        loss_fn, bilevel.unrolled(loss_fn, optax.sgd(0.1), 2), lambda key, x: x, threat=NOBODY, optimizer=ADAM
    ),
}


def problem(num_rows=6):
    rng = np.random.default_rng(0)
    rows = mj.dataset(rng.uniform(size=(num_rows, 5)).astype(np.float32), np.arange(num_rows) % 3)
    goal = jax.tree.map(lambda leaf: leaf[:1], rows)
    return rows, mj.Known(params=jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), goal=goal)


@pytest.mark.parametrize("name", EMPTY)
def test_no_poisons_are_the_empty_attack(name):
    rows, known = problem()
    poisoned, infos = combine.iterate(EMPTY[name](), 3)(KEY, rows, known)
    jax.tree.map(np.testing.assert_array_equal, poisoned, rows)
    assert infos["outer"].shape == (3,)


def test_a_trigger_is_optimised_like_any_poison():
    rng = np.random.default_rng(0)
    rows = mj.dataset(rng.uniform(size=(8, 3, 3, 1)).astype(np.float32), np.arange(8) % 2)
    known = mj.Known(params=jnp.zeros((9, 2)), goal=rows._replace(y=1 - rows.y))
    start = jnp.full((2, 2, 1), 0.5)
    for k in (2, 3):  # as many rows as the pattern is high, and more
        reach = threat.backdoor(threat.patch(start), jnp.arange(k), relabel=threat.to_class(1))
        trainer = bilevel.unrolled(loss_fn, optax.sgd(0.5), 5)
        attack = attacks.bilevel(losses.goal_loss(loss_fn), trainer, threat=reach, optimizer=optax.sgd(1.0))
        state, infos = combine.run(attack, KEY, rows, known, num_steps=10)
        assert infos["outer"][-1] < infos["outer"][0] and jnp.all(infos["alive"] == 1)
        assert state.poison.shape == start.shape and not jnp.array_equal(state.poison, start)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_margins_of_a_single_logit(shape):
    rng = np.random.default_rng(0)
    rows, w = mj.dataset(rng.normal(size=(12, 5)), np.arange(12) % 2), rng.normal(size=5)
    one = lambda params, x, key=None: (x @ params).reshape(shape)
    flipped, info = attacks.flip_margin(one, num_flips=3)(KEY, rows, mj.Known(params=jnp.asarray(w)))
    margin = np.where(np.arange(12) % 2 == 1, 1, -1) * (np.asarray(rows.x) @ w)
    np.testing.assert_allclose(info["margin"], margin, rtol=1e-4, atol=1e-5)
    nearest = np.sort(np.argsort(np.abs(margin))[:3])
    np.testing.assert_array_equal(np.flatnonzero(info["flipped"]), nearest)
    np.testing.assert_array_equal(flipped.y[nearest], 1 - rows.y[nearest])


def test_the_first_step_of_the_splitting_is_as_long_as_asked():
    rows, known = problem()
    reach = threat.perturb_rows([1], lo=-jnp.inf, hi=jnp.inf)
    attack = attacks.feature_collision(linear, threat=reach, step_size=0.01, relative=False)
    state = attack.init(KEY, rows, known)
    state, info = attack.step(KEY, state, rows, known)
    apart = lambda x: jnp.sum((linear(known.params, x) - linear(known.params, known.goal.x)) ** 2)
    np.testing.assert_allclose(state.trial, rows.x[1:2] - 0.01 * jax.grad(apart)(rows.x[1:2]), rtol=1e-5)
    assert info["step_size"] == np.float32(0.01)


def test_operands_that_are_wrong():
    rows, known = problem()
    with pytest.raises(ValueError, match=r"subject.x: expected one array, or an optimizer"):
        attack = attacks.feature_collision(lambda p, x, key=None: x["a"] @ p, threat=threat.perturb_rows([1]))
        attack.init(KEY, rows._replace(x={"a": rows.x}), known)
    for hits in (11, -1):
        with pytest.raises(ValueError, match="successes: expected from 0 to 10 trials"):
            measure.wilson(hits, 10)
    setup = data.PoisonSetup(0, 1, 0, np.arange(30))
    labels = np.repeat(np.arange(10), 40)
    assert len(data.fine_tuning_rows(labels, setup, num_rows=300)) == 300
    for wanted in (305, 200, 500):  # no multiple of ten; fewer than the bases; more than there are
        with pytest.raises(ValueError, match="num_rows: expected a multiple of the 10 classes"):
            data.fine_tuning_rows(labels, setup, num_rows=wanted)


def test_largest_gradients_passes_over_counters():
    rows, known = problem()
    counted = known.replace(params={"w": known.params, "step": jnp.int32(3)})
    keyed = losses.cross_entropy(lambda params, x, key=None: x @ params["w"])
    found, _ = attacks.largest_gradients(keyed, rows, counted, label=1, num_rows=2)
    np.testing.assert_array_equal(found, attacks.largest_gradients(loss_fn, rows, known, label=1, num_rows=2)[0])


def test_reserved_rows_collide_too():
    rows, known = problem()
    free = threat.reserve(rows, jax.tree.map(lambda leaf: leaf[:2], rows))
    reach = threat.append_rows(2, lo=-9, hi=9)
    attack = combine.keep_best(attacks.feature_collision(linear, threat=reach, beta=0.1, step_size=0.1))
    _, infos = combine.run(attack, KEY, free, known, num_steps=4)
    np.testing.assert_allclose(infos["outer"], infos["value"].mean(axis=1), rtol=1e-6)
    assert infos["outer"][-1] < infos["outer"][0]


def crafted(threat_rows):
    reach = threat.perturb_rows(threat_rows, radius=0.2)
    return {
        "feature_collision": attacks.feature_collision(linear, threat=reach),
        "feature_collision with Adam": attacks.feature_collision(linear, threat=reach, optimizer=ADAM),
        "convex_polytope": attacks.convex_polytope(linear, threat=reach, optimizer=ADAM),
        "bullseye_polytope": attacks.bullseye_polytope(linear, threat=reach, optimizer=ADAM),
        "gradient_matching": attacks.gradient_matching(loss_fn, threat=reach, optimizer=ADAM),
        "hidden_trigger": attacks.hidden_trigger(linear, lambda key, x: x + 0.1, threat=reach, optimizer=ADAM),
    }


@pytest.mark.parametrize("name", crafted([0]))
def test_a_target_of_another_shape_is_named(name):
    rows, known = problem()
    wider = rows._replace(x=jnp.concatenate([rows.x, rows.x], axis=1))
    with pytest.raises(ValueError, match=r"known.goal.x: expected rows like the subject's"):
        crafted([0, 1])[name].init(KEY, rows, known.replace(goal=wider))


@pytest.mark.parametrize("name", crafted([0]))
def test_an_absent_poison_changes_nothing(name):
    rows, known = problem()
    known = known.replace(goal=rows)
    absent = rows._replace(x=rows.x.at[1].set(jnp.nan), weight=rows.weight.at[1].set(0))
    with_it, infos = combine.iterate(crafted([0, 1, 2])[name], 3)(KEY, absent, known)
    without, other = combine.iterate(crafted([0, 2])[name], 3)(KEY, absent, known)
    np.testing.assert_allclose(with_it.x[jnp.array([0, 2])], without.x[jnp.array([0, 2])], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(infos["outer"], other["outer"], rtol=1e-5)
    assert np.isfinite(infos["outer"]).all()
