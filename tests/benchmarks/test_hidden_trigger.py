"""The hidden-trigger benchmark's own pieces, on features in which the trigger, and collisions with it, are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import hidden_trigger
from benchmarks._clean_label import HeadRecipe, Images, Net, first_of_each
from mlsec_jax import models, threat

TINY = hidden_trigger.Size(1, 6, 1, 12, 6, 8, 60, 8, pairs=5, compared=1, test=10)
CHECKERS = (np.indices((12, 12)).sum(axis=0) % 2 - 0.5).astype(np.float32)


def features(params, x, key=None):
    """The left half's mean, the right half's, and how much the image is a checkerboard."""
    del params, key
    halves = [20 * jnp.mean(half - 0.49, axis=(1, 2, 3)) for half in (x[:, :, :6], x[:, :, 6:])]
    return jnp.stack([*halves, jnp.tensordot(x[..., 0], CHECKERS, 2)], axis=1)


NET = Net(models.Model(lambda key, x: {}, features, features), {})


@pytest.fixture(scope="module")
def pictures():
    """Of even classes the left half is brighter, of odd ones the right half."""
    rng = np.random.default_rng(0)

    def make(n):
        y = np.arange(n) % 10
        x = rng.integers(115, 126, (n, 12, 12, 1))
        for half, odd in ((slice(0, 6), 0), (slice(6, 12), 1)):
            x[y % 2 == odd, :, half] += 10
        return x.astype(np.uint8), y

    return Images(*make(300), *make(100), ("noise",))


@pytest.fixture
def faint(monkeypatch):
    """A trigger that the radius can imitate."""
    trigger = threat.additive(0.04 * CHECKERS[:, :, None], radius=0.02)
    monkeypatch.setattr(hidden_trigger, "colours", lambda key, channels: trigger)


def rows_of(x):
    return {bytes(np.rint(np.asarray(row) * 255).astype(np.uint8)) for row in x}


def test_nobody_sees_a_row_twice(pictures):
    task = hidden_trigger.problem(0, pictures, TINY)
    assert task.crafting.shape[:2] == (10, 12) and task.tuned.shape[:2] == (10, 8)
    assert len({tuple(pair) for pair in task.pairs.tolist()}) == 5 and (task.pairs[:, 0] != task.pairs[:, 1]).all()
    trained_on = first_of_each(pictures.y, TINY.pretrain)
    assert sorted(pictures.y[trained_on].tolist()) == sorted(6 * list(range(10)))
    rest = np.setdiff1d(np.arange(300), trained_on)
    for label in range(10):
        own, held_out = rest[pictures.y[rest] == label], pictures.y_test == label
        crafting, tuned, test = (rows_of(x[label]) for x in (task.crafting, task.tuned, task.test))
        assert crafting | tuned <= rows_of(pictures.x[own] / 255) and len(crafting | tuned) == 20
        assert test <= rows_of(pictures.x_test[held_out] / 255)
    assert not np.array_equal(task.pairs, hidden_trigger.problem(1, pictures, TINY).pairs)


def test_features_are_every_blocks_maxima_and_means_standardised(pictures, monkeypatch):
    blocks = lambda params, x, key=None: (params * x, jnp.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(0, 1)]), jnp.zeros((len(x), 1)))
    net = Net(models.Model(None, None, None, blocks), jnp.float32(3))
    monkeypatch.setattr(hidden_trigger, "pretrained", lambda *args, **options: net)
    found = hidden_trigger.extractor(pictures, TINY)
    x = jnp.asarray(pictures.x[first_of_each(pictures.y, TINY.pretrain)] / 255, jnp.float32)
    y = np.asarray(found.model.features(found.params, x))
    pool = lambda block: [np.asarray(block).max(axis=(1, 2)), np.asarray(block).mean(axis=(1, 2))]
    raw = np.concatenate([part for block in blocks(3, x)[:2] for part in pool(block)], axis=1)
    expected = (raw - raw.mean(axis=0)) / np.maximum(raw.std(axis=0), 0.02)  # a dead channel stays finite
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_the_closest_poisons_are_used_in_whole_levels_within_the_radius(pictures, faint):
    task = hidden_trigger.problem(0, pictures, TINY)
    trigger = hidden_trigger.colours(None, 1)
    crafting = hidden_trigger.craft(NET, TINY, "greedy")
    args = (jax.random.key(0), trigger, task.crafting[0], task.crafting[1], {})
    poisons, bases, near, far = crafting(*args)
    every = hidden_trigger.craft(NET, TINY._replace(poisons=12), "greedy")(*args)
    levels = np.asarray(poisons) * 255
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert 1 <= np.abs(np.rint(levels) - np.rint(np.asarray(bases) * 255)).max() <= 16
    assert len(poisons) == 8 and rows_of(bases) <= rows_of(task.crafting[0]) and rows_of(poisons) <= rows_of(every[0])
    assert float(near) < float(every[2]) < 0.1 * float(far)


def test_victims_stand_in_the_order_of_their_names(pictures, faint, monkeypatch):
    """Poisons and badnets teach the head the trigger; their bases and noise don't; nobody loses accuracy."""
    monkeypatch.setattr(hidden_trigger, "HEAD", HeadRecipe(optax.sgd(0.2), 200, 8))
    classes = np.array([0, 1, 2, 3])
    task = hidden_trigger.problem(0, pictures, TINY)
    stack = lambda x, y, n: jnp.stack([jnp.asarray(x[y == k][:n] / 255, jnp.float32) for k in classes])
    crafting, tuned = jnp.split(stack(pictures.x, pictures.y, 20), [12], axis=1)
    test = stack(pictures.x_test, pictures.y_test, 10)
    of = lambda x: jnp.stack([features({}, each) for each in x])
    run = jax.jit(hidden_trigger.trial(NET, TINY))
    found = run(jax.random.key(0), jnp.array([0, 1]), {}, crafting, of(tuned), test, of(test))
    obeys = dict(zip(hidden_trigger.VICTIMS, 1 - np.asarray(found["patched"]).mean(axis=1)))
    assert obeys["clean"] == obeys["noise"] == 0 and obeys["hidden"] == obeys["badnets"] == 1
    assert float(jnp.min(found["accuracy"])) == 1 and task.test.shape == (10, 10, 12, 12, 1)


def test_a_trigger_is_of_whole_levels_at_a_place_of_its_own_for_every_image():
    stamped = np.asarray(hidden_trigger.colours(jax.random.key(0), 3)(jax.random.key(1), jnp.full((20, 32, 32, 3), -1.0)))
    marked = (stamped >= 0).all(axis=3)
    assert (marked.sum(axis=(1, 2)) == hidden_trigger.SIDE**2).all() and len({bytes(one) for one in marked}) > 10
    levels = stamped[marked] * 255
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
