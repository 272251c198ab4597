"""Kernels of support vector machines: functions `(a [m, d], b [n, d]) -> [m, n]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks

Kernel = Callable[[jax.Array, jax.Array], jax.Array]


def linear() -> Kernel:
    """`K(a, b) = a·b`.

    >>> float(linear()(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]))[0, 0])
    11.0
    """
    return lambda a, b: a @ b.T


def polynomial(degree: int = 3, coef: Any = 1.0, gamma: Any = 1.0) -> Kernel:
    """`K(a, b) = (γ a·b + r)^degree`; scikit-learn's `coef0` is `coef`.

    >>> float(polynomial(2)(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]))[0, 0])
    144.0
    """
    checks.count("degree", degree, 1)

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        return (jnp.asarray(gamma, a.dtype) * (a @ b.T) + jnp.asarray(coef, a.dtype)) ** degree

    return kernel


def rbf(gamma: Any) -> Kernel:
    """`K(a, b) = exp(-γ ‖a - b‖²)`.

    >>> round(float(rbf(0.5)(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]]))[0, 0]), 4)
    0.1353
    """
    checks.above("gamma", gamma, 0)

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        square = jnp.sum(jnp.square(a), axis=1)[:, None] + jnp.sum(jnp.square(b), axis=1)[None, :] - 2 * (a @ b.T)
        return jnp.exp(-jnp.asarray(gamma, a.dtype) * square)

    return kernel
