"""STRIP: a trigger decides whatever is laid over it, so predictions on overlaid rows have little entropy (Gao et al. 2019)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, loop, losses, tree
from mlsec_jax.base import ApplyFn, Data, Key, Known, Params, Scorer


def strip(
    apply_fn: ApplyFn, *, num_overlays: int = 100, mix: tuple[Any, Any] = (1.0, 1.0), over: str = "map"
) -> Scorer:
    """Minus the mean entropy of the predictions on a row with clean rows laid over it, in bits.

    `score(x) = (1/N) Σ_n Σ_c p_c log2 p_c`, `p = softmax(f(a x + b o_n))`, `o_n` drawn without replacement from the present
    rows of `known.clean`. Inputs of a model with a backdoor that carry its trigger are predicted alike under all of them,
    and score near 0. A threshold for a rate of false alarms: `gaussian_threshold` of the scores of clean rows.

    Differentiable in the inputs and the parameters.

    Args:
      apply_fn: `(params, x, key=None) -> logits [n, c]`.
      num_overlays: N, static, at most the present rows of `known.clean`; 100 in the authors' code.
      mix: (a, b); (1, 1) as in the authors' code, whose sums leave the box of the inputs, (½, ½) to stay in it.
      over: `"map"`, one overlay after another, or `"vmap"`, all at once.

    Returns:
      A `Scorer` in `[-log2 c, 0]`; rows of weight 0 score `-log2 c`.

    References: Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019, eq. (2) to (4).
      Deviates from the paper in: all rows get the same N overlays.
    """
    checks.count("num_overlays", num_overlays, 1)
    checks.one_of("over", over, ("map", "vmap"))

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        clean = known.require("clean", by="scores.strip")
        there = checks.num_present(clean)
        if num_overlays > there:
            raise ValueError(f"num_overlays: expected at most the {there} rows of known.clean, got {num_overlays}.")
        checks.finite("known.clean.x", clean.x, clean.weight)
        checks.finite("data.x", data.x, data.weight)
        rows = jnp.argsort(loop.lots(key, clean.weight))[:num_overlays]
        overlays = tree.take(losses.present(clean).x, rows)
        a, b = (jnp.asarray(v) for v in mix)
        lay = lambda x, o: a.astype(x.dtype) * x + b.astype(x.dtype) * o[None]
        x = losses.present(data).x

        def entropy(overlay: Any) -> jax.Array:
            log_p = jax.nn.log_softmax(apply_fn(params, jax.tree.map(lay, x, overlay)))
            return -jnp.sum(jnp.exp(log_p) * log_p, axis=1) / jnp.log(jnp.asarray(2, log_p.dtype))

        each = tree.each(entropy, overlays, over=over)
        real = (jnp.asarray(clean.weight)[rows] > 0).astype(each.dtype)
        score = -real @ each / jnp.maximum(jnp.sum(real), 1)
        logits = jax.eval_shape(apply_fn, params, x)
        return jnp.where(data.weight > 0, score, -jnp.log2(jnp.asarray(logits.shape[1], score.dtype)))

    return score


def gaussian_threshold(scores: jax.Array, *, false_alarms: Any, weight: Any = None) -> jax.Array:
    """The level that a share of clean scores exceeds, were they Gaussian: `μ + σ Φ⁻¹(1 - false_alarms)`.

    Args:
      scores: `[n]`, of clean rows.
      false_alarms: in (0, 1); 0.01 in STRIP's code.
      weight: `[n]`; None: all rows count.

    >>> gaussian_threshold(jnp.array([-1.0, 1.0]), false_alarms=0.5).tolist()
    0.0
    """
    checks.between("false_alarms", false_alarms, 0.0, 1.0)
    weight = jnp.ones_like(scores) if weight is None else weight
    mean = losses.weighted_mean(scores, weight)
    deviation = jnp.sqrt(losses.weighted_mean(jnp.square(scores - mean), weight))
    return mean + deviation * jax.scipy.special.ndtri(1 - jnp.asarray(false_alarms, scores.dtype))
