"""The poison-frogs benchmark's own pieces, on networks whose features are the pixels, where collisions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from benchmarks import poison_frogs
from benchmarks._clean_label import HeadRecipe, Images, Net
from mlsec_jax import models

TINY = poison_frogs.Size(1, 4, 1, 3, 4, 1, 2, (40, 40), candidates=(3, 3), targets=2, test=20)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    make = lambda n: (rng.integers(0, 256, (n, 4, 4, 1), np.uint8), np.arange(n) % 10)
    return Images(*make(200), *make(100), ("noise",))


@pytest.fixture(scope="module")
def net():
    model = models.softmax_regression()
    return Net(model, model.init(jax.random.key(0), (4, 4, 1)))


def rows_of(x):
    return {bytes(np.rint(np.asarray(row) * 255).astype(np.uint8)) for row in x}


def test_nobody_sees_a_row_twice_and_bases_are_the_nearest(pictures, net):
    task = poison_frogs.problem(0, pictures, net, TINY, 1)
    assert task.clean.num_rows == 1 + 2 * 3 and task.bases.shape == (3, 1, 4, 4, 1)
    assert task.clean.y.tolist() == [1, 0, 0, 0, 1, 1, 1]
    pretraining = rows_of(pictures.x[: 10 * TINY.pretrain] / 255)
    clean, bases = rows_of(task.clean.x), rows_of(task.bases.reshape(-1, 4, 4, 1))
    assert not clean & bases and not pretraining & (clean | bases)
    assert not rows_of(task.targets) & rows_of(task.test.x) and len(clean) == task.clean.num_rows
    dogs = pictures.x[40:][pictures.y[40:] == 5] / 255
    dogs = np.stack([dog for dog in dogs if not rows_of([dog]) & clean])
    for target, near in zip(np.asarray(task.targets), np.asarray(task.bases)):
        distance = np.sort(((dogs - target) ** 2).sum(axis=(1, 2, 3)))[:1]
        np.testing.assert_allclose(((near - target) ** 2).sum(axis=(1, 2, 3)), distance, rtol=1e-5)


def test_another_seed_draws_other_targets(pictures, net):
    first, second = (poison_frogs.problem(seed, pictures, net, TINY, 1) for seed in (0, 1))
    assert not np.array_equal(first.targets, second.targets)


def test_a_collision_in_pixel_space_is_the_weighted_mean(net, monkeypatch):
    monkeypatch.setattr(poison_frogs, "BETA", 0.2)
    target = jnp.linspace(0.2, 0.8, 16).reshape(4, 4, 1)
    bases = jnp.stack([jnp.full((4, 4, 1), 0.9), jnp.full((4, 4, 1), 0.1)])
    start = 0.3 * target[None] + 0.7 * bases
    made, distance = poison_frogs.collide(net, 60, 0.3)(jax.random.key(0), target, bases, net.params)
    pull = 0.2 * jnp.sum(target**2)
    np.testing.assert_allclose(made, (target[None] + pull * start) / (1 + pull), atol=0.6 / 255)
    assert float(distance[1]) < float(distance[0])


def test_a_head_believes_its_one_poison(net, monkeypatch):
    """Features are the pixels and β is 0: the poison is the target itself, under the other label."""
    monkeypatch.setattr(poison_frogs, "BETA", 0.0)
    monkeypatch.setattr(poison_frogs, "HEAD", HeadRecipe(optax.adam(0.1), 300, 4))
    x = jax.random.uniform(jax.random.key(1), (8, 16))
    clean = mj.dataset(x, jnp.array([1, 1, 1, 1, 0, 0, 0, 0]))
    target = (jnp.mean(x[4:], axis=0) + 0.1).reshape(4, 4, 1)
    trial = jax.jit(poison_frogs.one_shot(net, TINY))
    found = trial(jax.random.key(0), target, x[:1].reshape(1, 4, 4, 1), net.params, clean, clean)
    assert found["hit"].tolist() == [False, False, True] and found["right"].tolist() == [True, True, False]
    np.testing.assert_allclose(found["poison"], target, atol=0.6 / 255)


def test_end_to_end_has_a_victim_for_each_control(pictures, net):
    params = {"head": {**net.params["head"], "b": net.params["head"]["b"].at[2].set(1.0)}}  # all are birds
    net = net._replace(params=params)
    task = poison_frogs.problem(0, pictures, net, TINY, 2)
    trial = jax.jit(poison_frogs.end_to_end(net, TINY))
    found = trial(jax.random.key(0), task.targets[0], task.bases[0], net.params, task.clean, task.test)
    assert found["hit"].shape == found["accuracy"].shape == (4,) and bool(jnp.all(found["right"]))
    assert not bool(jnp.any(found["hit"] & found["right"]))


def test_a_target_counts_when_the_clean_victim_is_right():
    found = {"right": np.array([[0, 1], [1, 0], [0, 0], [1, 1], [1, 1]], bool), "value": np.arange(5)}
    kept, excluded = poison_frogs.counted(found, np.array([0, 1, 2, 6, 7]), 2)
    assert kept["value"].tolist() == [1, 3] and excluded == 5
    with pytest.raises(ValueError, match="candidates"):
        poison_frogs.counted({"right": np.zeros((2, 2), bool)}, np.arange(2), 2)
