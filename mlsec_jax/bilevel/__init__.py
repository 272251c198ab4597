"""Differentiable trainers: how the victim learns, and how JAX differentiates through it."""

from mlsec_jax.bilevel._back_gradient import back_gradient
from mlsec_jax.bilevel._diagnose import diagnose
from mlsec_jax.bilevel._dp_sgd import dp_gradient
from mlsec_jax.bilevel._forward import forward
from mlsec_jax.bilevel._glm import glm, glm_apply, gram
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
    "back_gradient",
    "cg",
    "cholesky",
    "diagnose",
    "dp_gradient",
    "forward",
    "glm",
    "glm_apply",
    "gmres",
    "gram",
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
