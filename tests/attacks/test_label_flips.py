"""Label flips: budgets, absent rows, brute force, and harm on real digits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, losses
from mlsec_jax.combine import needs_model
from tests.attacks.linear_models import linear, single

LOSS = losses.logistic(single)
START = {"w": jnp.zeros(64), "b": jnp.zeros(())}
TRAINER = bilevel.unrolled(LOSS, optax.sgd(0.5), 20)


def blobs(n=16):
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, 2)) + 1.5 * (2 * y[:, None] - 1)
    return mj.dataset(jnp.asarray(x.astype(np.float32)), jnp.asarray(y.astype(np.int32)))


@pytest.fixture(scope="module")
def problem(pair):
    train, holdout, test = pair(3, 8, 40, 80)
    params = jax.jit(TRAINER.fit)(jax.random.key(0), START, train)[0]
    return train, holdout, test, params


def all_flips(problem, num_flips=6):
    _, holdout, _, params = problem
    two = lambda p, x, key=None: jnp.stack([-single(p, x), single(p, x)], axis=-1) / 2
    outer = losses.availability(LOSS)
    known = mj.Known(params=START, goal=holdout)
    trained = mj.Known(params=params)
    return {
        "random": (attacks.flip_random(num_flips=num_flips, num_classes=2), mj.Known()),
        "stratified": (attacks.flip_random(num_flips=num_flips, num_classes=2, stratify=True), mj.Known()),
        "near": (attacks.flip_margin(two, num_flips=num_flips), trained),
        "far": (attacks.flip_margin(two, num_flips=num_flips, farthest=True), trained),
        "greedy": (attacks.flip_greedy(outer, TRAINER, num_flips=num_flips, num_classes=2, over="vmap"), known),
        "alfa": (attacks.flip_alfa(LOSS, TRAINER, num_flips=num_flips), known),
    }


@pytest.fixture(scope="module")
def flipped(problem):
    train = problem[0]._replace(weight=problem[0].weight.at[:5].set(0))
    flips = all_flips(problem)
    each = lambda known, name: flips[name][0](jax.random.key(0), train, known[name])
    act = jax.jit(lambda known: {name: each(known, name) for name in flips})
    return train, act({name: known for name, (_, known) in flips.items()})


@pytest.mark.parametrize("name", ["random", "stratified", "near", "far", "greedy", "alfa"])
def test_flips_exactly_the_budget_of_present_rows(flipped, name):
    train, results = flipped
    data, info = results[name]
    changed = np.asarray(data.y != train.y)
    assert changed.sum() == 6 and not changed[:5].any()
    np.testing.assert_array_equal(changed, info["flipped"])
    assert data.y.dtype == train.y.dtype and set(np.unique(data.y)) <= {0, 1}
    np.testing.assert_array_equal(data.x, train.x)
    np.testing.assert_array_equal(data.weight, train.weight)


def test_chosen_flips_harm_more_than_random_ones(problem, flipped):
    test = problem[2]
    _, results = flipped

    @jax.jit
    def harm(data):
        params, _ = TRAINER(jax.random.key(0), START, data)
        return losses.empirical(LOSS)(params, test)

    loss = {name: float(harm(data)) for name, (data, _) in results.items()}
    draw = jax.jit(attacks.flip_random(num_flips=6, num_classes=2))
    drawn = [float(harm(draw(jax.random.key(k), flipped[0], mj.Known())[0])) for k in range(8)]
    bar = np.mean(drawn) + 2 * np.std(drawn) / np.sqrt(8)
    assert loss["greedy"] > bar and loss["alfa"] > bar and loss["far"] > bar, (loss, drawn)
    assert loss["near"] < loss["far"]


def test_greedy_is_the_best_single_flip_and_follows_its_goal():
    data = blobs(8)._replace(weight=jnp.ones(8).at[0].set(0))
    start = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    outer = losses.goal_loss(LOSS)
    results = []
    flip = jax.jit(attacks.flip_greedy(outer, TRAINER, num_flips=1, num_classes=2))
    value = jax.jit(lambda one, goal: outer(TRAINER(jax.random.key(0), start, one)[0], one, goal))
    for label in (0, 1):
        goal = mj.dataset(jnp.array([[0.3, -0.1]]), jnp.array([label]))
        ours, info = flip(jax.random.key(0), data, mj.Known(params=start, goal=goal))
        tried = [float(value(data._replace(y=data.y.at[row].set(1 - data.y[row])), goal)) for row in range(1, 8)]
        assert int(jnp.argmax(ours.y != data.y)) == 1 + int(np.argmin(tried))
        np.testing.assert_allclose(info["outer"][0], min(tried), rtol=1e-4)
        results.append(np.asarray(ours.y))
    assert (results[0] != results[1]).any()


def test_alfa_settles_on_the_brute_force_optimum_of_its_linear_program():
    """At the fixed point no other choice of rows has a lower sum of loss differences."""
    data, start = blobs(10), {"w": jnp.zeros(2), "b": jnp.zeros(())}
    flip = attacks.flip_alfa(LOSS, TRAINER, num_flips=2, num_rounds=8)
    ours, info = jax.jit(flip)(jax.random.key(0), data, mj.Known(params=start))
    assert int(info["changed"][-1]) == 0
    fit = jax.jit(TRAINER.fit)
    clean, poisoned = (fit(jax.random.key(0), start, d)[0] for d in (data, ours))
    delta = lambda y: np.asarray(LOSS(poisoned, data._replace(y=y)) - LOSS(clean, data._replace(y=y)), np.float64)
    keep, change = delta(data.y), delta(1 - data.y)
    cost = lambda rows: sum(change[i] if i in rows else keep[i] for i in range(10))
    best = min(itertools.combinations(range(10), 2), key=cost)
    assert set(best) == set(np.flatnonzero(np.asarray(ours.y != data.y)))


def test_margins_rank_rows_and_name_the_runner_up(digits):
    x, y = (jnp.asarray(a[:30]) for a in digits)
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(64, 10)).astype(np.float32)), "b": jnp.zeros(10)}
    flip = attacks.flip_margin(linear, num_flips=4)
    assert needs_model(flip)
    data, _ = flip(jax.random.key(0), mj.dataset(x, y), mj.Known(params=params))
    logits = np.array(linear(params, x))
    own = logits[np.arange(30), y]
    logits[np.arange(30), y] = -np.inf
    changed = np.flatnonzero(np.asarray(data.y != y))
    assert set(changed) == set(np.argsort(np.abs(own - logits.max(axis=1)))[:4])
    np.testing.assert_array_equal(np.asarray(data.y)[changed], logits.argmax(axis=1)[changed])


def test_stratified_flips_keep_the_prior():
    y = jnp.asarray(np.repeat([0, 1], [45, 15]).astype(np.int32))
    data = mj.dataset(jnp.zeros((60, 1)), y)
    flip = jax.jit(attacks.flip_random(num_flips=12, num_classes=2, stratify=True))
    for k in range(5):
        changed = np.asarray(flip(jax.random.key(k), data, mj.Known())[1]["flipped"])
        assert abs(changed[:45].sum() - 9) <= 1


def test_random_flips_are_uniform_over_other_classes():
    y = jnp.zeros(3000, jnp.int32).at[:3].set(jnp.arange(3))
    data = mj.dataset(jnp.zeros((3000, 1)), y)
    flip = attacks.flip_random(num_flips=2000, num_classes=3)
    after = np.asarray(flip(jax.random.key(0), data, mj.Known())[0].y)[3:]
    counts = np.bincount(after, minlength=3)
    assert abs(counts[1] - counts[2]) < 5 * np.sqrt(2000)
    assert abs(counts[0] - 1000) <= 3


def test_zero_flips_and_bad_budgets(problem):
    train = problem[0]
    for name, (flip, known) in all_flips(problem, 0).items():
        if name in ("random", "near", "greedy"):
            np.testing.assert_array_equal(flip(jax.random.key(0), train, known)[0].y, train.y)
    with pytest.raises(ValueError, match="num_flips"):
        attacks.flip_random(num_flips=41, num_classes=2)(jax.random.key(0), train, mj.Known())
    with pytest.raises(ValueError, match="integer labels"):
        soft = train._replace(y=jnp.ones((40, 2)) / 2)
        attacks.flip_random(num_flips=1, num_classes=2)(jax.random.key(0), soft, mj.Known())
    with pytest.raises(ValueError, match=r"known\.params"):
        attacks.flip_margin(linear, num_flips=1)(jax.random.key(0), train, mj.Known())


def test_stratified_flips_rank_within_their_class_in_linear_memory():
    n, budget = 157, 40
    y = jnp.asarray(np.repeat([2, 0, 1], [100, 17, 40]), jnp.int32)
    data = mj.dataset(jnp.zeros((n, 1)), y)._replace(weight=jnp.ones(n).at[::9].set(0))
    flip = attacks.flip_random(num_flips=budget, num_classes=3, stratify=True)
    act = lambda data: flip(jax.random.key(3), data, mj.Known())
    assert f"[{n},{n}]" not in str(jax.make_jaxpr(act)(data))
    order_key, _ = jax.random.split(jax.random.key(3))
    score, present = np.asarray(jax.random.uniform(order_key, (n,))), np.asarray(data.weight) > 0
    share = np.full(n, np.inf, np.float32)
    for c in range(3):
        (rows,) = np.nonzero(present & (np.asarray(y) == c))
        ranks = np.argsort(np.argsort(score[rows])).astype(np.float32)
        share[rows] = (ranks + score[rows]) / np.float32(rows.size)
    expected = np.isin(np.arange(n), np.argsort(share)[:budget])
    np.testing.assert_array_equal(jax.jit(act)(data)[1]["flipped"], expected)


@pytest.mark.parametrize("dtype,num_classes", [(jnp.int8, 100), (jnp.uint8, 200)])
def test_every_other_class_is_drawn_where_eight_bits_hold_the_labels(dtype, num_classes):
    data, key = mj.dataset(jnp.zeros((4000, 1)), jnp.full(4000, num_classes - 10, dtype)), jax.random.key(0)
    flipped = attacks.flip_random(num_flips=4000, num_classes=num_classes)(key, data, mj.Known())[0].y
    for after in (flipped, attacks.random_other(num_classes)(key, data.y)):
        assert after.dtype == dtype
        assert set(after.tolist()) == set(range(num_classes)) - {num_classes - 10}


def test_greedy_flips_nothing_where_no_candidate_gives_a_number():
    data = blobs(8)._replace(weight=jnp.ones(8).at[0].set(0))
    start = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    diverging = bilevel.unrolled(LOSS, optax.sgd(jnp.nan), 2)
    flip = attacks.flip_greedy(losses.availability(LOSS), diverging, num_flips=2, num_classes=2)
    flipped, info = flip(jax.random.key(0), data, mj.Known(params=start, goal=data))
    np.testing.assert_array_equal(flipped.y, data.y)
    assert not info["flipped"].any() and np.isinf(info["outer"]).all()
    with pytest.raises(ValueError, match=r"known\.goal\.x: expected finite values"):
        flip(jax.random.key(0), data, mj.Known(params=start, goal=data._replace(x=jnp.full_like(data.x, jnp.nan))))


def test_greedy_flips_stop_with_the_present_rows():
    data = blobs(4)._replace(weight=jnp.array([0.0, 1.0, 1.0, 1.0]))
    start = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    outer = lambda params, rows, goal: jnp.where(rows.y[1] != data.y[1], jnp.nan, 0.0)  # the first flip of row 1 ends it
    flip = attacks.flip_greedy(outer, TRAINER, num_flips=3, num_classes=2)
    flipped, info = flip(jax.random.key(0), data, mj.Known(params=start, goal=data))
    np.testing.assert_array_equal(flipped.y != data.y, [False, False, True, True])
    np.testing.assert_array_equal(info["outer"], [0, 0, np.inf])
