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
from mlsec_jax.bilevel._kernels import Kernel, linear, polynomial, rbf
from mlsec_jax.bilevel._kkt_svm import SVMParams, kkt_svm, svm_apply
from mlsec_jax.bilevel._unrolled import truncated, unrolled

__all__ = [
    "Kernel",
    "SVMParams",
    "cg",
    "cholesky",
    "gmres",
    "implicit",
    "kkt_svm",
    "lbfgs",
    "linear",
    "lu",
    "neumann",
    "newton",
    "normal_cg",
    "nystrom",
    "polynomial",
    "proximal_gradient",
    "rbf",
    "svm_apply",
    "truncated",
    "unrolled",
]
