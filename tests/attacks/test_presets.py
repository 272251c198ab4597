"""The named presets on real digits: they lower their goal, beat controls, and obey it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses, threat
from tests import problems
from tests.attacks.linear_models import linear

LOSS = losses.cross_entropy(linear)
START = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
K = 20


@pytest.fixture(scope="module")
def split(digits):
    x, y = (jnp.asarray(a) for a in digits)
    return tuple(mj.dataset(x[a:b], y[a:b]) for a, b in ((0, 200), (200, 600), (1000, 1797)))


@pytest.fixture(scope="module")
def trainer():
    return bilevel.unrolled(LOSS, optax.sgd(0.5), 30)


@pytest.fixture(scope="module")
def crafted(split, trainer):
    """The swap-only start, and error-specific poisons for 8 -> 3 and for 8 -> 1."""
    train, holdout, _ = split
    starts = attacks.start_points(jax.random.key(1), train, K, rule=attacks.swap(3, 8), classes=(3, 8))
    subject = threat.reserve(train, starts)
    attack = attacks.error_specific(
        LOSS, trainer, threat=threat.append_rows(K), optimizer=attacks.unit_rows(0.4), order=attacks.joint()
    )

    @jax.jit
    def craft(goal):
        known = mj.Known(params=START, goal=goal)
        state, infos = combine.run(attack, jax.random.key(0), subject, known, num_steps=25)
        return attack.read(state, subject), infos

    goals = [attacks.error_specific_goal(holdout, source=8, target=t, clean_weight=0.05) for t in (3, 1)]
    return subject, goals, [craft(goal) for goal in goals]


def error(trainer, data, test, source, as_label=None):
    params, _ = jax.jit(trainer.fit)(jax.random.key(0), START, data)
    predicted = np.asarray(jnp.argmax(linear(params, test.x), axis=1))
    of = np.asarray(test.y) == source
    return (predicted[of] != source).mean() if as_label is None else (predicted[of] == as_label).mean()


def test_error_specific_beats_clean_and_swapping(split, trainer, crafted):
    _, _, test = split
    subject, _, ((poisoned, infos), _) = crafted
    swapped = subject._replace(weight=jnp.ones_like(subject.weight))
    clean, swap_only, ours = (error(trainer, d, test, 8) for d in (subject, swapped, poisoned))
    assert ours >= swap_only + 0.4 and ours >= clean + 0.4, (clean, swap_only, ours)
    assert infos["outer"][-1] < infos["outer"][0]
    assert float(poisoned.x.min()) >= 0 and float(poisoned.x.max()) <= 1
    attacks.require_alive(infos)


def test_the_target_matters(split, trainer, crafted):
    _, _, test = split
    _, _, ((to_three, _), (to_one, _)) = crafted
    assert not np.allclose(to_three.x[-K:], to_one.x[-K:])
    assert error(trainer, to_three, test, 8, 3) > error(trainer, to_one, test, 8, 3)


def test_availability_raises_the_error(split, trainer):
    train, holdout, test = split
    starts = attacks.start_points(jax.random.key(1), train, K, rule=attacks.random_other(10))
    subject = threat.reserve(train, starts)
    attack = attacks.availability(LOSS, trainer, threat=threat.append_rows(K), optimizer=attacks.unit_rows(0.4))
    known = mj.Known(params=START, goal=holdout)
    state, infos = jax.jit(lambda: combine.run(attack, jax.random.key(0), subject, known, num_steps=20))()
    flipped = subject._replace(weight=jnp.ones_like(subject.weight))

    def accuracy(data):
        params, _ = trainer(jax.random.key(0), START, data)
        return float(jnp.mean(jnp.argmax(linear(params, test.x), axis=1) == test.y))

    assert infos["outer"][-1] < infos["outer"][0] < 0
    assert accuracy(attack.read(state, subject)) < accuracy(flipped) - 0.02


def test_targeted_flips_the_chosen_points(split, trainer):
    train, _, test = split
    points = jax.tree.map(lambda leaf: leaf[:3], test)
    wanted = (points.y + 1) % 10
    starts = attacks.start_points(jax.random.key(2), train, K, rule=attacks.random_other(10))
    subject = threat.reserve(train, starts)
    attack = attacks.targeted(LOSS, trainer, threat=threat.append_rows(K), optimizer=attacks.unit_rows(0.4))
    known = mj.Known(params=START, goal=attacks.targeted_goal(points, wanted))
    _, infos = jax.jit(lambda: combine.run(attack, jax.random.key(0), subject, known, num_steps=20))()
    assert infos["outer"][-1] < infos["outer"][0] - 0.3


def test_zero_budget_returns_the_input(split, trainer):
    train, holdout, _ = split
    reach = threat.perturb_rows(jnp.arange(3), radius=0.0)
    attack = attacks.availability(LOSS, trainer, threat=reach, optimizer=attacks.unit_rows(0.4))
    state, _ = combine.run(attack, jax.random.key(0), train, mj.Known(params=START, goal=holdout), num_steps=2)
    for new, old in zip(attack.read(state, train), train):
        np.testing.assert_array_equal(new, old)


def test_a_gradient_that_is_not_finite_moves_nothing(split):
    train, holdout, _ = split
    coin = lambda key: jax.random.bernoulli(key)
    diverges = lambda key, params, data: (jnp.mean(data.x) * jnp.where(coin(key), jnp.nan, 1.0), {})
    attack = attacks.bilevel(
        lambda params, data, goal: params,
        diverges,
        threat=threat.perturb_rows(jnp.arange(3), radius=0.5),
        optimizer=optax.adam(0.01),
        fixed_key=False,
    )
    known = mj.Known(params=START, goal=holdout)
    state = attack.init(jax.random.key(0), train, known)
    seen = set()
    for key in jax.random.split(jax.random.key(1), 8):
        new, info = attack.step(key, state, train, known)
        same = [bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(new[:2]), jax.tree.leaves(state[:2]))]
        assert bool(info["finite"]) != bool(coin(key)) and int(new.step) == int(state.step) + 1
        assert all(same) if coin(key) else not any(same)
        assert np.isfinite(new.poison).all()
        seen.add(bool(coin(key)))
        state = new
    assert seen == {True, False}


def test_goals_keep_their_shape_and_weigh(split):
    _, holdout, _ = split
    holdout = holdout._replace(weight=holdout.weight.at[:50].set(0))
    paper = attacks.error_specific_goal(holdout, source=8, target=3)
    mixed = attacks.error_specific_goal(holdout, source=8, target=3, clean_weight=0.5)
    of = np.asarray(holdout.y) == 8
    assert paper.y.shape == mixed.y.shape == holdout.y.shape
    np.testing.assert_array_equal(np.asarray(mixed.y), np.where(of, 3, holdout.y))
    np.testing.assert_array_equal(np.asarray(paper.weight), of * np.asarray(holdout.weight))
    np.testing.assert_array_equal(np.asarray(mixed.weight), np.where(of, 1, 0.5) * np.asarray(holdout.weight))
    only = jax.tree.map(lambda leaf: leaf[of & (np.asarray(holdout.weight) > 0)], holdout)
    dropped = losses.empirical(LOSS)(START, attacks.targeted_goal(only, 3))
    np.testing.assert_allclose(losses.empirical(LOSS)(START, paper), dropped, rtol=1e-6)
    with pytest.raises(ValueError, match="source"):
        attacks.error_specific_goal(holdout, source=11)


@pytest.mark.parametrize("labels", [[-1.0, 1.0], [False, True]])
def test_labels_that_are_signs_or_flags_are_swapped(labels):
    y = jnp.asarray(labels)[jnp.array([0, 1, 1, 0])]
    rows = mj.dataset(jnp.arange(4.0)[:, None], y)
    starts = attacks.start_points(jax.random.key(0), rows, 4, rule=attacks.swap(*labels))
    np.testing.assert_array_equal(starts.y, jnp.where(y == labels[0], *labels[::-1])[starts.x[:, 0].astype(int)])
    goal = attacks.error_specific_goal(rows, source=labels[1], target=labels[0])
    assert (goal.y == labels[0]).all() and goal.y.dtype == y.dtype


def test_start_points_copy_present_rows_of_the_classes(split):
    train, _, _ = split
    train = train._replace(weight=train.weight.at[::2].set(0))
    starts = attacks.start_points(jax.random.key(3), train, 9, rule=attacks.swap(3, 8), classes=(3, 8))
    for x, y, w in zip(*map(np.asarray, starts)):
        same = np.flatnonzero((np.asarray(train.x) == x[None]).all(axis=1))
        assert w == 1 and any(train.weight[i] > 0 and {int(train.y[i]), int(y)} == {3, 8} for i in same)
    assert len({x.tobytes() for x in np.asarray(starts.x)}) == 9
    few = jax.tree.map(lambda leaf: leaf[:6], train)
    many = attacks.start_points(jax.random.key(3), few, 8, rule=attacks.random_other(10))
    assert many.num_rows == 8
    assert (attacks.random_other(10)(jax.random.key(0), train.y) != train.y).all()
    with pytest.raises(ValueError, match="classes"):
        attacks.start_points(jax.random.key(3), train, 2, rule=attacks.swap(3, 8), classes=(77,))


def test_a_row_smaller_than_its_square_still_moves():
    rows = jnp.array([[1e-23, 0.0], [3.0, 4.0], [0.0, 0.0]], jnp.float32)
    moved, _ = attacks.unit_rows(0.5).update(rows, optax.EmptyState())
    np.testing.assert_allclose(moved, [[-0.5, 0], [-0.3, -0.4], [0, 0]], rtol=1e-6)


def test_greedy_leaves_the_rows_whose_turn_has_not_come_as_they_are():
    problem = problems.make()
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 2)
    spy = lambda key, params, data: (trainer(key, params, data)[0], {"seen": data})
    reach = threat.perturb_rows(problem.touched, radius=0.1)
    attack = attacks.bilevel(losses.goal_loss(problem.loss_fn), spy, threat=reach, optimizer=attacks.unit_rows(0.1),
                             order=attacks.greedy(2))  # fmt: skip
    _, info = combine.run(attack, jax.random.key(0), problem.train, problem.known, num_steps=1)
    np.testing.assert_array_equal(info["train"]["seen"].weight[0], problem.train.weight)
