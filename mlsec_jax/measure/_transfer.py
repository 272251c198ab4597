"""Why an attack crafted on one model works on another: the three measures of Demontis et al. 2019."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import base, checks


def input_gradient_size(loss_fn: base.LossFn, params: base.Params, data: base.Data, norm: float = 2) -> jax.Array:
    """How strongly a model's loss reacts to its inputs: S = E ‖∇_x ℓ(x, y; params)‖_q.

    Models of low complexity (strongly regularised ones) have small S and are harder to attack.

    Args:
      loss_fn: `(params, data) -> [n]`; a row's loss may read that row only (no batch statistics).
      params: the model's.
      data: `[n, ...]` rows, averaged by weight; those of weight 0 are not read.
      norm: q, 1, 2 or infinity: the dual of the norm that bounds the attacker. Over all leaves of x together.

    Returns:
      A scalar.

    Reference: Demontis et al., USENIX Security 2019, "size of input gradients".

    >>> rows = base.dataset(jnp.ones((2, 2)), jnp.zeros(2))
    >>> float(input_gradient_size(lambda params, data: data.x @ params, jnp.array([3.0, 4.0]), rows))
    5.0
    """
    checks.one_of("norm", norm, (1, 2, jnp.inf))
    data = _without_absent(data)
    gradient = jax.grad(lambda x: jnp.sum(loss_fn(params, data._replace(x=x))))(data.x)
    sizes = jnp.linalg.norm(_rows(gradient), norm, axis=1)
    return _mean(sizes, data.weight)


def gradient_alignment(first: Any, second: Any, weight: jax.Array | None = None) -> jax.Array:
    """How alike two models' gradients point: R = E cos(∇_surrogate, ∇_target), row by row.

    The gradients are those the attacker follows: of the loss by the input for evasion, of the outer loss by the
    poison (`jax.grad` through a trainer) for poisoning.

    Args:
      first: the surrogate's gradients, a pytree of `[n, ...]`.
      second: the target's, of the same structure.
      weight: `[n]`, or None for ones.

    Returns:
      A scalar in [-1, 1]. A row whose gradient is zero in either has no direction: it counts as 0.

    Reference: Demontis et al., USENIX Security 2019, "gradient alignment".

    >>> float(gradient_alignment(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[2.0, 0.0], [3.0, 0.0]])))
    0.5
    """
    a, b = _rows(first), _rows(second)
    if a.shape != b.shape:
        raise ValueError(f"first and second: expected the same shape, got {a.shape} and {b.shape} after flattening.")
    weight = jnp.ones_like(a[:, 0]) if weight is None else jnp.asarray(weight)
    return _mean(jnp.sum(_unit(a) * _unit(b), axis=1), weight)


def surrogate_variance(loss_fn: base.LossFn, stacked_params: base.Params, data: base.Data) -> jax.Array:
    """How much a surrogate's loss landscape depends on the data it was trained on: V = E_D[ℓ²] - E_D[ℓ]².

    The expectation is over the surrogates; V is then averaged over the points. Surrogates of low variance transfer
    better.

    Args:
      loss_fn: `(params, data) -> [n]`.
      stacked_params: the same model trained on `m` draws of the training set, leaves `[m, ...]`.
      data: the points at which the surrogates are compared (the attack's points), averaged by weight.

    Returns:
      A scalar, at least 0 (computed as the mean squared deviation, which does not cancel).

    Reference: Demontis et al., USENIX Security 2019, "variability of the loss landscape".

    >>> rows = base.dataset(jnp.ones((2, 1)), jnp.zeros(2))
    >>> float(surrogate_variance(lambda params, data: data.x[:, 0] * params, jnp.array([1.0, 3.0]), rows))
    1.0
    """
    data = _without_absent(data)
    losses = jax.lax.map(lambda params: loss_fn(params, data), stacked_params)
    return _mean(jnp.var(losses, axis=0), data.weight)


def _without_absent(data: base.Data) -> base.Data:
    """The data with zeros for the inputs of weight-0 rows, so that a NaN there cannot leak."""

    def clear(leaf: jax.Array) -> jax.Array:
        present = (data.weight > 0).reshape(data.weight.shape + (1,) * (leaf.ndim - 1))
        return jnp.where(present, leaf, jnp.zeros_like(leaf))

    return data._replace(x=jax.tree.map(clear, data.x))


def _rows(tree: Any) -> jax.Array:
    """All leaves `[n, ...]` side by side as one matrix `[n, d]`."""
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tree)], axis=1)


def _unit(rows: jax.Array) -> jax.Array:
    """Each row over its length; zero rows stay zero. Scaled by its largest entry first, so that nothing underflows."""
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    scaled = jnp.where(largest > 0, rows / jnp.where(largest > 0, largest, jnp.ones_like(largest)), rows)
    length = jnp.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled / jnp.where(largest > 0, length, jnp.ones_like(length))


def _mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """The weighted mean; the values of weight-0 rows are not read."""
    return jnp.where(weight > 0, weight * values, jnp.zeros_like(values)).sum() / weight.sum()
