"""Splits, conversions and synthetic problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import base, data

KEY = jax.random.key(0)
split = jax.jit(data.split, static_argnames=("sizes", "stratify"))
ridge_solution = jax.jit(data.ridge_solution)


def test_to_data_scales_bytes_and_nothing_else():
    x = np.arange(8, dtype=np.uint8).reshape(2, 2, 2) * 36
    got = data.to_data(x, np.array([1, 0], np.uint8), channel=True)
    np.testing.assert_allclose(got.x[..., 0], x / 255, rtol=1e-6)
    assert got.x.shape == (2, 2, 2, 1) and got.x.dtype == jnp.float32 and got.y.dtype == jnp.int32
    assert got.weight.tolist() == [1, 1]
    assert data.to_data(got.x, got.y, channel=True).x.shape == (2, 2, 2, 1)
    codes = data.to_data(np.array([[-1, 300]]), np.array([0.5]))
    assert codes.x.tolist() == [[-1, 300]] and codes.y.dtype == jnp.float32
    assert data.to_data(x, [0, 1], flatten=True).x.shape == (2, 4)
    with pytest.raises(ValueError, match="channel and flatten"):
        data.to_data(x, [0, 1], channel=True, flatten=True)
    with pytest.raises(ValueError, match="channel: expected images"):
        data.to_data(np.zeros((2, 3)), [0, 1], channel=True)


def test_select_classes_keeps_order_and_relabels():
    x, y = np.arange(6), np.array([8, 3, 1, 3, 8, 0])
    got_x, got_y = data.select_classes(x, y, [3, 8])
    assert got_x.tolist() == [0, 1, 3, 4] and got_y.tolist() == [1, 0, 0, 1]
    assert data.select_classes(x, y, [3, 8], relabel=False)[1].tolist() == [8, 3, 3, 8]
    for classes in (np.array([3, 8]), jnp.array([3, 8])):
        assert data.select_classes(x, y, classes)[1].tolist() == [1, 0, 0, 1]
    for classes in ([3, 5], [3, 3], [], np.array([3, 5])):
        with pytest.raises(ValueError, match="classes: expected"):
            data.select_classes(x, y, classes)


@pytest.mark.parametrize("stratify", [False, True])
def test_split_is_a_keyed_partition(stratify):
    rows = base.dataset({"a": jnp.arange(30.0)[:, None], "b": jnp.arange(30)}, jnp.arange(30) % 3, jnp.arange(30.0))
    parts = split(KEY, rows, (12, 10, 5), stratify=stratify)
    seen = np.concatenate([np.asarray(part.x["b"]) for part in parts])
    assert [part.num_rows for part in parts] == [12, 10, 5] and len(set(seen.tolist())) == 27
    for part in parts:  # a row stays whole
        np.testing.assert_array_equal(part.x["a"][:, 0], part.x["b"])
        np.testing.assert_array_equal(part.weight, part.x["b"])
        np.testing.assert_array_equal(part.y, np.asarray(part.x["b"]) % 3)
    again = split(KEY, rows, (12, 10, 5), stratify=stratify)
    other = split(jax.random.key(1), rows, (12, 10, 5), stratify=stratify)
    assert again[0].x["b"].tolist() == parts[0].x["b"].tolist() != other[0].x["b"].tolist()


def test_stratified_equal_classes_are_exact():
    rows = base.dataset(jnp.zeros((200, 1)), jnp.repeat(jnp.arange(10), 20))
    for part in split(KEY, rows, (50, 100, 10), stratify=True):
        assert np.bincount(part.y, minlength=10).tolist() == [part.num_rows // 10] * 10


def test_stratified_unequal_classes_are_within_two_rows():
    labels = jnp.asarray(np.repeat([0, 1, 2], [700, 250, 50]))
    rows = base.dataset(jnp.zeros((1000, 1)), labels)
    sizes = (100, 333, 20, 400)
    for part, size in zip(split(KEY, rows, sizes, stratify=True), sizes):
        assert np.abs(np.bincount(part.y, minlength=3) - size * np.array([0.7, 0.25, 0.05])).max() <= 2


def test_every_row_is_equally_likely_to_be_chosen():
    rows = base.dataset(jnp.arange(12.0)[:, None], jnp.arange(12) % 2)
    first = lambda key: data.split(key, rows, [4], stratify=True)[0].x[:, 0].astype(int)
    chosen = np.bincount(np.asarray(jax.jit(jax.vmap(first))(jax.random.split(KEY, 3000))).ravel(), minlength=12)
    sigma = np.sqrt(3000 * (1 / 3) * (2 / 3))
    assert np.abs(chosen - 1000).max() < 4 * sigma


def test_split_refuses_bad_sizes():
    rows = base.dataset(jnp.zeros((4, 1)), jnp.zeros(4))
    for sizes in ([3, 2], [0], [1.5]):
        with pytest.raises(ValueError, match="sizes: expected"):
            data.split(KEY, rows, sizes)
    with pytest.raises(ValueError, match="stratify: expected integer labels"):
        data.split(KEY, rows, [2], stratify=True)


def test_gaussian_blobs_have_the_stated_moments_and_bayes_error():
    rows, truth = data.gaussian_blobs(KEY, rows_per_class=20_000, mean=0.5, scale=0.8)
    x, y = np.asarray(rows.x), np.asarray(rows.y)
    for label, sign in ((0, -1), (1, 1)):
        np.testing.assert_allclose(x[y == label].mean(axis=0), [sign * 0.5, 0], atol=5 * 0.8 / np.sqrt(20_000))
        np.testing.assert_allclose(x[y == label].std(axis=0), 0.8, rtol=0.03)
    rule = (x @ np.asarray(truth["w"]) + float(truth["b"]) > 0).astype(int)
    error = float(truth["error"])
    assert abs(np.mean(rule != y) - error) < 4 * np.sqrt(error * (1 - error) / 40_000)
    assert error == pytest.approx(0.26599, abs=1e-5)  # Φ(-0.625)
    log_odds = ((x + [0.5, 0]) ** 2 - (x - [0.5, 0]) ** 2).sum(axis=1) / (2 * 0.8**2)
    np.testing.assert_allclose(x @ np.asarray(truth["w"]), log_odds, rtol=1e-3, atol=1e-4)


def test_ridge_solution_matches_scikit_learn_and_ignores_absent_rows():
    from sklearn.linear_model import Ridge

    rows, _ = data.linear_regression(KEY, num_rows=40, dim=5, noise=0.3)
    weight = jnp.linspace(0.5, 2.0, 40)
    got = ridge_solution(rows._replace(weight=weight), 0.1)
    # scikit-learn minimises Σ ω r² + α ‖w‖², ours Σ ω r²/2 / Σω + l2 ‖w‖²/2: α = l2 Σω.
    oracle = Ridge(alpha=0.1 * float(weight.sum()), tol=1e-10).fit(rows.x, rows.y, sample_weight=np.asarray(weight))
    np.testing.assert_allclose(got["w"], oracle.coef_, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(got["b"], oracle.intercept_, rtol=2e-4)
    holes = rows._replace(x=rows.x.at[3].set(jnp.nan), y=rows.y.at[3].set(jnp.nan), weight=weight.at[3].set(0.0))
    kept = np.delete(np.arange(40), 3)
    fewer = jax.tree.map(lambda leaf: leaf[kept], rows._replace(weight=weight))
    np.testing.assert_allclose(ridge_solution(holes, 0.1)["w"], ridge_solution(fewer, 0.1)["w"], rtol=1e-5)
    grad = jax.jit(jax.grad(lambda weight: data.ridge_solution(holes._replace(weight=weight), 0.1)["w"].sum()))(
        holes.weight
    )
    assert np.isfinite(np.asarray(grad)).all()


def test_ridge_solution_is_stationary_in_float64():
    with jax.enable_x64(True):
        rows, _ = jax.jit(lambda key: data.linear_regression(key, num_rows=30, dim=4))(KEY)
        assert rows.x.dtype == jnp.float64
        solution = ridge_solution(rows, 0.5)

        def objective(params):
            residual = rows.x @ params["w"] + params["b"] - rows.y
            return 0.5 * jnp.mean(residual**2) + 0.25 * jnp.sum(params["w"] ** 2)

        gradient = jax.jit(jax.grad(objective))(solution)
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-12


def test_sparse_regression_truth_generates_the_labels():
    rows, truth = data.sparse_regression(KEY, num_rows=50, dim=20, num_active=3, noise=0.0)
    np.testing.assert_allclose(rows.x @ truth["w"] + truth["b"], rows.y, rtol=1e-5, atol=1e-5)
    assert int(truth["support"].sum()) == 3
    np.testing.assert_array_equal(jnp.abs(truth["w"]), truth["support"].astype(jnp.float32))
    with pytest.raises(ValueError, match="num_active: expected at most 20"):
        data.sparse_regression(KEY, num_rows=5, dim=20, num_active=21)
