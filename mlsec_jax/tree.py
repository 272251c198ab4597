"""Helpers on pytrees of arrays: choose leaves, and treat a tree as a vector."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Where = Any  # None (all), a mask pytree or prefix of bools, or a predicate (path, leaf) -> bool


def is_float(leaf: Any) -> bool:
    """Whether a leaf can be differentiated and updated: an array of floats, or a Python float."""
    return isinstance(leaf, float) or (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating))


def mask_of(tree: Any, where: Where = None) -> Any:
    """Turns `where` into a pytree of Python bools; leaves that are not floating are never chosen.

    Args:
      tree: any pytree.
      where: None for every leaf; a pytree of bools that is a prefix of `tree`; or `(path, leaf) -> bool`, where
        `path` is the leaf's name such as `"head/kernel"`.

    >>> mask_of({"a": jnp.ones(2), "n": jnp.arange(2)})
    {'a': True, 'n': False}
    """
    if where is None:
        return jax.tree.map(is_float, tree)
    if callable(where):
        predicate: Callable[[str, Any], bool] = where
        keep = lambda path, leaf: is_float(leaf) and bool(predicate(name(path), leaf))
        return jax.tree_util.tree_map_with_path(keep, tree)
    return jax.tree.map(
        lambda chosen, sub: jax.tree.map(lambda leaf: _as_bool(chosen) and is_float(leaf), sub), where, tree
    )


def array(leaf: Any) -> Any:
    """A Python float as an array, everything else as it is."""
    return jnp.asarray(leaf) if isinstance(leaf, float) else leaf


def _as_bool(chosen: Any) -> bool:
    """A leaf of a mask; a string or a number, of which `bool` would be true, raises."""
    if not isinstance(chosen, bool) and np.asarray(chosen).dtype.kind != "b":
        raise ValueError(f"mask: expected None, a pytree of bools or (path, leaf) -> bool, got {chosen!r}.")
    return bool(chosen)


def name(path: Any) -> str:
    """The name of a key path: `"head/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(tree: Any, where: Where = None) -> tuple[Any, Any]:
    """Splits a tree into `(chosen, rest)`, arrays and the others: None stands in place of the other's leaves."""
    mask = mask_of(tree, where)
    chosen = jax.tree.map(lambda leaf, keep: array(leaf) if keep else None, tree, mask)
    rest = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, mask)
    return chosen, rest


def merge(chosen: Any, rest: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, chosen, rest, is_leaf=lambda leaf: leaf is None)


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees, summed in at least float32."""
    wide = lambda leaf: array(leaf).astype(np.promote_types(array(leaf).dtype, np.float32)) if is_float(leaf) else leaf
    terms = jax.tree.leaves(jax.tree.map(lambda u, v: jnp.vdot(wide(u), wide(v)), a, b))
    return functools.reduce(jnp.add, terms) if terms else jnp.zeros(())


def norm(a: Any) -> jax.Array:
    """The Euclidean norm of a tree."""
    return jnp.sqrt(dot(a, a))


def clip_factor(a: Any, length: Any) -> jax.Array:
    """What cuts a tree to a Euclidean norm of `length`: `min(1, length / ‖a‖)`, 1 for a zero; at least float32."""
    square = dot(a, a)
    own = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jnp.where(square > 0, jnp.minimum(1, jnp.asarray(length, own.dtype) / own), 1)


def cosine(a: Any, b: Any) -> jax.Array:
    """The cosine between two trees; NaN if one is zero, for a zero gradient has no direction."""
    return dot(a, b) / (norm(a) * norm(b))


def add_scaled(a: Any, scale: Any, b: Any) -> Any:
    """`a + scale * b`, leaf by leaf, in the dtype of `a`."""
    return jax.tree.map(lambda u, v: u + (jnp.asarray(scale, u.dtype) * v.astype(u.dtype)), a, b)


def all_finite(a: Any) -> jax.Array:
    """Whether no entry of the tree is NaN or infinite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(a)]))


def choose(condition: jax.Array, a: Any, b: Any) -> Any:
    """The tree a where the scalar condition holds, else b."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), a, b)


def take(tree: Any, rows: Any) -> Any:
    """The given rows of every leaf."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], tree)


def put(tree: Any, rows: Any, values: Any) -> Any:
    """The same with the given rows of every leaf replaced, in its dtype."""
    return jax.tree.map(lambda leaf, new: jnp.asarray(leaf).at[rows].set(new.astype(leaf.dtype)), tree, values)


def each(fn: Callable[..., Any], *operands: Any, over: str) -> Any:
    """`fn` of every row of the operands: `over="vmap"` all at once, `"map"` one after another."""
    return jax.vmap(fn)(*operands) if over == "vmap" else jax.lax.map(lambda row: fn(*row), operands)


def per_row(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes `[n]` so that it multiplies `[n, ...]` without rank promotion."""
    return vector.reshape(vector.shape + (1,) * (like.ndim - vector.ndim))
