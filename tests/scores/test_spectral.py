"""Spectral signatures against NumPy's SVD, their derivative, and the filter of each class that the paper makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import combine, linalg, scores

KEY = jax.random.key(0)
identity = lambda params, x, key=None: x


def make(dtype=np.float32, n=90, d=20, seed=0):
    """Three classes; ten rows of class 1 are pushed along a direction of their own."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.normal(size=(n, d)) * np.linspace(1.5, 0.5, d) + 4 * rng.normal(size=(3, d))[y]
    bad = np.flatnonzero(y == 1)[:6]
    x[bad] += 6 * rng.normal(size=d) / np.sqrt(d) * 2
    return mj.dataset(jnp.asarray(x.astype(dtype)), jnp.asarray(y, jnp.int32)), bad


@pytest.mark.parametrize("centred", [True, False])
def test_scores_are_numpys(centred):
    data, _ = make()
    ours = scores.spectral(identity, num_classes=3, centred=centred)(KEY, None, data, mj.Known())
    x, y = np.asarray(data.x, np.float64), np.asarray(data.y)
    for c in range(3):
        rows = x[y == c]
        v = np.linalg.svd(rows - rows.mean(0))[2][0]
        expected = np.square((rows - rows.mean(0)) @ v) if centred else abs(rows @ v)
        np.testing.assert_allclose(np.asarray(ours)[y == c], expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["spectral", "activation_clusters"])
@pytest.mark.parametrize("label", [0, 1])
def test_under_jit_nan_costs_its_own_class_alone(name, label):
    data, _ = make()
    scorer = {
        "spectral": scores.spectral(identity, num_classes=3),
        "activation_clusters": scores.activation_clusters(identity, num_classes=3, num_components=3),
    }[name]
    value = jax.jit(lambda x: scorer(KEY, None, data._replace(x=x), mj.Known()))
    own = np.asarray(data.y) == label
    broken, whole = value(data.x.at[own, 2].set(jnp.nan))[~own], value(data.x)[~own]
    np.testing.assert_allclose(broken, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n, d", [(100, 64), (300, 200)])
@pytest.mark.parametrize("shape", ["gaussian", "relu"])
def test_small_gaps_are_resolved(n, d, shape):
    scorer = jax.jit(scores.spectral(identity, num_classes=1))
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
        x = np.maximum(x, 0) if shape == "relu" else x
        centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
        expected = np.square(centred @ np.linalg.svd(centred, full_matrices=False)[2][0])
        found = scorer(KEY, None, mj.dataset(x, np.zeros(n, np.int32)), mj.Known())
        np.testing.assert_allclose(found, expected, atol=1e-3 * expected.max())


def test_the_published_filter_removes_the_poisons_and_as_many_of_every_class():
    data, bad = make()
    sanitize = combine.filter_top(
        scores.spectral(identity, num_classes=3), fraction=1.5 * 6 / 30, reads_model=False, num_classes=3
    )
    clean, info = sanitize(KEY, data, mj.Known())
    assert (np.asarray(clean.weight)[bad] == 0).all()
    assert info["num_removed"].tolist() == [9, 9, 9]
    assert all((np.asarray(clean.weight)[np.asarray(data.y) == c] == 0).sum() == 9 for c in range(3))


def test_without_poisons_nothing_stands_out():
    """The clean control: the largest score of a Gaussian class is that of a Gaussian's largest deviation."""
    data, _ = make()
    keep = np.asarray(data.y) != 1
    score = np.asarray(scores.spectral(identity, num_classes=3)(KEY, None, data, mj.Known()))
    for c in (0, 2):
        own = score[keep & (np.asarray(data.y) == c)]
        assert own.max() < 16 * own.mean()
    poisoned = score[np.asarray(data.y) == 1]
    assert poisoned[:6].min() > np.median(poisoned) * 4


def test_its_derivative_is_central_differences_and_not_the_iterations():
    with jax.enable_x64(True):
        data, _ = make(np.float64, n=30, d=6)
        for steps in (6, 5):
            score = scores.spectral(identity, num_classes=3, num_steps=steps)
            value = jax.jit(lambda x, score=score: jnp.sum(jnp.sqrt(1 + score(KEY, None, data._replace(x=x), mj.Known()))))
            along = jax.random.normal(jax.random.key(1), data.x.shape, data.x.dtype)
            slope = jnp.vdot(jax.grad(value)(data.x), along)
            central = (value(data.x + 1e-5 * along) - value(data.x - 1e-5 * along)) / 2e-5
            np.testing.assert_allclose(slope, central, rtol=1e-5 if steps == 6 else 2e-2)


def test_the_eigenvector_of_any_map():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(40, 60))
    matrix = jnp.asarray(root @ root.T, jnp.float32)
    v = linalg.top_eigenvector(lambda u: matrix @ u, jnp.ones(40))
    expected = np.linalg.eigh(root @ root.T)[1][:, -1]
    np.testing.assert_allclose(abs(np.vdot(v, expected)), 1, rtol=1e-5)
    zero = linalg.top_eigenvector(lambda u: 0 * u, jnp.ones(4))
    np.testing.assert_allclose(zero, 0.5 * jnp.ones(4), rtol=1e-6)


def test_a_class_of_constant_features_scores_nothing():
    data, _ = make()
    x = jnp.where((data.y == 2)[:, None], 1.0, data.x)
    score = scores.spectral(identity, num_classes=3)(KEY, None, data._replace(x=x), mj.Known())
    assert (np.asarray(score)[np.asarray(data.y) == 2] < 1e-6).all() and np.isfinite(score).all()


def test_bad_input_is_named():
    data, _ = make()
    with pytest.raises(ValueError, match=r"labels in \[0, 2\)"):
        scores.spectral(identity, num_classes=2)(KEY, None, data, mj.Known())
    with pytest.raises(ValueError, match="tolerance: expected more than 0"):
        scores.spectral(identity, num_classes=3, tolerance=0.0)


def test_a_flat_spectrum_takes_more_rounds():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 512)).astype(np.float32)
    centred = x - x.mean(0)
    truth = (centred @ np.linalg.svd(centred, full_matrices=False)[2][0]) ** 2
    scorer = scores.spectral(lambda params, x, key=None: x, num_classes=1)
    found = scorer(jax.random.key(0), None, mj.dataset(x, np.zeros(500, np.int32)), mj.Known())
    assert np.corrcoef(found, truth)[0, 1] > 0.999
