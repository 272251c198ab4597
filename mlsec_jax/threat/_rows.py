"""Threats on chosen rows: fill reserved ones, or perturb existing ones within a budget."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, linalg, tree
from mlsec_jax.base import Data, Key, Threat


def reserve(data: Data, start: Data) -> Data:
    """Appends rows of weight 0 for poisons to fill: their inputs are starting points, their labels the poisons' labels.

    Args:
      data: the clean training set, n rows.
      start: k rows `(x, y)` of the same structure and shapes; their weights are ignored.

    Returns:
      `Data` of n + k rows; the last k are absent until a threat embeds them.
    """
    expected, got = (jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], (rows.x, rows.y)) for rows in (data, start))
    if expected != got:
        raise ValueError(f"start: expected rows like data's, (x, y) of shapes {expected}, got {got}.")
    for a, b in zip(*(jax.tree.leaves((rows.x, rows.y)) for rows in (data, start)), strict=True):
        if not tree.is_float(a) and checks.is_concrete(b) and np.any(np.asarray(b) != np.asarray(b).astype(a.dtype)):
            raise ValueError(f"start: expected numbers that {a.dtype} can hold, as the data's are, got {b.dtype}.")
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), data, start)
    return joined._replace(weight=joined.weight.at[data.num_rows :].set(0))


def append_rows(rows: Any, *, lo: Any = 0.0, hi: Any = 1.0) -> Threat:
    """The attacker fills reserved rows with inputs of its own; labels are those that were reserved.

    `embed`: `x[rows] = poison`, `weight[rows] = 1`. `project`: `clip(poison, lo, hi)`.

    Threat: changes - the inputs of `rows`, which it adds to the training set; sees - nothing; budget - `len(rows)`
    points in the box `[lo, hi]`; assumes - its labels are accepted.

    Args:
      rows: `[k]` reserved rows, or an integer k for the last k rows. k = 0 is the empty attack.
      lo: least value, scalar or broadcastable to `[k, ...]`.
      hi: greatest value.

    Returns:
      A `Threat` whose poison is `[k, ...]`.
    """
    rows = checks.rows("rows", rows)
    checks.box(lo, hi)

    def where(data: Data) -> Any:
        checks.rows_within("rows", rows, data.num_rows)
        checks.reserved("rows", rows, data.weight)
        return jnp.asarray(rows)

    def init(key: Key, data: Data) -> Any:
        del key
        return tree.take(data.x, where(data))

    def project(poison: Any, data: Data) -> Any:
        del data
        return jax.tree.map(lambda p: jnp.clip(p, jnp.asarray(lo, p.dtype), jnp.asarray(hi, p.dtype)), poison)

    def embed(poison: Any, data: Data) -> Data:
        chosen = where(data)
        return data._replace(x=tree.put(data.x, chosen, poison), weight=jnp.asarray(data.weight).at[chosen].set(1))

    return Threat(init, project, embed, rows)


def perturb_rows(
    rows: Any, *, radius: Any = jnp.inf, norm: str = "linf", lo: Any = 0.0, hi: Any = 1.0, noise: Any = 0.0
) -> Threat:
    """The attacker changes the inputs of existing rows a little; labels stay.

    `embed`: `x[rows] = poison`. `project`, with b the clean rows: for `linf`,
    `clip(poison, max(lo, b - r), min(hi, b + r))`; for `l2`, the ball around b, then the box. The box reaches to b where b
    is outside of it. An infinite radius leaves the box alone. A zero radius gives the input back bit for bit.

    Threat: changes - the inputs of `rows`; sees - nothing; budget - `radius` in the data's own units; assumes - it may
    write to rows whose labels it does not control.

    Args:
      rows: `[k]` rows, or an integer k for the last k.
      radius: non-negative, scalar or broadcastable to `[k, ...]`; infinite for the box alone.
      norm: `"linf"` or `"l2"`.
      lo: least value.
      hi: greatest value.
      noise: standard deviation of the Gaussian noise that `init` starts from (before `project`), for restarts.

    Returns:
      A `Threat` whose poison is `[k, ...]`, the perturbed inputs themselves.
    """
    rows = checks.rows("rows", rows)
    checks.at_least("radius", radius, 0)
    checks.at_least("noise", noise, 0)
    checks.one_of("norm", norm, ("linf", "l2"))
    checks.box(lo, hi)

    def init(key: Key, data: Data) -> Any:
        checks.rows_within("rows", rows, data.num_rows)
        chosen = tree.take(data.x, jnp.asarray(rows))
        if isinstance(noise, (int, float)) and noise == 0:
            return chosen
        leaves, structure = jax.tree.flatten(chosen)
        keys = jax.random.split(key, len(leaves))
        draw = lambda k, leaf: leaf + jnp.asarray(noise, leaf.dtype) * jax.random.normal(k, leaf.shape, leaf.dtype)
        return jax.tree.unflatten(structure, [draw(k, leaf) for k, leaf in zip(keys, leaves, strict=True)])

    def project(poison: Any, data: Data) -> Any:
        clean = tree.take(data.x, jnp.asarray(rows))
        if norm == "l2":
            apart = jax.tree.map(jnp.subtract, poison, clean)
            inside = linalg.project_ball(apart, radius)
            stay = lambda p, base, d, i: jnp.where(i == d, p, base + i)
            poison = jax.tree.map(stay, poison, clean, apart, inside)

        def each(p: jax.Array, base: jax.Array) -> jax.Array:
            low, high, r = (jnp.asarray(v, p.dtype) for v in (lo, hi, radius))
            low, high = jnp.minimum(low, base), jnp.maximum(high, base)
            if norm == "linf":
                low, high = jnp.maximum(low, base - r), jnp.minimum(high, base + r)
            return jnp.clip(p, low, high)

        return jax.tree.map(each, poison, clean)

    def embed(poison: Any, data: Data) -> Data:
        return data._replace(x=tree.put(data.x, jnp.asarray(rows), poison))

    return Threat(init, project, embed, rows)
