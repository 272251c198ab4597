"""Victims' presets of the differentiable trainers."""

from mlsec_jax.train._presets import (
    elastic_net,
    fine_tuned_head,
    head_only,
    lasso,
    logistic_regression,
    ridge,
    scratch,
)

__all__ = ["elastic_net", "fine_tuned_head", "head_only", "lasso", "logistic_regression", "ridge", "scratch"]
