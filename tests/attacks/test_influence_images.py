"""Koh & Liang's training images: the paper's formula, selection, rounding box, and flips that grow with k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses, threat
from tests.attacks.linear_models import single

LOSS, L2 = losses.logistic(single), 0.001
WIDTH = 48


def features_fn(params, x, key=None):
    return jnp.tanh(x @ params)


def make(dtype):
    rng = np.random.default_rng(0)
    frozen = jnp.asarray((2 * rng.normal(size=(64, WIDTH)) / np.sqrt(64)).astype(dtype))
    head = {"w": jnp.zeros(WIDTH, dtype), "b": jnp.zeros((), dtype)}
    return attacks.Transferred(frozen, head)


@pytest.fixture(scope="module")
def trainer():
    return bilevel.implicit(losses.regularised(LOSS, l2=L2))


def outer_of():
    return losses.availability(attacks.on_features_loss(features_fn, LOSS))


def test_gradient_is_the_perturbation_influence(x64, trainer, pair):
    """`∇L(z_t)ᵀ H⁻¹ ∂_x∇_θ ℓ(x_i) / n`, with a dense Hessian of the head; and central differences with retraining."""
    train, holdout, _ = pair(3, 8, 30, 10, np.float64)
    goal = jax.tree.map(lambda leaf: leaf[:1], holdout)
    params = make(np.float64)
    whole = attacks.on_features(features_fn, trainer)

    @jax.jit
    def value(x):
        data = train._replace(x=x)
        return outer_of()(whole(None, params, data)[0], data, goal)

    gradient = np.asarray(jax.jit(jax.grad(value))(train.x))
    fitted = jax.jit(whole.fit)(None, params, train)[0].head
    flat, unravel = jax.flatten_util.ravel_pytree(fitted)
    bar = lambda x: features_fn(params.features, x)
    mean = lambda t: losses.regularised(LOSS, l2=L2).smooth(unravel(t), train._replace(x=bar(train.x)))
    at = lambda t, x, y: LOSS(unravel(t), mj.dataset(bar(x[None]), y[None]))[0]
    slope_of = jax.jit(jax.grad(at))
    v = jnp.linalg.solve(jax.jit(jax.hessian(mean))(flat), slope_of(flat, goal.x[0], goal.y[0]))
    pull = lambda x: jax.grad(at)(flat, x, train.y[4]) @ v / 30
    np.testing.assert_allclose(gradient[4], jax.jit(jax.grad(pull))(train.x[4]), rtol=1e-5, atol=1e-12)
    direction = np.random.default_rng(2).normal(size=train.x.shape)
    h = 1e-5
    slope = (value(train.x + h * direction) - value(train.x - h * direction)) / (2 * h)
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)


def test_few_images_flip_test_images_and_more_do_more_harm(x64, trainer, pair):
    train, holdout, _ = pair(3, 8, 60, 60, np.float64)
    params, radius = make(np.float64), 0.03
    whole = attacks.on_features(features_fn, trainer)
    clean = jax.jit(whole.fit)(None, params, train)[0]
    score, truth = np.asarray(single(clean.head, features_fn(params.features, holdout.x))), np.asarray(holdout.y) > 0
    right = [i for i in np.argsort(np.abs(score)) if (score[i] > 0) == truth[i]][:3]  # the least certain
    outer = outer_of()

    def flip(goal, num_rows):
        known = mj.Known(params=params, goal=goal)
        rows, _ = attacks.most_influential(jax.random.key(0), outer, whole, train, known, num_rows=num_rows)
        reach = threat.perturb_rows(rows, radius=radius)
        attack = attacks.influence_images(features_fn, LOSS, trainer, threat=reach, step_size=radius / 5)
        state, infos = combine.run(attack, jax.random.key(0), train, known, num_steps=6)
        data = attack.read(state, train)
        return infos["outer"], outer(whole(None, params, data)[0], data, goal), data.x

    losses_of = {}
    for k in (1, 6):
        run = jax.jit(lambda goal, k=k: flip(goal, k))
        results = [run(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], holdout)) for i in right]
        losses_of[k] = np.array([-float(last) for _, last, _ in results])
        start = np.array([-float(first[0]) for first, _, _ in results])
        assert (losses_of[k] > start).all()
        changed = np.abs(np.asarray(results[0][2] - train.x))
        assert changed.max() <= radius + 1e-12 and (changed.max(axis=1) > 0).sum() == k
        assert not np.allclose(results[0][2], results[1][2])  # the target matters
    assert (losses_of[6] > losses_of[1]).all()
    assert (losses_of[6] > np.log(2)).any() and (start < np.log(2)).all(), losses_of  # p(correct) < ½: flipped


def test_half_a_grey_level_keeps_the_8_bit_image(trainer, pair):
    train, holdout, _ = pair(3, 8, 20, 4)
    stored = jnp.round(train.x * 255) / 255
    train = train._replace(x=stored)
    known = mj.Known(params=make(np.float32), goal=holdout)

    @jax.jit
    def craft(rows):
        reach = threat.perturb_rows(rows, radius=0.499 / 255)
        attack = attacks.influence_images(features_fn, LOSS, trainer, threat=reach, step_size=0.2 / 255)
        return attack.read(combine.run(attack, jax.random.key(0), train, known, num_steps=4)[0], train).x

    after = craft(jnp.arange(2))
    assert (np.asarray(after) != np.asarray(train.x)).any()
    np.testing.assert_array_equal(jnp.round(after * 255), jnp.round(stored * 255))


def test_selection_skips_absent_rows_and_refuses_too_many(trainer, pair):
    train, holdout, _ = pair(3, 8, 20, 4)
    whole = attacks.on_features(features_fn, trainer)
    known = mj.Known(params=make(np.float32), goal=holdout)
    pick = jax.jit(lambda data: attacks.most_influential(None, outer_of(), whole, data, known, num_rows=3))
    rows, info = pick(train)
    assert set(np.asarray(rows)) == set(np.argsort(-np.asarray(info["score"]))[:3])
    absent, _ = pick(train._replace(weight=train.weight.at[rows[0]].set(0), x=train.x.at[rows[0]].set(jnp.nan)))
    assert int(rows[0]) not in np.asarray(absent)
    few = train._replace(weight=train.weight.at[1:].set(0))
    for data, num_rows in ((train, train.num_rows + 1), (few, 2)):
        with pytest.raises(ValueError, match=r"num_rows: expected at most the .* present rows"):
            attacks.most_influential(None, outer_of(), whole, data, known, num_rows=num_rows)
