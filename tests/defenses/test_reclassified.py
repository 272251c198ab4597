"""A filter of every class, believed in the poisoned one only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, combine, defenses, losses, models, scores

KEY = jax.random.key(0)
MODEL = models.softmax_regression()
FIT = bilevel.unrolled(losses.cross_entropy(MODEL.apply), optax.sgd(0.5), 60)
INIT = lambda key: MODEL.init(key, jnp.zeros((1, 3)))
FILTER = combine.filter_top(
    scores.spectral(lambda params, x, key=None: x, num_classes=3), fraction=0.2, num_classes=3, reads_model=False
)


def poisoned(target):
    """Forty points in each of three corners; six of the next corner's are labelled `target`, and row 0 is absent."""
    rng = np.random.default_rng(target)
    y = np.repeat(np.arange(3), 40)
    x = 3 * np.eye(3)[y] + rng.normal(size=(120, 3)) * np.array([0.3, 0.4, 0.5])
    rows = np.flatnonzero(y == (target + 1) % 3)[:6]
    y[rows] = target
    weight = np.ones(120)
    weight[0] = 0
    return mj.dataset(x, y, weight), rows


def defense(**options):
    return defenses.reclassified(FILTER, MODEL.apply, FIT, INIT, num_classes=3, **options)


@pytest.mark.parametrize("target", range(3))
def test_poisons_go_and_other_classes_keep_their_rows(target):
    data, rows = poisoned(target)
    left, info = jax.jit(defense())(KEY, data, mj.Known())
    gone = np.flatnonzero((np.asarray(data.weight) > 0) & (np.asarray(left.weight) == 0))
    assert set(rows[rows != 0]) <= set(gone) and (np.asarray(data.y)[gone] == target).all()
    assert info["suspect"].tolist() == [c == target for c in range(3)]
    every, _ = FILTER(KEY, data, mj.Known())
    assert int((every.weight == 0).sum()) > len(gone) + 1  # the filter alone takes rows of every class


def test_of_no_class_nothing_and_of_every_class_all_of_it():
    data, _ = poisoned(1)
    assert (defense(num_suspects=0)(KEY, data, mj.Known())[0].weight == data.weight).all()
    sanitize_key, *_ = jax.random.split(KEY, 3)
    every, _ = FILTER(sanitize_key, data, mj.Known())
    assert (defense(num_suspects=3)(KEY, data, mj.Known())[0].weight == every.weight).all()
    with pytest.raises(ValueError, match="num_suspects: expected at most the 3 classes, got 4"):
        defense(num_suspects=4)


def test_shares_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    y, said = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    y[y == 3] = 0  # a class without rows
    suspect = rng.uniform(size=60) * (rng.uniform(size=60) < 0.5)
    found = scores.taken_elsewhere(jnp.asarray(said), mj.dataset(np.zeros((60, 1)), y), jnp.asarray(suspect), num_classes=4)
    for c in range(4):
        votes = np.array([suspect[(y == c) & (said == other)].sum() for other in range(4)])
        own, other = votes[c], np.delete(votes, c).max()
        np.testing.assert_allclose(found[c], other / (own + other) if own + other else 0, rtol=1e-5)


def test_a_sanitizer_that_reads_a_model_still_says_so():
    reads = combine.filter_top(scores.spectral(MODEL.apply, num_classes=3), fraction=0.2, num_classes=3)
    assert combine.needs_model(defenses.reclassified(reads, MODEL.apply, FIT, INIT, num_classes=3))
    assert not combine.needs_model(defense())
