"""Linear algebra on functions: solvers `(matvec, b) -> x` over pytrees, and projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from mlsec_jax import tree

Matvec = Callable[[Any], Any]


def dense(matvec: Matvec, like: Any) -> jax.Array:
    """The matrix `[p, p]` of a linear map between trees shaped as `like`; p products, one vmap."""
    flat, unravel = ravel_pytree(like)
    columns = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
    return columns.T


def cholesky_solve(matvec: Matvec, b: Any) -> Any:
    """Solves `A x = b` for a symmetric positive definite map by forming A: O(p³) time, O(p²) memory."""
    flat, unravel = ravel_pytree(b)
    matrix = dense(matvec, b)
    factor = jax.scipy.linalg.cho_factor((matrix + matrix.T) / 2)
    return unravel(jax.scipy.linalg.cho_solve(factor, flat))


def lu_solve(matvec: Matvec, b: Any) -> Any:
    """Solves `A x = b` for any regular map by forming A."""
    flat, unravel = ravel_pytree(b)
    return unravel(jnp.linalg.solve(dense(matvec, b), flat))


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
    return unravel((flat - columns @ jnp.linalg.solve(inner, columns.T @ flat)) / damping)


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


def project_ball(v: jax.Array, radius: Any) -> jax.Array:
    """The nearest point of the l2 ball to each row of `v` `[k, ...]`; a row inside comes back bit for bit."""
    axes = tuple(range(1, v.ndim))
    square = jnp.sum(jnp.square(v), axis=axes, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    radius = jnp.asarray(radius, v.dtype)
    return jnp.where(square > jnp.square(radius), v * (radius / length), v)
