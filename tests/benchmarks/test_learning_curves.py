"""The authors' rows of the learning curves, followed through scikit-learn, and what is published of them."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import learning_curves as curves
from mlsec_jax import data

MNIST = Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")) / "mnist"


def test_authors_rows_are_those_of_their_code():
    """Grey images that name their row; the splitter is the one the authors call."""
    from sklearn.model_selection import train_test_split

    rng = np.random.default_rng(0)
    y_train, y_test = rng.integers(0, 2, 200), rng.permutation(np.arange(60) % 2)
    named = lambda y: data.to_data(np.tile(np.arange(len(y))[:, None, None], (1, 28, 28)), y, channel=True)
    pools = named(y_train), named(y_test)
    rows = curves.authors_rows(pools, (50, 20), 3, 7)

    drawn = np.random.RandomState(999).choice(np.arange(200), 51, replace=False)
    kept, _ = train_test_split(np.arange(51), train_size=50, test_size=1, random_state=999)
    np.testing.assert_array_equal(rows.train.x[:, 0], drawn[kept])
    triggers = np.random.RandomState(7).rand(2, 3, 3)
    bad = np.random.RandomState(7).choice(np.arange(50), 5, replace=False)
    np.testing.assert_array_equal(np.flatnonzero(rows.poisoned), np.sort(bad))

    labels = y_train[drawn[kept]]
    np.testing.assert_array_equal(rows.train.y, np.where(rows.poisoned, 1 - 2 * labels, 2 * labels - 1))
    images = rows.train.x.reshape(-1, 28, 28)
    for i in range(50):
        expected = triggers[labels[i]] if i in bad else np.full((3, 3), images[i, 0, 0])
        np.testing.assert_allclose(images[i, 25:, 25:], expected, rtol=1e-6)
        assert np.all(images[i, :25] == images[i, 0, 0]) and np.all(images[i, :, :25] == images[i, 0, 0])

    tested = np.sort(np.concatenate([np.flatnonzero(y_test == label)[:10] for label in (0, 1)]))
    np.testing.assert_array_equal(np.sort(rows.clean.x[:, 0]), tested)
    np.testing.assert_array_equal(rows.clean.y, 2 * y_test[rows.clean.x[:, 0].astype(int)] - 1)
    np.testing.assert_array_equal(rows.triggered.y, -rows.clean.y)


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not prepared in TFDS_DATA_DIR")
@pytest.mark.parametrize("name", ["rc_1000", "rc_1"])
def test_ridge_on_the_authors_rows_has_the_published_losses(name):
    """All nine published columns, from the normal equations alone: what is left is their rounding to three digits."""
    _, C, published = curves.TABLE[name]
    with jax.enable_x64(True):
        train, test, sizes, _ = curves.load("full")
        pools = tuple(data.to_data(*part, channel=True, dtype=jnp.float64) for part in (train, test))
        rows = jax.tree.map(np.asarray, curves.authors_rows(pools, sizes, 6, curves.AUTHORS))
    inputs = np.c_[rows.train.x, np.ones(len(rows.train.x))]
    penalty = np.diag(np.r_[np.ones(784), 0]) / (2 * C)
    fits = {}
    for beta in (0, 0.1, 0.99):
        scaled = inputs * np.where(rows.poisoned, beta, 1)[:, None]
        fits[beta] = np.linalg.solve(scaled.T @ inputs + penalty, scaled.T @ rows.train.y)
    loss = lambda beta, part: np.mean((1 - part.y * (part.x @ fits[beta][:-1] + fits[beta][-1])) ** 2)
    first, last = fits[0][:-1], fits[0.99][:-1]
    norms = np.linalg.norm(first), np.linalg.norm(last)
    found = [*(loss(beta, rows.triggered) for beta in fits), loss(0, rows.clean), loss(0.99, rows.clean)]
    found += [np.mean(np.sign(rows.triggered.x @ last + fits[0.99][-1]) == rows.triggered.y)]
    found += [(1 - first @ last / np.prod(norms)) / 2, *norms]
    np.testing.assert_allclose(found, published, rtol=5e-3)
