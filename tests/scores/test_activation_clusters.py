"""Activation clustering against scikit-learn's FastICA, brute-force 2-means and silhouettes; its three rules; bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.decomposition import FastICA
from sklearn.metrics import silhouette_score

import mlsec_jax as mj
from mlsec_jax import bilevel, combine, loop, losses, scores
from mlsec_jax.scores import _activation_clusters as ac
from mlsec_jax.scores._by_class import blocks, digest

KEY = jax.random.key(0)
identity = lambda params, x, key=None: x


def make(dtype=np.float32, n=240, d=12, share=0.15, seed=0):
    """Three classes of heavy-tailed features with dead units; some rows of class 1 lie apart."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.laplace(size=(n, 6)) @ rng.normal(size=(6, d)) + 4 * rng.normal(size=(3, d))[y]
    bad = np.flatnonzero(y == 1)[: round(share * n / 3)]
    x[bad] += 25 * rng.normal(size=d) / np.sqrt(d)
    x = np.concatenate([x + 0.05 * rng.normal(size=x.shape), np.zeros((n, 2))], axis=1)
    return mj.dataset(jnp.asarray(x.astype(dtype)), jnp.asarray(y, jnp.int32)), bad


def found(data, **options):
    options = {"num_classes": 3, "num_components": 4, **options}
    return jax.jit(lambda data: scores.cluster_activations(identity, **options)(KEY, None, data))(data)


def test_blocks_hold_every_present_row_once_and_no_other():
    y, weight = jnp.array([2, 0, 2, 2, 0, 2, 1, 2]), jnp.array([1.0, 1, 0, 1, 1, 1, 1, 1])
    data = mj.dataset(jnp.arange(8.0)[:, None], y, weight)
    block = blocks(data, 4, most=2)
    for label in range(4):
        own = np.asarray(block.rows)[int(block.first[label]) : int(block.stop[label])].ravel()
        assert sorted(own[own < 8]) == [i for i in range(8) if y[i] == label and weight[i] > 0]
    assert block.back(block.take(data.x), 8)[:, 0].tolist() == [0, 1, 0, 3, 4, 5, 6, 7]
    assert (np.asarray(block.rows) < 8).sum() == 7


def test_the_components_are_scikit_learns():
    with jax.enable_x64(True):
        data, _ = make(np.float64)
        ours = found(data, tolerance=1e-9)
        assert ours.converged.all()
        for c in range(3):
            own = np.asarray(data.y) == c
            theirs = FastICA(4, whiten="unit-variance", tol=1e-9, max_iter=5000, random_state=0)
            theirs = theirs.fit_transform(np.asarray(data.x)[own][:, :-2])  # it divides by the deviation of dead units
            match = np.abs(np.asarray(ours.sources)[own].T @ theirs) / own.sum()
            assert (match.max(axis=0) > 1 - 1e-6).all() and (match.max(axis=1) > 1 - 1e-6).all()


def test_two_means_are_the_best_of_all_splits():
    rng = np.random.default_rng(1)
    for trial in range(5):
        x = rng.normal(size=(9, 2)).astype(np.float32)
        x[:3] += 3
        weight = rng.integers(1, 4, size=9).astype(np.float32)
        data = mj.dataset(jnp.asarray(x), jnp.zeros(9, jnp.int32), jnp.asarray(weight))
        block = blocks(data, 1)
        s, w = jnp.swapaxes(block.take(data.x - jnp.mean(data.x, axis=0)[None]), 1, 2), block.take(data.weight)
        normal, level, share = ac._two_means(block, s, w, 0)

        def cost(member, x=x, weight=weight):
            parts = [(x[member == side], weight[member == side]) for side in (0, 1)]
            means = [np.average(rows, axis=0, weights=own) for rows, own in parts]
            return sum(float(own @ ((rows - mean) ** 2).sum(axis=1)) for (rows, own), mean in zip(parts, means))

        splits = [np.array((0, *rest)) for rest in itertools.product((0, 1), repeat=8) if any(rest)]
        best = splits[int(np.argmin([cost(split) for split in splits]))]
        centred = x - x.mean(axis=0)
        got = (centred @ np.asarray(normal) > float(level)).astype(int)
        assert np.array_equal(got, best) or np.array_equal(got, 1 - best), trial
        np.testing.assert_allclose(share[1], weight[got == 1].sum() / weight.sum(), rtol=1e-6)
        assert share[1] <= share[0]


def test_silhouettes_are_scikit_learns():
    data, _ = make()
    ours = found(data)
    value = scores.silhouettes(data, ours)
    for c in range(3):
        own = np.asarray(data.y) == c
        expected = silhouette_score(np.asarray(ours.sources)[own], np.asarray(ours.cluster)[own])
        np.testing.assert_allclose(value[c], expected, atol=2e-3)


def test_a_weight_counts_repetitions():
    with jax.enable_x64(True):
        data, _ = make(np.float64, seed=1)  # components that are found: rounding decides where those that aren't end
        twice = jnp.where(jnp.arange(240) % 4 == 0, 2.0, 1.0)
        rows = np.repeat(np.arange(240), np.asarray(twice, int))
        weighted, repeated = data._replace(weight=twice), mj.dataset(data.x[rows], data.y[rows])
        a, b = (found(data, tolerance=1e-9) for data in (weighted, repeated))
        assert a.converged.all()
        np.testing.assert_allclose(a.share, b.share, atol=1e-9)
        np.testing.assert_array_equal(np.asarray(a.cluster)[rows], b.cluster)
        np.testing.assert_allclose(scores.silhouettes(weighted, a), scores.silhouettes(repeated, b), atol=1e-6)


def test_the_rule_of_size_finds_the_poisons():
    data, bad = make()
    rule = combine.filter_above(
        scores.activation_clusters(identity, num_classes=3, num_components=4), threshold=1 - 0.35, reads_model=False
    )
    clean, _ = jax.jit(rule)(KEY, data, mj.Known())
    removed = np.asarray(clean.weight) == 0
    assert removed[bad].all() and removed[np.asarray(data.y) == 1].sum() == len(bad)


def test_the_rule_of_silhouettes_is_about_the_smaller_cluster_of_a_split_class():
    data, bad = make()
    scorer = scores.activation_clusters(identity, num_classes=3, num_components=4, rule=scores.cluster_silhouette)
    value = np.asarray(jax.jit(scorer)(KEY, None, data, mj.Known()))
    one = np.asarray(data.y) == 1
    assert len(set(value[bad])) == 1 and value[bad][0] > 0.1
    assert (value[one & ~np.isin(np.arange(240), bad)] == -1).all()


def test_reclassification_says_what_a_model_without_the_cluster_takes_it_for():
    """Rows of class 0, mislabelled 1 and displaced in features, are given back; a cluster of class 1's own is not."""
    rng = np.random.default_rng(0)
    y = np.arange(150) % 3
    x = rng.laplace(size=(150, 4)) * 0.3 + 3 * np.eye(3, 4)[y]
    x[:, 3] = rng.laplace(size=150) * 0.3
    bad = np.flatnonzero(y == 0)[:8]
    x[bad, 3] += 6
    y[bad] = 1
    own = np.flatnonzero(y == 2)[:8]
    x[own, 3] += 6
    data = mj.dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))

    def centroids(key, params, data):
        member = jax.nn.one_hot(data.y, 3) * data.weight[:, None]
        return member.T @ data.x / jnp.sum(member, axis=0)[:, None], {}

    apply_fn = lambda params, x, key=None: x[:, :3] @ params[:, :3].T - jnp.sum(params[:, :3] ** 2, axis=1)[None] / 2
    rule = scores.reclassification(apply_fn, centroids, lambda key: None)
    scorer = scores.activation_clusters(identity, num_classes=3, num_components=4, rule=rule)
    value = np.asarray(scorer(KEY, None, data, mj.Known()))
    assert (value[bad] > 0.9).all() and (value[own] < 0.1).all()


@pytest.mark.parametrize("rule", ["size", "silhouette", "reclassification"])
def test_the_order_of_the_rows_changes_no_bit_where_nothing_converges(rule):
    rng = np.random.default_rng(0)
    data = mj.dataset(rng.normal(size=(203, 32)).astype(np.float32), (np.arange(203) % 2).astype(np.int32))
    data = data._replace(x=data.x.at[7].set(data.x[9]), weight=jnp.ones(203).at[7].set(2.0).at[3].set(0.0))
    linear = lambda params, x, key=None: x @ params
    trainer = bilevel.unrolled(losses.cross_entropy(linear), optax.sgd(0.1), 5, batching=loop.shuffled(16))
    rules = {"size": None, "silhouette": scores.cluster_silhouette}
    rules["reclassification"] = scores.reclassification(linear, trainer, lambda key: jnp.zeros((32, 2)))
    scorer = jax.jit(scores.activation_clusters(identity, num_classes=2, num_steps=60, rule=rules[rule]))
    assert not scores.cluster_activations(identity, num_classes=2, num_steps=60)(KEY, None, data).converged.all()
    value = np.asarray(scorer(KEY, None, data, mj.Known()))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(203)
        shuffled = jax.tree.map(lambda leaf, order=order: leaf[order], data)
        np.testing.assert_array_equal(scorer(KEY, None, shuffled, mj.Known()), value[order])


def test_digests_are_even_and_of_every_bit():
    features = (np.random.default_rng(0).uniform(size=(20_000, 30)) < 0.1).astype(np.float32)
    features = np.unique(features, axis=0)
    first, second = (np.asarray(each, np.uint64) for each in jax.jit(digest)(jnp.asarray(features), jnp.ones(len(features))))
    assert np.unique(first << np.uint64(32) | second).size == len(features)
    for each in (first, second):
        assert np.unique(each).size > 0.999 * len(features)
    with jax.enable_x64(True):
        wide = jnp.asarray([[1.0, 2.0], [1.0, 2.0 + 2**-50]], jnp.float64)
        assert len(set(digest(wide, jnp.ones(2))[0].tolist())) == 2
        assert len(set(digest(wide[:1].repeat(2, axis=0), jnp.array([1.0, 2.0]))[0].tolist())) == 2


def test_clusters_have_no_derivative_and_say_so():
    data, _ = make()
    scorer = scores.activation_clusters(identity, num_classes=3, num_components=4)
    value = lambda x: jnp.sum(scorer(KEY, None, data._replace(x=x), mj.Known()))
    with pytest.raises(TypeError, match=r"activation_clusters is piecewise constant"):
        jax.grad(value)(data.x)
    assert not jax.grad(lambda x: value(jax.lax.stop_gradient(x)) + jnp.sum(x))(data.x).std()


def test_bad_input_is_named():
    data, _ = make()
    scorer = scores.activation_clusters(identity, num_classes=3, num_components=4)
    run = lambda data: scorer(KEY, None, data, mj.Known())
    few = data._replace(weight=jnp.where((data.y == 2) & (jnp.arange(240) > 11), 0.0, 1.0))
    with pytest.raises(ValueError, match=r"more rows of each class than the 4 components, got 4 of class 2"):
        run(few)
    with pytest.raises(ValueError, match=r"at least 4 features that vary within each class, got 0 in class 0"):
        run(data._replace(x=jnp.where((data.y == 0)[:, None], 1.0, data.x)))
    with pytest.raises(ValueError, match=r"got 3 in class 0 \(the others are dead"):
        run(data._replace(x=data.x.at[:, 3:].set(0)))
    with pytest.raises(ValueError, match=r"at most the 2 features, got 4"):
        run(data._replace(x=data.x[:, :2]))
    with pytest.raises(ValueError, match=r"labels in \[0, 2\)"):
        scores.activation_clusters(identity, num_classes=2)(KEY, None, data, mj.Known())


def test_what_a_tracer_hides_is_handled_as_documented():
    data, _ = make()
    x = jnp.where((data.y == 0)[:, None], 1.0, data.x)
    x = jnp.where((data.y == 1)[:, None] & (jnp.arange(14) > 2)[None], 0.0, x)
    ours = found(data._replace(x=x))
    sources = np.asarray(ours.sources)
    assert np.isfinite(sources).all()
    assert (sources[np.asarray(data.y) == 0] == 0).all() and ours.share[0].tolist() == [1, 0]
    np.testing.assert_allclose(sources[np.asarray(data.y) == 1].std(axis=0), [1, 1, 1, 0], atol=1e-4)
    empty = found(data, num_classes=4)
    assert empty.share[3].tolist() == [0, 0]
