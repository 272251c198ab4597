"""Distances to class centroids: the sphere and slab defenses (Steinhardt, Koh & Liang 2017), as scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, linalg, losses
from mlsec_jax.base import Data, Key, Known, Params, Scorer


def centroids(data: Data) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted mean of each of two classes.

    Args:
      data: inputs of any shape a row; labels {0, 1} or {-1, +1}.

    Returns:
      `(rows [n, d], means [2, d], member [2, n])`: flattened inputs, the means of the negative and the positive class,
      and each row's weight in either.
    """
    checks.binary("data.y", data.y, data.weight)
    checks.finite("data.x", data.x, data.weight)
    x = losses.present(data).x
    rows = x.reshape(x.shape[0], -1)
    weight = data.weight.astype(rows.dtype)
    member = jnp.where(jnp.stack([data.y <= 0, data.y > 0]), weight[None, :], 0)
    total = jnp.sum(member, axis=1, keepdims=True)
    return rows, member @ rows / jnp.where(total > 0, total, 1), member


def axis_of(means: jax.Array) -> jax.Array:
    """The unit vector from the negative to the positive centroid."""
    axis = means[1] - means[0]
    return axis * linalg.inverse_root(jnp.vdot(axis, axis))


def sphere() -> Scorer:
    """The distance to the centroid of the row's own class, of two, `‖x - μ_y‖`.

    Threat: changes - nothing; sees - the training rows; budget - none; assumes - poisons lie far out in their class.

    Returns:
      A `Scorer` of two classes, labelled {0, 1} or {-1, +1}, in the inputs' own units; other labels raise.

    References: Steinhardt, Koh & Liang, "Certified Defenses for Data Poisoning Attacks", NeurIPS 2017, section 2.1.
    """

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        del key, params, known
        rows, means, _ = centroids(data)
        square = jnp.sum(jnp.square(rows - means[(data.y > 0).astype(jnp.int32)]), axis=1)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

    return score


def slab() -> Scorer:
    """The distance to the class centroid along the line between centroids, `|(x - μ_y)ᵀ(μ_+ - μ_-)| / ‖μ_+ - μ_-‖`.

    Threat: changes - nothing; sees - the training rows; budget - none; assumes - poisons lie far out along that line.

    Returns:
      A `Scorer` of two classes, labelled {0, 1} or {-1, +1}, in the inputs' own units; other labels raise.

    References: Steinhardt, Koh & Liang, "Certified Defenses for Data Poisoning Attacks", NeurIPS 2017, section 2.1.
    """

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        del key, params, known
        rows, means, _ = centroids(data)
        return jnp.abs((rows - means[(data.y > 0).astype(jnp.int32)]) @ axis_of(means))

    return score


def class_quantile(value: jax.Array, member: jax.Array, level: jax.Array) -> jax.Array:
    """The weighted quantile of values in each class: the least v with `w({value ≤ v}) ≥ level · w(class)`.

    Args:
      value: `[n]`.
      member: `[c, n]`, each row's weight in each class; a class without rows gives 0.
      level: in [0, 1].

    Returns:
      `[c]`.

    >>> class_quantile(jnp.array([3.0, 1.0, 2.0]), jnp.ones((1, 3)), 0.5).tolist()
    [2.0]
    """

    def each(weight: jax.Array) -> jax.Array:
        order = jnp.argsort(jnp.where(weight > 0, value, jnp.inf))
        reached = jnp.cumsum(weight[order]) >= jnp.asarray(level, value.dtype) * jnp.sum(weight) * (1 - 1e-6)
        reached &= weight[order] > 0
        return jnp.where(jnp.sum(weight) > 0, value[order[jnp.argmax(reached)]], 0)

    return jax.vmap(each)(member)


def within_class(scorer: Scorer, *, fraction: Any) -> Scorer:
    """A score in units of its own class's cut: above 1 for the `fraction` of each label that looks most suspicious.

    `s_i / quantile_{1 - fraction}(s_j : y_j = y_i)` for non-negative scores. `filter_top` of it with the same fraction
    is the published sphere or slab defense, whose radius is a percentile of each class.

    Args:
      scorer: a non-negative score.
      fraction: what share of each class shall score above 1.
    """
    checks.between("fraction", fraction, 0.0, 1.0)

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        value = scorer(key, params, data, known)
        _, _, member = centroids(data)
        cut = class_quantile(value, member.astype(value.dtype), 1 - jnp.asarray(fraction, value.dtype))
        cut = cut[(data.y > 0).astype(jnp.int32)]
        return value / jnp.where(cut > 0, cut, 1)

    return score
