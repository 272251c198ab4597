"""Numbers for people: how often a model errs, how well a score separates, how sure we are, what transfers."""

from mlsec_jax.measure._anomaly import anomaly_index, calibrate_threshold
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
from mlsec_jax.measure._learning_curve import (
    Deviation,
    LearningCurve,
    LearningSlope,
    backdoor_learning_curve,
    learning_slope,
    parameter_deviation,
)
from mlsec_jax.measure._paired import PairedTest, mcnemar, sign_test
from mlsec_jax.measure._roc import Roc, auc, roc, tpr_at_fpr
from mlsec_jax.measure._transfer import gradient_alignment, input_gradient_size, surrogate_variance

__all__ = [
    "AttackSuccess",
    "Deviation",
    "Interval",
    "LearningCurve",
    "LearningSlope",
    "PairedTest",
    "Roc",
    "accuracy",
    "anomaly_index",
    "attack_success",
    "auc",
    "backdoor_learning_curve",
    "calibrate_threshold",
    "clopper_pearson",
    "confusion",
    "error",
    "error_on",
    "gradient_alignment",
    "input_gradient_size",
    "learning_slope",
    "mcnemar",
    "mean_interval",
    "parameter_deviation",
    "per_class_error",
    "roc",
    "sign_test",
    "surrogate_variance",
    "tpr_at_fpr",
    "wilson",
]
