"""Linear algebra on functions: solvers `(matvec, b) -> x` over pytrees, and projections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from mlsec_jax import tree

Matvec = Callable[[Any], Any]


def dense(matvec: Matvec, like: Any) -> jax.Array:
    """The matrix `[p, p]` of a linear map between trees shaped as `like`; p products, one vmap."""
    flat, unravel = ravel_pytree(like)
    columns = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
    return columns.T


def cholesky_solve(matvec: Matvec, b: Any) -> Any:
    """Solves `A x = b` for a symmetric positive semi-definite map by forming A: O(p³) time, O(p²) memory.

    With b in A's range, so that a singular A is one whose null directions do nothing: `damped`, refined once.
    """
    flat, unravel = ravel_pytree(b)
    wide = np.promote_types(flat.dtype, np.float32)
    matrix, target = dense(matvec, b).astype(wide), flat.astype(wide)
    matrix = (matrix + matrix.T) / 2
    factor = jax.scipy.linalg.cho_factor(damped(matrix))
    x = jax.scipy.linalg.cho_solve(factor, target)
    x = x + jax.scipy.linalg.cho_solve(factor, target - matrix @ x)
    return unravel(x.astype(flat.dtype))


def damped(matrix: jax.Array) -> jax.Array:
    """`A + 4 ε tr(A) I`, ε the machine's, in at least float32: regular for a positive semi-definite A.

    Such is the Hessian of a softmax with biases that no penalty holds: added to all of them a constant changes nothing.
    """
    matrix = matrix.astype(np.promote_types(matrix.dtype, np.float32))  # half precision has no solver
    level = 4 * jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
    return matrix + level * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def lu_solve(matvec: Matvec, b: Any) -> Any:
    """Solves `A x = b` for any regular map by forming A."""
    flat, unravel = ravel_pytree(b)
    return unravel(solve(dense(matvec, b), flat))


def solve(matrix: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.linalg.solve` in at least float32; the answer has the dtype of b."""
    wide = np.promote_types(b.dtype, np.float32)
    return jnp.linalg.solve(matrix.astype(wide), b.astype(wide)).astype(b.dtype)


def neumann_solve(matvec: Matvec, b: Any, *, num_terms: int, scale: Any) -> Any:
    """`x = s Σ_{i<k} (I - s A)^i b`, the truncated Neumann series; converges where `0 < s λ(A) < 2`."""

    def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        term, total = carry
        term = tree.add_scaled(term, -scale, matvec(term))
        return (term, tree.add_scaled(total, 1.0, term)), None

    (_, total), _ = jax.lax.scan(body, (b, b), None, length=num_terms - 1)
    return jax.tree.map(lambda leaf: jnp.asarray(scale, leaf.dtype) * leaf, total)


def nystrom_solve(key: jax.Array, matvec: Matvec, b: Any, *, rank: int, damping: Any) -> Any:
    """Solves `(A_r + ρ I) x = b`, A_r the rank-r Nyström approximation of a symmetric positive semi-definite map.

    With C = A Ω and W = Ωᵀ A Ω for r random coordinates Ω, Woodbury's identity gives
    `x = b/ρ - C (ρ W + CᵀC)⁻¹ Cᵀ b / ρ`. Reference: Hataya & Yamada, AISTATS 2023, eq. (6).
    """
    flat, unravel = ravel_pytree(b)
    chosen = jax.random.choice(key, flat.size, (rank,), replace=False)
    basis = jnp.zeros((rank, flat.size), flat.dtype).at[jnp.arange(rank), chosen].set(1)
    columns = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(basis).T
    core = columns[chosen]
    damping = jnp.asarray(damping, flat.dtype)
    inner = damping * (core + core.T) / 2 + columns.T @ columns
    inner = inner + jnp.finfo(flat.dtype).eps * jnp.trace(inner) * jnp.eye(rank, dtype=flat.dtype)
    return unravel((flat - columns @ solve(inner, columns.T @ flat)) / damping)


def turned(label: jax.Array, shift: Any, num_classes: int) -> jax.Array:
    """`(label + shift) mod num_classes`, in the labels' dtype, which may be too narrow for the sum.

    >>> turned(jnp.array([90], jnp.int8), 50, 100).tolist()
    [40]
    """
    return ((label.astype(jnp.int32) + shift) % num_classes).astype(label.dtype)


def project_simplex(v: jax.Array, total: Any = 1.0) -> jax.Array:
    """The nearest point of `{x ≥ 0, Σ x = total}` to each row of `v` `[..., k]`, by sorting.

    Reference: Duchi et al., ICML 2008, fig. 1.

    >>> project_simplex(jnp.array([2.0, 0.0])).tolist()
    [1.0, 0.0]
    """
    k = v.shape[-1]
    ordered = -jnp.sort(-v, axis=-1)
    gap = jnp.cumsum(ordered, axis=-1) - jnp.asarray(total, v.dtype)
    index = jnp.arange(1, k + 1, dtype=v.dtype).reshape((1,) * (v.ndim - 1) + (k,))
    active = jnp.sum(ordered - gap / index > 0, axis=-1, keepdims=True)
    shift = jnp.take_along_axis(gap, active - 1, axis=-1) / active.astype(v.dtype)
    return jax.nn.relu(v - shift)


def project_ball(v: Any, radius: Any) -> Any:
    """The nearest point of the l2 ball to each row of a tree `[k, ...]`; a row inside comes back bit for bit."""
    squares = [jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(v)]
    square = functools.reduce(lambda a, b: a + b.astype(a.dtype), squares)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    radius = jnp.asarray(radius, square.dtype)
    if radius.size > 1 and radius.size != radius.shape[0]:
        raise ValueError(f"radius: expected a number, or one a row, for l2, got shape {radius.shape}.")
    radius = jnp.broadcast_to(radius.reshape(-1), square.shape)
    far = lambda leaf: tree.per_row(square > jnp.square(radius), leaf)
    part = lambda leaf: tree.per_row(radius / length, leaf).astype(leaf.dtype)
    return jax.tree.map(lambda leaf: jnp.where(far(leaf), leaf * part(leaf), leaf), v)


def nearest_in_hull(gram: jax.Array) -> jax.Array:
    """The point of a convex hull nearest to the origin: `argmin_c cᵀ G c`, `c ≥ 0`, `Σ c = 1`, `G = P Pᵀ` of k points.

    An active-set method: it ends after finitely many corners, and c is exact to rounding, each corner's in units of its own
    distance from the origin. With `P = Φ - t` it is
    least squares on the simplex, `min ‖cᵀΦ - t‖`. Corners that do not help are left out, so c is sparse.

    Args:
      gram: `[k, k]`, symmetric positive semi-definite.

    Returns:
      c `[k]`.

    Reference: P. Wolfe, "Finding the nearest point in a polytope", Mathematical Programming 11, 1976.

    >>> nearest_in_hull(jnp.array([[2.0, 0.0], [0.0, 2.0]])).round(3).tolist()
    [0.5, 0.5]
    """
    k, given = gram.shape[0], gram.dtype
    gram = gram.astype(np.promote_types(given, np.float32))  # which half precision has no solver for
    diagonal = jnp.diagonal(gram)
    longest = jnp.max(diagonal)
    gram = gram / jnp.where(longest > 0, longest, 1)
    far = jnp.sqrt(jnp.where(diagonal > 0, diagonal / jnp.where(longest > 0, longest, 1), 1))  # |p_i|; corners differ in size
    cosines = gram / jnp.outer(far, far)
    eye = jnp.eye(k, dtype=gram.dtype)
    tiny = jnp.finfo(gram.dtype).eps

    def affine(corners: jax.Array) -> jax.Array:
        """The nearest point of the affine hull of the corners `[k]` (bools), as `c_i |p_i|` to a factor; 0 elsewhere."""
        part = jnp.where(corners, jnp.min(jnp.where(corners, far, jnp.inf)) / far, 0)
        system = jnp.where(corners[:, None] & corners[None], cosines + jnp.outer(part, part), 0)
        return jnp.linalg.solve(system + jnp.where(corners, 10 * tiny, 1)[:, None] * eye, part)

    def inner(carry: tuple) -> tuple:
        c, corners, _ = carry
        scaled = affine(corners)
        shrinking = corners & (scaled <= tiny * jnp.max(scaled))
        aim = scaled / far
        aim = aim / jnp.sum(aim)
        fall = jnp.where(c > 0, c - jnp.minimum(aim, 0), 1)
        ratio = jnp.where(shrinking, c / fall, jnp.inf)  # in [0, 1] whatever rounding made of aim: one corner goes each time
        step = jnp.minimum(jnp.min(ratio), 1)
        moved = jnp.where(corners, c + step * (aim - c), 0)
        dropped = shrinking & (ratio <= step)
        corners = corners & ~dropped
        moved = jnp.where(corners, jnp.maximum(moved, 0), 0)
        return moved / jnp.sum(moved), corners, jnp.any(shrinking)

    def outer(carry: tuple) -> tuple:
        c, corners, value, _, count = carry
        reach = jnp.sum(c * far)
        gain = (c @ (gram @ c) - gram @ c) / (reach * jnp.maximum(far, reach))  # in units of what rounding makes of it
        best = jnp.argmax(gain)
        optimal = (gain[best] <= 32 * tiny) | corners[best]
        wider = corners | (jnp.arange(k) == best)
        c_new, corners_new, _ = jax.lax.while_loop(lambda s: s[2], inner, (c, wider, jnp.asarray(True)))
        value_new = c_new @ (gram @ c_new)
        stop = optimal | (value_new >= value)  # rounding: the last corner brought nothing
        keep = lambda new, old: jnp.where(stop, old, new)
        return keep(c_new, c), keep(corners_new, corners), keep(value_new, value), stop, count + 1

    first = jnp.arange(k) == jnp.argmin(diagonal)
    start = first.astype(gram.dtype)
    state = (start, first, start @ (gram @ start), jnp.asarray(False), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda s: ~s[3] & (s[4] < 4 * k), outer, state)[0].astype(given)


def descend_in_hull(gram: jax.Array, num_steps: int) -> jax.Array:
    """Projected gradient descent on the problem of `nearest_in_hull`, from equal coefficients with steps of `1 / ‖G‖_∞`.

    Stopped early it leaves weight on every point: between the mean (no step) and the nearest point (in the limit).

    Args:
      gram: `[k, k]`, symmetric positive semi-definite.
      num_steps: static.

    Returns:
      c `[k]`.

    >>> [round(c, 3) for c in descend_in_hull(jnp.array([[2.0, 0.0], [0.0, 6.0]]), 100).tolist()]
    [0.75, 0.25]
    """
    k = gram.shape[0]
    bound = jnp.max(jnp.sum(jnp.abs(gram), axis=1))
    rate = 1 / jnp.where(bound > 0, bound, 1)
    step = lambda _, c: project_simplex(c - rate * (gram @ c))
    return jax.lax.fori_loop(0, num_steps, step, jnp.full(k, 1 / k, gram.dtype))


def ranked(score: jax.Array, group: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows sorted by group and, within it, by rising score: O(n log n).

    Args:
      score: `[n]`.
      group: `[n]`, integers; rows of `num_groups` belong to none and come last.
      num_groups: static.

    Returns:
      `(order [n], rank [n], count [num_groups])`: the sorted rows, each row's place among those of its group, and how many
      each group has. The rank of a row of no group has no meaning.
    """
    order = jnp.argsort(score, stable=True)
    order = order[jnp.argsort(group[order], stable=True)]
    member = group[None] == jnp.arange(num_groups, dtype=group.dtype)[:, None]
    count = jnp.sum(member, axis=1, dtype=jnp.int32)
    place = jnp.zeros(score.shape, jnp.int32).at[order].set(jnp.arange(score.size, dtype=jnp.int32))
    return order, place - (jnp.cumsum(count) - count)[group], count


def root(square: jax.Array) -> jax.Array:
    """`√s`, with derivative 0 where s is 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def whole_share(fraction: Any, count: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """`⌊fraction · count⌋` of a decimal fraction, whose product rounding may leave just below a whole number."""
    wide = np.promote_types(dtype, np.float32)
    part = jnp.asarray(fraction, wide) * count.astype(wide)
    slack = jnp.minimum(4 * float(jnp.finfo(wide).eps) * part, 0.01) + 1e-6  # .84 of 75 is 63
    return jnp.floor(part + slack).astype(jnp.int32)


def inverse_root(square: jax.Array) -> jax.Array:
    """`1 / √s`; 0, with derivative 0, where s is 0: what scales a vector of squared norm s to unit length."""
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def top_eigenvector(
    matvec: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    *,
    num_steps: int = 32,
    tolerance: float = 1e-3,
    max_rounds: int = 16,
) -> jax.Array:
    """The unit eigenvector of the largest eigenvalue of a symmetric positive semi-definite map, by Lanczos.

    Reorthogonalised fully, and begun again from the vector found until `‖A v - λ v‖ ≤ tolerance λ`. Its derivative is that
    of the eigenvector itself (implicit: `(A - λ I) dv = -(I - v vᵀ) dA v`, by conjugate gradients), not of the iteration; it
    is meaningful where the largest eigenvalue is simple.

    Args:
      matvec: `[..., d] -> [..., d]`, for each leading index a map of its own.
      start: `[..., d]`, not orthogonal to the answers; their signs are arbitrary.
      num_steps: of a round, static; at most d are taken.
      tolerance: of the residual; the vector's own error is that times `λ / (λ - λ₂)`.
      max_rounds: after as many the vector is returned as it is.

    Returns:
      `[..., d]`; the start, normalised, for the zero map.

    >>> v = top_eigenvector(lambda u: jnp.array([1.0, 3.0]) * u, jnp.array([1.0, 1.0]))
    >>> jnp.abs(v).round(3).tolist()
    [0.0, 1.0]
    """
    num_steps = min(num_steps, start.shape[-1])
    fixed = lambda u: jax.lax.stop_gradient(matvec(jax.lax.stop_gradient(u)))
    dot = lambda u, v: jnp.sum(u * v, axis=-1, keepdims=True)
    unit = lambda u: u / jnp.where(dot(u, u) > 0, jnp.sqrt(jnp.where(dot(u, u) > 0, dot(u, u), 1)), 1)
    tiny = jnp.finfo(start.dtype).eps

    def body(carry: tuple[jax.Array, jax.Array], k: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        basis, q = carry
        basis = basis.at[k].set(q)
        rest = fixed(q)
        along, size = dot(q, rest), jnp.sqrt(dot(rest, rest))
        for _ in range(2):
            rest = rest - jnp.sum(dot(basis, rest[None]) * basis, axis=0)
        beta = jnp.sqrt(dot(rest, rest))
        done = beta <= 100 * tiny * size
        return (basis, jnp.where(done, 0, rest / jnp.where(done, 1, beta))), (along[..., 0], jnp.where(done, 0, beta)[..., 0])

    diagonal = lambda values, k: jnp.vectorize(lambda v: jnp.diag(v, k), signature="(m)->(l,l)")(jnp.moveaxis(values, 0, -1))

    def one_round(carry: tuple) -> tuple:
        rounds, first, _ = carry
        none = (jnp.zeros((num_steps, *start.shape), start.dtype), first)
        (basis, _), (alpha, beta) = jax.lax.scan(body, none, jnp.arange(num_steps))
        off = diagonal(beta[:-1], 1)
        values, ritz = jnp.linalg.eigh(diagonal(alpha, 0) + off + jnp.swapaxes(off, -1, -2))
        v = unit(jnp.sum(jnp.moveaxis(ritz[..., -1], -1, 0)[..., None] * basis, axis=0))
        far = beta[-1] * jnp.abs(ritz[..., -1, -1]) > jnp.asarray(tolerance, start.dtype) * values[..., -1]
        return rounds + 1, jnp.where(dot(v, v) > 0, v, first), jnp.any(far)

    begin = (0, unit(jax.lax.stop_gradient(start)), jnp.array(True))
    _, v, _ = jax.lax.while_loop(lambda carry: carry[2] & (carry[0] < max_rounds), one_round, begin)
    v = jax.lax.stop_gradient(v)

    def negative(u: jax.Array) -> jax.Array:
        """λ I - A on the complement of v, and 2 λ + 2 along it: positive definite where λ is simple."""
        return top * u - fixed(u) + (top + 2) * dot(v, u) * v

    top = dot(v, fixed(v))
    image = matvec(v)
    residual = image - dot(v, image) * v
    change = residual - jax.lax.stop_gradient(residual)  # zero, and all of the derivative
    return v + jax.scipy.sparse.linalg.cg(negative, change, tol=1e-6, maxiter=4 * start.size)[0]
