"""Threats on labels and weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, linalg, tree
from mlsec_jax.base import Data, Key, Threat


def flip_labels(rows: Any, *, budget: Any) -> Threat:
    """The attacker moves label mass on chosen rows: the convex relaxation of flipping at most `budget` labels.

    `embed`: `y[rows] = poison`. `project`: each row onto the simplex, then, if the mass moved
    `Σ_i ½ ‖q_i - y_i‖₁` exceeds the budget, all rows shrink towards their clean labels by the same factor, which keeps
    them on the simplex (a feasible point on the segment to the clean labels, not the nearest one).

    Threat: changes - labels of `rows`; sees - nothing; budget - `budget` labels; assumes - soft labels are trained on
    (a hard flip is a corner of the set).

    Args:
      rows: `[k]` rows, or an integer k for the last k.
      budget: how many labels' worth of mass may move, at least 0.

    Returns:
      A `Threat` whose poison is `[k, c]`. The data must carry soft labels (`losses.soft_labels`).
    """
    rows = checks.rows("rows", rows)
    checks.at_least("budget", budget, 0)

    def labels(data: Data) -> jax.Array:
        if data.y.ndim != 2:
            raise ValueError(
                f"data.y: flip_labels needs soft labels [n, c] (losses.soft_labels), got shape {data.y.shape}."
            )
        checks.rows_within("rows", rows, data.num_rows)
        return data.y[jnp.asarray(rows)]

    def init(key: Key, data: Data) -> jax.Array:
        del key
        return labels(data)

    def project(poison: jax.Array, data: Data) -> jax.Array:
        clean = labels(data)
        q = jnp.where(jnp.all(poison == clean, axis=-1, keepdims=True), clean, linalg.project_simplex(poison))
        moved = jnp.sum(jnp.abs(q - clean)) / 2
        limit = jnp.asarray(budget, q.dtype)
        scale = limit / jnp.where(moved > limit, moved, 1)
        return jnp.where(moved > limit, clean + scale * (q - clean), q)

    def embed(poison: jax.Array, data: Data) -> Data:
        return data._replace(y=tree.put(data.y, jnp.asarray(rows), poison))

    return Threat(init, project, embed, rows)


def reweigh(rows: Any, *, radius: Any) -> Threat:
    """The attacker changes the weights of chosen rows (data ordering, duplication, deletion in the limit).

    `embed`: `weight[rows] = poison`. `project`: `clip(poison, max(0, w - r), w + r)`.

    Threat: changes - weights of `rows`; sees - nothing; budget - `radius` a row; assumes - it controls sampling.

    Args:
      rows: `[k]` rows, or an integer k for the last k.
      radius: non-negative.

    Returns:
      A `Threat` whose poison is `[k]`.
    """
    rows = checks.rows("rows", rows)
    checks.at_least("radius", radius, 0)

    def init(key: Key, data: Data) -> jax.Array:
        del key
        checks.rows_within("rows", rows, data.num_rows)
        return data.weight[jnp.asarray(rows)]

    def project(poison: jax.Array, data: Data) -> jax.Array:
        base = data.weight[jnp.asarray(rows)]
        r = jnp.asarray(radius, base.dtype)
        return jnp.clip(poison, jnp.maximum(base - r, 0), base + r)

    def embed(poison: jax.Array, data: Data) -> Data:
        return data._replace(weight=tree.put(data.weight, jnp.asarray(rows), poison))

    return Threat(init, project, embed, rows)
