"""Projections onto simplices and hulls, against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import linalg


def brute_force(gram):
    """The least `cᵀ G c` on the simplex, by the KKT system of every subset of corners."""
    k, values, scale = len(gram), [], np.diag(gram).max()
    gram = gram / scale
    for size in range(1, k + 1):
        for corners in map(list, itertools.combinations(range(k), size)):
            ones = np.ones((size, 1))
            system = np.block([[gram[np.ix_(corners, corners)], ones], [ones.T, np.zeros((1, 1))]])
            c = np.linalg.lstsq(system, np.r_[np.zeros(size), 1], rcond=None)[0][:size]
            if np.all(c >= -1e-12):
                values.append(c @ gram[np.ix_(corners, corners)] @ c)
    return scale * min(values)


@pytest.mark.parametrize("k", range(1, 7))
def test_the_nearest_point_of_a_hull_is_brute_forces(x64, k):
    rng = np.random.default_rng(k)
    solve = jax.jit(linalg.nearest_in_hull)
    for trial in range(20):
        points = rng.normal(size=(k, rng.integers(1, 12))) + 3 * rng.integers(0, 2)
        if trial % 4 == 0 and k > 1:
            points[1] = points[0]  # a corner twice: the Gram matrix is singular
        points *= 10.0 ** rng.integers(-3, 4)
        gram = points @ points.T
        c = np.asarray(solve(jnp.asarray(gram)))
        assert abs(c.sum() - 1) < 1e-12 and c.min() >= 0
        assert c @ gram @ c - brute_force(gram) <= 1e-9 * np.diag(gram).max()


def test_in_single_precision_it_stays_on_the_simplex():
    points = np.random.default_rng(0).normal(size=(30, 25, 64)) + 0.5
    c = np.asarray(jax.vmap(linalg.nearest_in_hull)(jnp.asarray(points @ points.transpose(0, 2, 1), jnp.float32)))
    assert np.abs(c.sum(axis=1) - 1).max() < 1e-6 and c.min() >= 0


def test_descent_ends_at_the_nearest_point_and_never_rises(x64):
    points = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6)) + 0.3)
    gram = points @ points.T
    path = [linalg.descend_in_hull(gram, num_steps) for num_steps in (0, 1, 5, 30, 3000)]
    values = [float(c @ gram @ c) for c in path]
    assert all(abs(float(c.sum()) - 1) < 1e-12 and float(c.min()) >= 0 for c in path)
    assert np.all(np.diff(values) < 0)
    np.testing.assert_allclose(path[-1], linalg.nearest_in_hull(gram), atol=1e-8)
    np.testing.assert_allclose(linalg.descend_in_hull(jnp.zeros((3, 3)), 5), np.full(3, 1 / 3))


def test_points_that_coincide_with_the_origin_are_a_solution():
    c = linalg.nearest_in_hull(jnp.zeros((3, 3)))
    assert float(jnp.sum(c)) == 1 and not bool(jnp.any(jnp.isnan(c)))


def test_a_singular_matrix_has_the_least_solution_where_nothing_depends_on_its_null_space(x64):
    root = np.random.default_rng(0).normal(size=(6, 4))
    matrix, b = root @ root.T, root @ np.arange(4.0)
    matvec = jax.jit(lambda b: linalg.cholesky_solve(lambda v: jnp.asarray(matrix) @ v, b))
    np.testing.assert_allclose(matrix @ matvec(jnp.asarray(b)), b, atol=1e-9)


AWKWARD = [  # rounding puts a corner's aim between 0 and the machine's epsilon: it has to go all the same
    [[5.0, 0, 6], [2, 3, 0], [2, 5, 6], [4, 1, 0]],
    [[1.0, 1, 0, 1], [1, 0, 1, 0], [-1, 0, 0, -1], [1, 0, 0, 1], [1, 1, -1, 1], [1, 0, -1, 1]],
    [[-0.908341188203336], [0.03761859735479172], [-0.03603852918240967], [-1.1040489638856585], [-0.0769278884121896],
     [-1.3863790713450346]],
]  # fmt: skip


@pytest.mark.parametrize("points", AWKWARD)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_nearest_point_is_found_where_rounding_misleads(x64, points, dtype):
    gram = np.asarray(points) @ np.asarray(points).T
    c = np.asarray(jax.jit(linalg.nearest_in_hull)(jnp.asarray(gram, dtype)), np.float64)
    assert c @ gram @ c - brute_force(gram) <= 1e3 * np.finfo(dtype).eps * np.diag(gram).max()


def test_many_small_hulls_of_integer_points():
    points = np.random.default_rng(0).integers(-1, 2, size=(4000, 6, 4)).astype(np.float32)
    gram = points @ points.transpose(0, 2, 1)
    c = np.asarray(jax.jit(jax.vmap(linalg.nearest_in_hull))(jnp.asarray(gram)))
    assert np.isfinite(c).all() and c.min() >= 0
    for k in range(0, 4000, 40):
        assert c[k] @ gram[k] @ c[k] - brute_force(gram[k].astype(np.float64)) <= 1e-5 * np.diag(gram[k]).max()


def brute_force_points(points):
    """The least distance from the origin, by the affine hull of every subset of corners: no products, no loss of digits."""
    lengths = []
    for size in range(1, len(points) + 1):
        for corners in itertools.combinations(points, size):
            last, sides = corners[-1], np.asarray(corners)[:-1] - corners[-1]
            c = np.linalg.lstsq(sides.T, -last, rcond=None)[0]
            if np.all(c >= -1e-13) and c.sum() <= 1 + 1e-13:
                lengths.append(np.linalg.norm(last + c @ sides))
    return min(lengths)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["one far", "far apart"])
def test_corners_of_very_different_distances(x64, dtype, kind):
    """The error is a part of the nearest corner's distance, not of the farthest one's."""
    rng = np.random.default_rng(0)
    far = np.array([1, 1e-4, 1e-4, 1e-4, 1e-4]) if kind == "one far" else 10.0 ** rng.uniform(-4, 4, size=(60, 5))
    points = (rng.normal(size=(60, 5, 2)) * far[..., None]).astype(dtype).astype(np.float64)
    gram = jnp.asarray(points @ points.transpose(0, 2, 1), dtype)
    c = np.asarray(jax.jit(jax.vmap(linalg.nearest_in_hull))(gram), np.float64)
    for given, found in zip(points, c, strict=True):
        nearest = np.linalg.norm(given, axis=1).min()
        assert np.linalg.norm(found @ given) - brute_force_points(given) <= 1e4 * np.finfo(dtype).eps * nearest


def test_hulls_in_half_precision():
    c = linalg.nearest_in_hull(jnp.eye(2, dtype=jnp.bfloat16))
    assert c.dtype == jnp.bfloat16 and c.tolist() == [0.5, 0.5]
