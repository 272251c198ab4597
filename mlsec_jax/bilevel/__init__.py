"""Differentiable trainers: how the victim learns, and how JAX differentiates through it."""

from mlsec_jax.bilevel._implicit import (
    cg,
    cholesky,
    gmres,
    implicit,
    lbfgs,
    lu,
    neumann,
    newton,
    normal_cg,
    nystrom,
    proximal_gradient,
)
from mlsec_jax.bilevel._unrolled import truncated, unrolled

__all__ = [
    "cg",
    "cholesky",
    "gmres",
    "implicit",
    "lbfgs",
    "lu",
    "neumann",
    "newton",
    "normal_cg",
    "nystrom",
    "proximal_gradient",
    "truncated",
    "unrolled",
]
