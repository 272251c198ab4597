"""Deep k-NN: the neighbours' vote against a row's label, in feature space (Peri et al. 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses
from mlsec_jax.base import ApplyFn, Data, Key, Known, Params, Scorer
from mlsec_jax.scores._by_class import no_derivative


def deep_knn(features_fn: ApplyFn, *, num_neighbours: int, num_classes: int, block_size: int = 256) -> Scorer:
    """By how much the commonest other label among a row's nearest neighbours outvotes its own, as a share of them.

    `score_i = (max_{c ≠ y_i} v_c - v_{y_i}) / k`, `v_c` the number of rows of label c among the k present rows nearest to
    row i in features of unit length, itself excluded. The published defense removes the rows whose label is not the
    plurality's: `combine.filter_above(deep_knn(…), threshold=0.0)`.

    All pairs are looked at, `block_size` rows at a time: O(n² d) time, O(block_size · n) memory. Of equally near rows the
    earlier counts; features that are all zero stay so, at distance 1 from the others; a row weighs 1 or, absent, 0. Votes
    have no derivative: to differentiate raises.

    Args:
      features_fn: `(params, x, key=None) -> [n, ...]`, flattened.
      num_neighbours: k, static, below the number of present rows; the paper finds once to twice the size of a class best.
      num_classes: static; labels are integers below it.
      block_size: static.

    Returns:
      A `Scorer` in [-1, 1]; rows of weight 0 score -1. Under `jit`, which doesn't see how many rows are present, k is cut
      to their number.

    References: Peri et al., "Deep k-NN Defense against Clean-label Data Poisoning Attacks", ECCV Workshops 2020, section 3.
      Deviates from the authors' code in: unit features, as in the paper; a row isn't its own neighbour.
    """
    checks.count("num_neighbours", num_neighbours, 1)
    checks.count("num_classes", num_classes, 1)
    checks.count("block_size", block_size, 1)

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        del key, known
        checks.integer_labels("data.y", data.y)
        checks.labels("data.y", data.y, data.weight, num_classes)
        present = checks.num_present(data)
        if num_neighbours >= present:
            raise ValueError(f"num_neighbours: expected less than the {present} present rows, got {num_neighbours}.")
        h = no_derivative("scores.deep_knn", features_fn(params, losses.present(data).x))
        h = h.reshape(h.shape[0], -1)
        checks.finite("features_fn", h, data.weight)
        square = jnp.sum(jnp.square(h), axis=1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
        dead = jnp.where(square[:, 0] > 0, 0, 0.5).astype(h.dtype)  # inner products rank rows of unit length; others are 0
        there = data.weight > 0
        rows = jnp.arange(data.num_rows, dtype=jnp.int32)

        def each(row: jax.Array) -> jax.Array:
            near = jnp.where(there & (rows != row), h @ h[row] + dead, -jnp.inf)
            value, neighbour = jax.lax.top_k(near, num_neighbours)
            real = jnp.isfinite(value)
            votes = jnp.zeros(num_classes, h.dtype).at[jnp.where(real, data.y[neighbour], num_classes)].add(1, mode="drop")
            own = jnp.arange(num_classes, dtype=data.y.dtype) == data.y[row]
            against = jnp.max(jnp.where(own, 0, votes)) - jnp.sum(jnp.where(own, votes, 0))
            return against / jnp.maximum(jnp.sum(real), 1).astype(h.dtype)

        value = jax.lax.map(each, rows, batch_size=min(block_size, data.num_rows))
        return jnp.where(there, value, -1)

    return score
