"""Neural Cleanse (Wang et al., IEEE S&P 2019): a backdoored label is reached by an unusually small trigger."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlsec_jax.base import Data
from mlsec_jax.defenses._invert_trigger import Inversion, ModelFn, attack_loss
from mlsec_jax.threat import Overlay


def neural_cleanse() -> Inversion:
    """The objective `E_x CE(f(A(x)), t) + c ‖m‖₁`, for `invert_trigger`; it judges by `‖m‖₁`.

    The mask is one for all channels. A model is suspicious when a label's size is an outlier below the others:
    `measure.anomaly_index(record.metric)`.

    Returns:
      An `Inversion`.

    References: Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P
      2019, eq. (3).
    """

    def loss_fn(model_fn: ModelFn, overlay: Overlay, batch: Data, label: jax.Array) -> tuple:
        logits = model_fn(overlay(None, batch.x))
        return attack_loss(logits, label), jnp.sum(overlay.mask), logits

    def metric_fn(model_fn: ModelFn, overlay: Overlay, clean: Data, label: jax.Array) -> jax.Array:
        del model_fn, clean, label
        return jnp.sum(overlay.mask)

    return Inversion(loss_fn, metric_fn)
