"""MetaPoison: the meta-gradient against a plain unroll, the population's life, and harm to victims of unseen seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, loop, losses, threat

pytestmark = pytest.mark.optimised

HIDDEN = 12


def apply_fn(params, x, key=None):
    return jnp.tanh(x @ params["w1"] + params["b1"][None, :]) @ params["w2"] + params["b2"][None, :]


def init_fn(key, classes=3):
    first, second = jax.random.split(key)
    draw = lambda k, shape: jax.random.normal(k, shape) / float(np.sqrt(shape[0]))
    w1, w2 = draw(first, (64, HIDDEN)), draw(second, (HIDDEN, classes))
    return {"w1": w1, "b1": jnp.zeros(HIDDEN, w1.dtype), "w2": w2, "b2": jnp.zeros(classes, w2.dtype)}


LOSS = losses.cross_entropy(apply_fn)
OUTER = losses.goal_loss(losses.margin(apply_fn))


@pytest.fixture(scope="module")
def problem(digits):
    """Digits 2, 3, 5; one target 2; the poisoned rows are 5s."""
    x, y = digits
    rows = np.isin(y, (2, 3, 5))
    x, y = x[rows], np.searchsorted((2, 3, 5), y[rows]).astype(np.int32)
    train = mj.dataset(jnp.asarray(x[:60]), jnp.asarray(y[:60]))
    poisoned = jnp.asarray(np.flatnonzero(y[:60] == 2)[:12])
    target = 60 + int(np.flatnonzero(y[60:] == 0)[0])
    return train, poisoned, lambda label: mj.dataset(jnp.asarray(x[target : target + 1]), jnp.array([label]))


def attack_of(rows, radius=0.3, step_size=0.05, **options):
    options = {"num_surrogates": 4, "num_epochs": 8, "batch_size": 20, "unroll": 2, **options}
    return attacks.metapoison(
        OUTER, LOSS, init_fn, threat=threat.perturb_rows(rows, radius=radius), optimizer=optax.adam(step_size),
        inner_optimizer=optax.sgd(0.3), **options,
    )


@pytest.fixture(scope="module")
def crafted(problem):
    train, rows, goal_of = problem

    @jax.jit
    def craft(goal, rows, radius):
        attack = attack_of(rows, radius)
        state, infos = combine.run(attack, jax.random.key(0), train, mj.Known(goal=goal), num_steps=20)
        return attack.read(state, train), infos

    results = {label: craft(goal_of(label), rows, 0.3) for label in (1, 2)}
    return {**results, "none": craft(goal_of(2), rows, 0.0)}


def test_it_harms_victims_of_unseen_seeds_more_than_no_poison(problem, crafted):
    train, _, goal_of = problem
    victim = bilevel.unrolled(LOSS, optax.sgd(0.3), 24, batching=loop.shuffled(20))

    @jax.jit
    def margins(data):
        one = lambda k: OUTER(victim(jax.random.key(k), init_fn(jax.random.key(1000 + k)), data)[0], data, goal_of(2))
        return jax.lax.map(one, jnp.arange(8))

    clean, ours, other = (np.asarray(margins(d)) for d in (train, crafted[2][0], crafted[1][0]))
    gain = clean - ours
    assert gain.mean() > 3 * gain.std() / np.sqrt(8) and gain.mean() > 0.2, (clean, ours)
    assert other.mean() > ours.mean()  # the target matters
    look_ahead, without = (np.asarray(crafted[k][1]["outer"]) for k in (2, "none"))
    assert (look_ahead[1:] < without[1:]).all() and look_ahead[0] == without[0]  # surrogates never saw the poisons


def test_poisons_stay_within_the_budget(problem, crafted):
    train, rows, _ = problem
    data, infos = crafted[2]
    change = np.abs(np.asarray(data.x - train.x))
    assert 0 < change.max() <= 0.3 + 1e-6
    assert set(np.flatnonzero(change.max(axis=1))) <= set(np.asarray(rows))
    np.testing.assert_array_equal(data.y, train.y)
    epoch = np.asarray(infos["epoch"])
    np.testing.assert_array_equal(epoch[0], [1, 3, 5, 7])
    np.testing.assert_array_equal((epoch[1] - epoch[0]) % 8, 1)
    assert epoch.max() < 8


def test_gradient_is_that_of_the_unrolled_steps(x64, problem):
    """One surrogate, one batch an epoch: central differences through K plain SGD steps, poisons in the first only."""
    train, rows, goal_of = problem
    train = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, train)
    rows, goal = rows[:2], goal_of(2)._replace(weight=jnp.ones(1))
    goal = goal._replace(x=goal.x.astype(np.float64))
    params = jax.tree.map(lambda a: a.astype(np.float64), init_fn(jax.random.key(5)))
    mean_loss = losses.empirical(LOSS)

    def meta(poison):
        now, total = params, 0.0
        for k in range(3):
            data = train._replace(x=train.x.at[rows].set(poison)) if k == 0 else train
            now = jax.tree.map(lambda p, g: p - 0.3 * g, now, jax.grad(mean_loss)(now, data))
            total = total + OUTER(now, train, goal)
        return total / 3

    def step(rows):
        attack = attacks.metapoison(
            OUTER, LOSS, lambda key: params, threat=threat.perturb_rows(rows), optimizer=optax.sgd(1e-3),
            inner_optimizer=optax.sgd(0.3), batch_size=60, unroll=3, num_epochs=3,
        )
        known = mj.Known(goal=goal, surrogates=jax.tree.map(lambda a: a[None], params))
        state = attack.init(jax.random.key(0), train, known)
        return attack.step(jax.random.key(0), state, train, known)

    state, info = jax.jit(step)(rows)
    base = train.x[rows]
    inside = np.asarray((base > 0.1) & (base < 0.9)).astype(np.float64)  # elsewhere the box of [0, 1] may bind
    value, direction = jax.jit(meta), np.random.default_rng(0).normal(size=base.shape) * inside
    slope = (value(base + 1e-5 * direction) - value(base - 1e-5 * direction)) / 2e-5
    moved = np.asarray(state.poison - base) * inside
    np.testing.assert_allclose(-np.sum(moved * direction) / 1e-3, slope, rtol=1e-5)
    np.testing.assert_allclose(info["outer"], value(base), rtol=1e-9)
    clean = jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(mean_loss)(params, train))
    for ours, theirs in zip(jax.tree.leaves(state.surrogates.params), jax.tree.leaves(clean)):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-9, atol=1e-12)  # the surrogate advances on clean data


@pytest.mark.slow
def test_vmap_over_surrogates_is_the_map_and_zero_budget_is_the_input(problem, crafted):
    train, rows, goal_of = problem

    @jax.jit
    def craft(rows):
        results = []
        for over in ("map", "vmap"):
            attack = attack_of(rows, num_surrogates=2, num_epochs=2, batch_size=30, over=over)
            state, _ = combine.run(attack, jax.random.key(0), train, mj.Known(goal=goal_of(2)), num_steps=2)
            results.append(attack.read(state, train).x)
        return results

    mapped, batched = craft(rows)
    np.testing.assert_allclose(mapped, batched, atol=1e-3)
    np.testing.assert_array_equal(crafted["none"][0].x, train.x)


def test_surrogates_that_diverge_leave_the_poisons_as_they_were(problem):
    train, rows, goal_of = problem
    attack = attacks.metapoison(
        OUTER, LOSS, init_fn, threat=threat.perturb_rows(rows[:2], radius=0.3), optimizer=optax.adam(0.05),
        inner_optimizer=optax.sgd(jnp.inf), batch_size=60, num_surrogates=1, num_epochs=1,
    )
    state, infos = combine.run(attack, jax.random.key(0), train, mj.Known(goal=goal_of(2)), num_steps=2)
    assert not infos["finite"].any()
    np.testing.assert_array_equal(state.poison, train.x[rows[:2]])


def test_an_epoch_has_batches():
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, got 0"):
        attack_of([0], batch_size=0)
