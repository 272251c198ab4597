"""Numbers for people: how often a model errs, how well a score separates, how sure we are, what transfers."""

from mlsec_jax.measure._error import (
    AttackSuccess,
    accuracy,
    attack_success,
    confusion,
    error,
    error_on,
    per_class_error,
)
from mlsec_jax.measure._interval import Interval, clopper_pearson, mean_interval, wilson
from mlsec_jax.measure._paired import PairedTest, mcnemar, sign_test
from mlsec_jax.measure._roc import Roc, auc, roc, tpr_at_fpr
from mlsec_jax.measure._transfer import gradient_alignment, input_gradient_size, surrogate_variance

__all__ = [
    "AttackSuccess",
    "Interval",
    "PairedTest",
    "Roc",
    "accuracy",
    "attack_success",
    "auc",
    "clopper_pearson",
    "confusion",
    "error",
    "error_on",
    "gradient_alignment",
    "input_gradient_size",
    "mcnemar",
    "mean_interval",
    "per_class_error",
    "roc",
    "sign_test",
    "surrogate_variance",
    "tpr_at_fpr",
    "wilson",
]
