"""Differentiable trainers: how the victim learns, and how JAX differentiates through it."""

from mlsec_jax.bilevel._back_gradient import back_gradient
from mlsec_jax.bilevel._diagnose import diagnose
from mlsec_jax.bilevel._dp_sgd import dp_gradient
from mlsec_jax.bilevel._forward import forward
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
    "back_gradient",
    "cg",
    "cholesky",
    "diagnose",
    "dp_gradient",
    "forward",
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
