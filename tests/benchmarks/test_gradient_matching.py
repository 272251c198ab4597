"""The gradient-matching benchmark's own pieces, on linear networks: who changes what, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gradient_matching
from benchmarks._clean_label import Images, Net
from mlsec_jax import models

TINY = gradient_matching.Size("convnet", 1, 160, 8, 1, 3, 1, surrogates=2, steps=40, restarts=2, batch=8, test=10)


@pytest.fixture(scope="module")
def net():
    model = models.softmax_regression(scale=0.01)
    return Net(model, model.init(jax.random.key(0), (12, 12, 1)))


@pytest.fixture(scope="module")
def task(net):
    rng = np.random.default_rng(0)
    make = lambda n: (rng.integers(0, 256, (n, 12, 12, 1), np.uint8), np.arange(n) % 10)
    pictures = Images(*make(200), *make(100), ("noise",))
    return pictures, gradient_matching.problem(0, pictures, net, TINY)


@pytest.fixture(scope="module")
def made(net, task):
    given = task[1]
    goal = jax.tree.map(lambda leaf: leaf[0], given.goal)
    craft = jax.jit(gradient_matching.craft(TINY, net.model, False))
    surrogates = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), net.params)
    return goal, craft(jax.random.key(1), goal, given.rows[0], given.clean, surrogates)


def test_poisons_are_the_loudest_rows_of_the_second_class(net, task):
    pictures, given = task
    assert given.clean.num_rows == TINY.rows and given.rows.shape == (3, 8)
    of_test = {bytes(image): label for image, label in zip(pictures.x_test, pictures.y_test)}
    for x, y, rows in zip(given.goal.x, given.goal.y, given.rows):
        true = of_test[bytes(np.rint(np.asarray(x[0]) * 255).astype(np.uint8))]
        order = np.argsort(-np.asarray(net.model.apply(net.params, x)[0]))
        assert order.tolist()[:2] == [true, int(y[0])]
        assert set(np.asarray(given.clean.y)[rows].tolist()) == {int(y[0])}
        probability = jax.nn.softmax(net.model.apply(net.params, given.clean.x))
        error = probability - jax.nn.one_hot(given.clean.y, 10)  # the gradient is its product with the pixels and 1
        norm = np.asarray(jnp.sum(error**2, axis=1) * (1 + jnp.sum(given.clean.x**2, axis=(1, 2, 3))))
        assert set(np.argsort(-np.where(given.clean.y == y[0], norm, 0))[:8]) == set(np.asarray(rows).tolist())
    assert len(set(map(bytes, np.asarray(given.test.x))) & set(map(bytes, np.asarray(given.goal.x[:, 0])))) == 0


def test_poisons_and_noise_keep_the_radius_in_whole_levels(task, made):
    base = np.rint(np.asarray(task[1].clean.x[task[1].rows[0]]) * 255)
    for name in ("matching", "noise"):
        levels = np.asarray(made[1][name]) * 255
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
        moved = np.abs(np.rint(levels) - base)
        assert moved.max() == 16 and levels.min() >= 0 and levels.max() <= 255.001
        if name == "noise":
            assert ((moved == 16) | (np.rint(levels) % 255 == 0)).all()


def test_matching_raises_the_cosine(made):
    assert float(made[1]["cosine"]) > float(made[1]["cosine_start"])


def test_victims_of_one_key_differ_in_the_poisons_alone(net, task, made):
    given, (goal, poisons) = task[1], made
    judge = jax.jit(gradient_matching.judge(TINY, net.model, False))
    same = judge(
        jax.random.key(2), goal, given.rows[0], poisons["noise"], poisons["noise"], given.clean, given.test
    )
    assert same["hit"].shape == (2,) and same["hit"][0] == same["hit"][1]
    assert same["accuracy"][0] == same["accuracy"][1]
