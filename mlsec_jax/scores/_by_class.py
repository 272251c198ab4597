"""Rows sorted by class into blocks of one size, so that what is computed for each class costs each row once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlsec_jax.base import Data


class Blocks(NamedTuple):
    """`N` blocks of `B` places; every block holds present rows of one class, and `N` is static whatever the labels.

    Attributes:
      rows: `[N, B]`, which row stands there; the number of rows where none does.
      label: `[N]`, each block's class.
      first: `[num_classes]`, the first block of a class.
      stop: `[num_classes]`, the first that is no longer of it.
    """

    rows: jax.Array
    label: jax.Array
    first: jax.Array
    stop: jax.Array

    def take(self, values: jax.Array) -> jax.Array:
        """`[n, ...]` to `[N, B, ...]`, zero where no row stands."""
        return jnp.take(values, self.rows, axis=0, mode="fill", fill_value=0)

    def back(self, values: jax.Array, num_rows: int) -> jax.Array:
        """`[N, B, ...]` to `[n, ...]`, zero for absent rows."""
        flat = values.reshape(-1, *values.shape[2:])
        return jnp.zeros((num_rows, *flat.shape[1:]), flat.dtype).at[self.rows.reshape(-1)].set(flat, mode="drop")

    def total(self, values: jax.Array) -> jax.Array:
        """The sums over each class of a number or array a block, `[N, ...]` to `[num_classes, ...]`."""
        return jax.ops.segment_sum(values, self.label, self.first.size)

    def sum_of(self, label: jax.Array, fn: Callable[[jax.Array], Any], like: Any) -> Any:
        """`Σ fn(block)` over the blocks of one class, `like` a pytree of zeros; forward only."""
        add = lambda block, total: jax.tree.map(jnp.add, total, fn(block))
        return jax.lax.fori_loop(self.first[label], self.stop[label], add, like)


def blocks(data: Data, num_classes: int, most: int = 512, content: jax.Array | None = None) -> Blocks:
    """The present rows of `data`, integer labels below `num_classes`, in blocks of at most `most`.

    The rows of a class keep their order; with `content`, floats `[n, d]` that say what they are, they get one of their
    own, whatever order they come in, so that sums over them are the same bits.
    """
    n = data.num_rows
    size = min(most, -(-n // (2 * num_classes)))
    number = n // size + num_classes
    group, order = ordered(data, num_classes, content)
    count = jnp.sum(group[None] == jnp.arange(num_classes, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    stop = jnp.cumsum(-(-count // size))
    first = stop - -(-count // size)
    own = jnp.minimum(group[order], num_classes - 1)
    place = size * first[own] + jnp.arange(n, dtype=jnp.int32) - (jnp.cumsum(count) - count)[own]
    place = jnp.where(group[order] < num_classes, place, number * size)
    rows = jnp.full(number * size, n, jnp.int32).at[place].set(order.astype(jnp.int32), mode="drop")
    label = jnp.searchsorted(stop, jnp.arange(number, dtype=stop.dtype), side="right")
    return Blocks(rows.reshape(number, size), jnp.minimum(label, num_classes - 1).astype(jnp.int32), first, stop)


def near_to_all(h: jax.Array, block: Blocks) -> jax.Array:
    """A row of the features `[d]`, by which all are shifted: it changes nothing but the rounding, which gets less.

    Where it isn't finite it is 0, so that a bad row costs its own class alone.
    """
    row = h[block.rows[0, 0]]
    return jnp.where(jnp.isfinite(row), row, 0)


def ordered(data: Data, num_classes: int, content: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Each row's class, `num_classes` if it is absent, and all rows by class and then as they come, or by `content`."""
    group = jnp.where(data.weight > 0, data.y, num_classes).astype(jnp.int32)
    return group, jnp.lexsort((*(() if content is None else digest(content, data.weight)), group))


def digest(content: jax.Array, weight: jax.Array, parts: int = 8) -> tuple[jax.Array, jax.Array]:
    """Two hashes of each row's bits and its weight's, `[n]` each: integer sums, the same wherever the row stands."""
    words = jax.lax.bitcast_convert_type(content, jnp.uint32).reshape(content.shape[0], -1)
    words = jnp.pad(words, ((0, 0), (0, -words.shape[1] % parts)))
    odd = jax.random.bits(jax.random.key(0), (1, words.shape[1] + 1), jnp.uint32) | 1
    mixed = lambda word, factor: (word ^ (word >> 16)) * factor
    width = words.shape[1] // parts  # added part by part, for a sum along a row takes XLA one number at a time
    each = [slice(k * width, (k + 1) * width) for k in range(parts)]
    folded = functools.reduce(jnp.add, [mixed(words[:, part], odd[:, part]) for part in each])
    own = mixed(jax.lax.bitcast_convert_type(weight.astype(jnp.float32), jnp.uint32), odd[0, -1])
    total = lambda values: jnp.sum(values, axis=1, dtype=jnp.uint32) + own
    return total(folded), total(mixed(folded, odd[:, :width]))


def no_derivative(by: str, values: Any) -> Any:
    """The values themselves; whoever differentiates through them is told that `by` has no derivative."""

    @jax.custom_jvp
    def identity(values: Any) -> Any:
        return values

    @identity.defjvp
    def _raise(primals: Any, tangents: Any) -> Any:
        raise TypeError(f"{by} is piecewise constant and has no derivative: pass it jax.lax.stop_gradient of the data "
                        "and the parameters, or optimise against a score that has one.")  # fmt: skip

    return identity(values)
