"""Deep k-NN against scikit-learn, STRIP, RONI and loss-based isolation against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn.neighbors import NearestNeighbors

import mlsec_jax as mj
from mlsec_jax import bilevel, combine, defenses, losses, scores

KEY = jax.random.key(0)
identity = lambda params, x, key=None: x
linear = lambda params, x, key=None: x @ params


def make(n=60, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.normal(size=(n, 5)) * 0.7 + 2 * np.eye(3, 5)[y]
    return mj.dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))


def test_deep_knn_is_scikit_learns_plurality():
    data = make()
    weight = jnp.where(jnp.arange(60) % 7 == 0, 0.0, 1.0)
    data = data._replace(weight=weight, x=data.x.at[0].set(jnp.nan))
    score = scores.deep_knn(identity, num_neighbours=9, num_classes=3, block_size=7)
    ours = np.asarray(jax.jit(score)(KEY, None, data, mj.Known()))
    present = np.asarray(weight) > 0
    x, y = np.asarray(data.x)[present], np.asarray(data.y)[present]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    neighbours = NearestNeighbors(n_neighbors=10).fit(x).kneighbors(x)[1][:, 1:]
    votes = np.stack([(y[neighbours] == c).sum(axis=1) for c in range(3)], axis=1)
    own = votes[np.arange(len(y)), y]
    other = np.where(np.eye(3, dtype=bool)[y], -1, votes).max(axis=1)
    np.testing.assert_allclose(ours[present], (other - own) / 9, atol=1e-6)
    assert (ours[~present] == -1).all()


@pytest.mark.parametrize("seed", range(3))
def test_deep_knn_of_rows_whose_units_are_all_dead_is_brute_force(seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(40, 4)) * (rng.uniform(size=(40, 1)) > 0.2)).astype(np.float32)
    y = rng.integers(0, 3, 40)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / np.where(length > 0, length, 1)
    ours = scores.deep_knn(identity, num_neighbours=7, num_classes=3)(KEY, None, mj.dataset(x, y), mj.Known())
    for i in range(40):
        far = np.linalg.norm(unit - unit[i], axis=1).round(5)  # from a row of zeros all others are equally far
        far[i] = np.inf
        votes = np.bincount(y[np.argsort(far, kind="stable")[:7]], minlength=3)
        np.testing.assert_allclose(ours[i], (np.delete(votes, y[i]).max() - votes[y[i]]) / 7, atol=1e-6)


def test_deep_knn_removes_flipped_labels():
    data = make()
    flipped = data._replace(y=data.y.at[:5].set((data.y[:5] + 1) % 3))
    rule = combine.filter_above(
        scores.deep_knn(identity, num_neighbours=15, num_classes=3), threshold=0.0, reads_model=False
    )
    clean, _ = rule(KEY, flipped, mj.Known())
    removed = np.asarray(clean.weight) == 0
    assert removed[:5].mean() >= 0.8 and removed[5:].mean() < 0.2


def test_strip_is_the_mean_entropy_under_the_overlays():
    data, clean = make(), make(8, seed=1)
    params = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)), jnp.float32)
    for over in ("map", "vmap"):
        score = scores.strip(linear, num_overlays=8, mix=(0.5, 0.25), over=over)
        ours = score(KEY, params, data, mj.Known(clean=clean))
        laid = 0.5 * np.asarray(data.x)[:, None] + 0.25 * np.asarray(clean.x)[None]
        p = np.exp(laid @ np.asarray(params))
        p /= p.sum(axis=2, keepdims=True)
        np.testing.assert_allclose(ours, -stats.entropy(p, base=2, axis=2).mean(axis=1), rtol=1e-4)


def test_strip_flags_what_a_backdoor_decides_at_the_rate_of_a_gaussian():
    """One feature, when lit, outweighs all others."""
    data, clean = make(600), make(50, seed=1)
    params = jnp.asarray(0.7 * np.eye(5, 3), jnp.float32).at[4, 0].set(6.0)
    score = scores.strip(linear, num_overlays=30)
    unlit = lambda data, value: data._replace(x=data.x.at[:, 4].set(value))
    known = mj.Known(clean=unlit(clean, 0.0))
    level = scores.gaussian_threshold(score(KEY, params, unlit(data, 0.0), known), false_alarms=0.01)
    assert (score(KEY, params, unlit(data, 3.0), known) > level).mean() > 0.99
    assert (score(KEY, params, unlit(data, 0.0), known) > level).mean() < 0.05


def test_the_threshold_is_scipys_quantile():
    values = np.random.default_rng(0).normal(2, 3, size=50).astype(np.float32)
    expected = stats.norm(values.mean(), values.std()).ppf(0.99)
    np.testing.assert_allclose(scores.gaussian_threshold(jnp.asarray(values), false_alarms=0.01), expected, rtol=1e-5)
    padded = jnp.concatenate([jnp.asarray(values), jnp.full(3, jnp.nan)])
    weight = jnp.where(jnp.isnan(padded), 0.0, 1.0)
    np.testing.assert_allclose(scores.gaussian_threshold(padded, false_alarms=0.01, weight=weight), expected, rtol=1e-5)


def test_roni_is_what_retraining_without_each_row_says():
    """A trainer of centroids, retrained row by row on the host."""
    clean, data = make(30, seed=1), make(9)
    data = data._replace(y=data.y.at[0].set(1), x=data.x.at[0].multiply(20.0))

    def centroids(key, params, data):
        member = jax.nn.one_hot(data.y, 3) * data.weight[:, None]
        return member.T @ data.x / jnp.maximum(jnp.sum(member, axis=0), 1e-9)[:, None], {}

    apply_fn = lambda params, x, key=None: x @ params.T - jnp.sum(params**2, axis=1)[None] / 2
    score = scores.roni(apply_fn, centroids, num_train=12, num_quiz=18, num_trials=3)
    ours = np.asarray(jax.jit(score)(KEY, None, data, mj.Known(clean=clean)))
    assert np.argmax(ours) == 0 and ours[0] > 0.1
    expected = []
    for key in jax.random.split(KEY, 3):
        order = np.argsort(jax.random.uniform(jax.random.split(key)[0], (30,)))
        x, y = np.asarray(clean.x)[order], np.asarray(clean.y)[order]

        def accuracy(rows, labels, x=x, y=y):
            mean = np.stack([rows[labels == c].mean(axis=0) for c in range(3)])
            return (((x[12:, None] - mean[None]) ** 2).sum(axis=2).argmin(axis=1) == y[12:]).mean()

        joined = [
            accuracy(np.concatenate([x[:12], data.x[i : i + 1]]), np.append(y[:12], data.y[i])) for i in range(9)
        ]
        expected.append(accuracy(x[:12], y[:12]) - np.array(joined))
    np.testing.assert_allclose(ours, np.mean(expected, axis=0), atol=1e-6)


def test_a_short_training_isolates_what_is_learned_at_once_and_flooding_holds_the_rest_up():
    """Rows with a loud feature of their own are learned first; flooding doesn't take the others below its level."""
    data = make(90)
    bad = np.arange(0, 90, 10)
    x = data.x.at[bad].set(0.0).at[bad, 4].set(8.0)
    data = data._replace(x=x, y=data.y.at[bad].set(1))
    loss_fn = losses.cross_entropy(linear)
    clean = np.setdiff1d(np.arange(90), bad)
    mean = {}
    for name, num_steps, slots in (("short", 2, {}), ("long", 300, {}), ("flooded", 300, {"grad_fn": defenses.flooding(0.5)})):
        score = scores.low_loss(loss_fn, trainer=bilevel.unrolled(loss_fn, optax.sgd(0.3), num_steps, **slots))
        value = np.asarray(jax.jit(score)(KEY, jnp.zeros((5, 3)), data, mj.Known()))
        mean[name] = -value[clean].mean()
        if name == "short":
            assert set(np.argsort(-value)[: len(bad)]) == set(bad)
        if name == "flooded":
            assert value[bad].min() > np.quantile(value[clean], 0.9)
    assert mean["long"] < 0.3 < 0.45 < mean["flooded"]
    plain = scores.low_loss(loss_fn)(KEY, jnp.zeros((5, 3)), data, mj.Known())
    np.testing.assert_allclose(plain, -np.log(3), rtol=1e-6)


def test_low_loss_has_the_trainers_derivative():
    with jax.enable_x64(True):
        data = make(12)
        data = mj.dataset(data.x.astype(jnp.float64), data.y)
        loss_fn = losses.cross_entropy(linear)
        score = scores.low_loss(loss_fn, trainer=bilevel.unrolled(loss_fn, optax.sgd(0.3), 3))
        value = lambda x: jnp.sum(score(KEY, jnp.zeros((5, 3)), data._replace(x=x), mj.Known()) ** 2)
        along = jax.random.normal(KEY, data.x.shape, data.x.dtype)
        central = (value(data.x + 1e-5 * along) - value(data.x - 1e-5 * along)) / 2e-5
        np.testing.assert_allclose(jnp.vdot(jax.grad(value)(data.x), along), central, rtol=1e-6)


@pytest.mark.parametrize("at", [0, 4, 20])
@pytest.mark.parametrize("name", ["strip", "roni"])
def test_absent_clean_rows_change_no_draw(name, at):
    data, clean = make(9), make(20, seed=1)
    nothing = mj.dataset(jnp.full((3, 5), jnp.nan), jnp.zeros(3, jnp.int32), jnp.zeros(3))
    padded = jax.tree.map(lambda a, b: jnp.concatenate([a[:at], b, a[at:]]), clean, nothing)
    trainer = bilevel.unrolled(losses.cross_entropy(linear), optax.sgd(0.3), 2)
    params = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)), jnp.float32)
    scorer = jax.jit({
        "strip": scores.strip(linear, num_overlays=4),
        "roni": scores.roni(linear, trainer, num_train=4, num_quiz=5, num_trials=3),
    }[name])  # fmt: skip
    value = scorer(KEY, params, data, mj.Known(clean=clean))
    np.testing.assert_array_equal(scorer(KEY, params, data, mj.Known(clean=padded)), value)


@pytest.mark.parametrize("name", ["deep_knn", "roni"])
def test_what_counts_has_no_derivative_and_says_so(name):
    data = make(12)
    trainer = bilevel.unrolled(losses.cross_entropy(linear), optax.sgd(0.3), 2)
    scorer = {
        "deep_knn": scores.deep_knn(identity, num_neighbours=3, num_classes=3),
        "roni": scores.roni(linear, trainer, num_train=6, num_quiz=6, num_trials=1),
    }[name]
    value = lambda x: jnp.sum(scorer(KEY, jnp.zeros((5, 3)), data._replace(x=x), mj.Known(clean=make(12))))
    with pytest.raises(TypeError, match=f"{name} is piecewise constant"):
        jax.grad(value)(data.x)


def test_bad_input_is_named():
    data = make(12)
    known = mj.Known(clean=make(9))
    with pytest.raises(ValueError, match=r"num_neighbours: expected less than the 11 present rows, got 11"):
        scores.deep_knn(identity, num_neighbours=11, num_classes=3)(
            KEY, None, data._replace(weight=data.weight.at[0].set(0)), known
        )
    with pytest.raises(ValueError, match=r"scores.strip needs known.clean"):
        scores.strip(linear)(KEY, None, data, mj.Known())
    with pytest.raises(ValueError, match=r"num_overlays: expected at most the 9 rows"):
        scores.strip(linear, num_overlays=10)(KEY, jnp.zeros((5, 3)), data, known)
    with pytest.raises(ValueError, match=r"num_overlays: expected at most the 8 rows"):
        fewer = known.clean._replace(weight=known.clean.weight.at[0].set(0))
        scores.strip(linear, num_overlays=9)(KEY, jnp.zeros((5, 3)), data, mj.Known(clean=fewer))
    with pytest.raises(ValueError, match=r"num_train \+ num_quiz: expected at most the 9 rows of known.clean, got 10"):
        scores.roni(linear, None, num_train=5, num_quiz=5)(KEY, None, data, known)
