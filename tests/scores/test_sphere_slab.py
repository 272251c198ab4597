"""Sphere and slab scores against NumPy, absent rows, and the defense that `filter_top` makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import combine, scores


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [40, 20]).astype(np.int32)
    x = (rng.normal(size=(60, 2, 2)) + y[:, None, None]).astype(np.float32)
    x[5] = np.nan
    return mj.dataset(jnp.asarray(x), jnp.asarray(y), jnp.ones(60).at[5].set(0))


@pytest.mark.parametrize("signed", [False, True])
def test_scores_are_the_distances(data, signed):
    if signed:
        data = data._replace(y=2 * data.y - 1)
    keep = np.asarray(data.weight) > 0
    x, y = np.asarray(data.x).reshape(60, -1)[keep], np.asarray(data.y)[keep] > 0
    means = np.stack([x[~y].mean(0), x[y].mean(0)])
    off = x - means[y.astype(int)]
    axis = (means[1] - means[0]) / np.linalg.norm(means[1] - means[0])
    sphere, slab = (s(None, None, data, mj.Known()) for s in (scores.sphere(), scores.slab()))
    np.testing.assert_allclose(sphere[keep], np.linalg.norm(off, axis=1), rtol=1e-5)
    np.testing.assert_allclose(slab[keep], np.abs(off @ axis), rtol=1e-4, atol=1e-6)


def test_the_cut_removes_the_same_share_of_each_class(data):
    scorer = scores.within_class(scores.sphere(), fraction=0.1)
    sanitize = combine.filter_top(scorer, fraction=0.1, reads_model=False)
    kept, info = sanitize(jax.random.key(0), data, mj.Known())
    removed = (np.asarray(data.weight) > 0) & (np.asarray(kept.weight) == 0)
    assert removed[:40].sum() == 3 and removed[40:].sum() == 2
    score = np.asarray(info["score"])
    assert (score[removed] > 1).all() and (score[~removed & (np.asarray(data.weight) > 0)] <= 1 + 1e-6).all()


def test_scores_can_be_attacked(data):
    far = lambda x: jnp.sum(scores.sphere()(None, None, data._replace(x=x), mj.Known()))
    gradient = jax.grad(far)(data.x)
    assert np.isfinite(np.asarray(gradient)).all() and np.abs(np.asarray(gradient)).max() > 0
