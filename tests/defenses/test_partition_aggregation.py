"""Partition aggregation: its certificate against every attack on a toy, and what the proof of it rests on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, defenses, loop

KEY = jax.random.key(0)


def centroids(key, params, data):
    """The class means of the rows: a model that one row can change at will."""
    del key
    hot = jax.nn.one_hot(data.y, 3, dtype=data.x.dtype) * data.weight[:, None]
    total = jnp.sum(hot, axis=0)[:, None]
    return jnp.where(total > 0, hot.T @ data.x / jnp.maximum(total, 1), params), {}


def nearest(params, x, key=None):
    return -jnp.sum(jnp.square(x[:, None] - params[None]), axis=2)


START = jnp.array([[5.0, 5.0], [6.0, 6.0], [7.0, 7.0]])


def toy(num_rows, num_outside, seed=0):
    """Three clusters, and rows outside the training set (weight 0) that an attacker may add, with any label."""
    rng = np.random.default_rng(seed)
    y = np.arange(num_rows + num_outside) % 3
    x = rng.normal(size=(y.size, 2)) * 0.4 + 2 * np.eye(3, 2)[y]
    y[num_rows:] = rng.integers(0, 3, num_outside)
    weight = (np.arange(y.size) < num_rows).astype(np.float32)
    data = mj.dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), jnp.asarray(weight))
    return data, jnp.asarray(rng.normal(size=(12, 2)) + 0.7, jnp.float32)


def changes(size, radius):
    """Every set of at most `radius` of `size` things, as 0/1 vectors."""
    chosen = [set for r in range(radius + 1) for set in itertools.combinations(range(size), r)]
    return np.array([[i in set for i in range(size)] for set in chosen])


def test_no_row_added_or_deleted_within_the_radius_changes_a_prediction():
    data, x = toy(14, 10)
    fit, predict = defenses.partition_aggregation(centroids, nearest, num_partitions=7, over="vmap")
    both = jax.jit(jax.vmap(lambda weight: predict(fit(KEY, START, data._replace(weight=weight))[0], x)))
    moved = changes(24, 3)
    assert len(moved) == 1 + 24 + 276 + 2024
    weights = np.abs(np.asarray(data.weight)[None] - moved)
    label, info = both(jnp.asarray(weights, jnp.float32))
    radius = np.asarray(info["radius"][0])
    size = moved.sum(1)
    changed = np.asarray(label) != np.asarray(label)[0][None]
    assert not (changed & (size[:, None] <= radius[None])).any()
    assert set(radius) >= {0, 1, 2} and changed.any()
    assert changed[:, radius < 3][size == 3].any(axis=0).mean() > 0.5  # and beyond it many change: it isn't idle


def test_no_label_flipped_within_the_radius_changes_a_prediction():
    data, x = toy(10, 0, seed=1)
    fit, predict = defenses.partition_aggregation(centroids, nearest, num_partitions=5, labels_only=True)
    shift = np.array([s for s in itertools.product(range(3), repeat=10) if np.count_nonzero(s) <= 2])
    labels = jnp.asarray((np.asarray(data.y)[None] + shift) % 3, jnp.int32)
    label, info = jax.jit(jax.vmap(lambda y: predict(fit(KEY, START, data._replace(y=y))[0], x)))(labels)
    radius = np.asarray(info["radius"][0])
    order = np.count_nonzero(shift, axis=1)
    nothing = int(np.flatnonzero(order == 0)[0])
    radius = np.asarray(info["radius"][nothing])
    changed = np.asarray(label) != np.asarray(label)[nothing][None]
    assert not (changed & (order[:, None] <= radius[None])).any()
    assert radius.max() >= 1 and changed[order == 2][:, radius < 2].any()
    sizes = np.asarray(fit(KEY, START, data)[1]["sizes"])
    assert sizes.tolist() == [2, 2, 2, 2, 2]


def test_the_radius_is_the_papers():
    """Against its own words: the fewest votes that have to move, one at a time, until another label wins."""
    rng = np.random.default_rng(0)
    apply_fn = lambda params, x, key=None: jax.nn.one_hot(params, 4)[None].repeat(x.shape[0], axis=0)
    predict = jax.jit(defenses.partition_aggregation(centroids, apply_fn, num_partitions=9)[1])
    for _ in range(40):
        ballots = rng.integers(0, 4, 9)
        label, info = predict(jnp.asarray(ballots), jnp.zeros((1, 2)))
        votes = np.bincount(ballots, minlength=4)
        label = int(label[0])
        assert label == votes.argmax()
        fewest = 10
        for rival in set(range(4)) - {label}:
            moved = votes.copy()
            for k in range(1, 10):  # best for the attacker: votes go from the winner to one rival
                moved[label] -= 1
                moved[rival] += 1
                if moved.argmax() != label and moved[rival] >= moved[label]:
                    fewest = min(fewest, k)
                    break
        assert int(info["radius"][0]) == fewest - 1


def test_a_model_is_a_function_of_its_own_rows_bit_for_bit():
    """Rows shuffled, and rows of other partitions added: the same bits. That is what the proof rests on."""
    data, _ = toy(40, 6, seed=2)
    loss_fn = lambda p, d, key=None: jnp.sum(jnp.square(d.x - p[d.y]), axis=1)
    trainer = bilevel.unrolled(loss_fn, optax.sgd(0.1), 12, batching=loop.shuffled(4))
    fit = jax.jit(defenses.partition_aggregation(trainer, nearest, num_partitions=4, capacity=20)[0])
    models, info = fit(KEY, START, data)
    shuffled = jax.tree.map(lambda leaf: leaf[np.random.default_rng(0).permutation(46)], data)
    np.testing.assert_array_equal(models, fit(KEY, START, shuffled)[0])
    wider, wider_info = fit(KEY, START, data._replace(weight=data.weight.at[40].set(1)))
    moved = np.flatnonzero(np.asarray(wider_info["sizes"]) != np.asarray(info["sizes"]))
    assert moved.size == 1
    same = np.delete(np.arange(4), moved)
    np.testing.assert_array_equal(np.asarray(models)[same], np.asarray(wider)[same])
    assert (np.asarray(models)[moved] != np.asarray(wider)[moved]).any()
    assert int(info["sizes"].sum()) == 40 and int(info["unused"]) == 0


def test_a_full_partition_leaves_rows_out_and_says_so():
    data, _ = toy(40, 0)
    built = lambda **size: defenses.partition_aggregation(centroids, nearest, num_partitions=2, **size)[0]
    whole, cut = (jax.jit(built(**size))(KEY, START, data)[1] for size in ({}, {"capacity": 10}))
    np.testing.assert_array_equal(whole["sizes"], cut["sizes"])
    assert int(whole["unused"]) == 0
    assert int(cut["unused"]) == int(np.maximum(np.asarray(cut["sizes"]) - 10, 0).sum()) > 0


def test_rows_whose_digests_clash_weigh_nothing(monkeypatch):
    """Two rows with one digest have no order of their own, so they must not be told apart by where they stand."""
    from mlsec_jax.defenses import _partition_aggregation as module

    monkeypatch.setattr(module, "_digest", lambda words: (words[:, 0] * jnp.uint32(0), words[:, 0] * jnp.uint32(0)))
    x = jnp.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    whole = lambda key, params, data: (data, {})
    fit = jax.jit(defenses.partition_aggregation(whole, nearest, num_partitions=1)[0])
    same, info = fit(KEY, START, mj.dataset(x[:2], jnp.zeros(2, jnp.int32)))
    assert same.weight.tolist() == [[1.0, 1.0]] and int(info["unused"]) == 0
    clash, info = fit(KEY, START, mj.dataset(x, jnp.zeros(3, jnp.int32)))
    assert not np.asarray(clash.weight).any() and not np.asarray(clash.x).any() and int(info["unused"]) == 3


def test_digests_are_even_and_rarely_clash():
    from mlsec_jax.defenses import _partition_aggregation as module

    images = (np.random.default_rng(0).uniform(size=(20_000, 30)) < 0.1).astype(np.float32)
    images = np.unique(images, axis=0)
    first, second = jax.jit(module._digest)(module._words(jnp.asarray(images)))
    both = np.asarray(first).astype(np.uint64) << np.uint64(32) | np.asarray(second).astype(np.uint64)
    assert np.unique(both).size == len(images)
    counts = np.bincount(np.asarray(first) % 100, minlength=100)
    assert np.square(counts - counts.mean()).sum() / counts.mean() < 160  # chi-square, 99 degrees


def test_the_derivative_is_that_of_the_models():
    data, _ = toy(12, 0)
    fit, _ = defenses.partition_aggregation(centroids, nearest, num_partitions=3, over="vmap")
    with jax.enable_x64(True):
        start = START.astype(jnp.float64)
        total = jax.jit(lambda weight: jnp.sum(jnp.square(fit(KEY, start, data._replace(weight=weight))[0])))
        data = mj.dataset(jnp.asarray(data.x, jnp.float64), data.y, jnp.ones(12, jnp.float64))
        slope = jax.jit(jax.grad(total))(data.weight)
        e = jnp.zeros(12).at[5].set(1e-6)
        np.testing.assert_allclose(slope[5], (total(data.weight + e) - total(data.weight - e)) / 2e-6, rtol=1e-5, atol=1e-7)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_partitions"):
        defenses.partition_aggregation(centroids, nearest, num_partitions=0)
    with pytest.raises(ValueError, match="hash_fn"):
        defenses.partition_aggregation(centroids, nearest, num_partitions=2, labels_only=True, hash_fn=lambda x: x)
    with pytest.raises(ValueError, match="capacity"):
        defenses.partition_aggregation(centroids, nearest, num_partitions=2, capacity=0)
