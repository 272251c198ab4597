"""Anti-backdoor learning: isolate the rows that are learned too fast, train on, unlearn them (Li et al., NeurIPS 2021)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, losses, tree
from mlsec_jax.base import Data, Info, Key, LossFn, Params, Trainer
from mlsec_jax.loop import GradFn


def flooding(level: Any = 0.5) -> GradFn:
    """Descends while the batch's mean loss is above the level, and ascends below it: `sign(L - γ) ∇L`.

    It is the gradient of the local gradient ascent loss `sign(L - γ) L`, and of flooding `|L - b| + b` with b = γ: ordinary
    rows stay at a loss of γ, while rows that are easier to learn than that fall below it.

    Args:
      level: γ, or b.

    Returns:
      A `grad_fn` for the SGD loop.

    References: Li et al., NeurIPS 2021, eq. (3); Ishida et al., ICML 2020, eq. (2).
    """
    checks.at_least("level", level, 0)
    return _signed(lambda loss: jnp.sign(loss - jnp.asarray(level, loss.dtype)), None)


def unlearning(*, until: Any, clip_norm: Any = 1.0) -> GradFn:
    """Ascends the batch's mean loss until it is `until`, by gradients of at most `clip_norm`: `-[L < L_max] clip(∇L)`.

    Args:
      until: L_max, where it stops; log of the number of classes is chance.
      clip_norm: the longest gradient; infinite for none.

    Returns:
      A `grad_fn` for the SGD loop; with momentum an optimizer would drift on after the stop.

    References: Li et al., NeurIPS 2021, eq. (4). Deviates from the paper in: the stop and the clip, without which ascent
    diverges.
    """
    checks.at_least("until", until, 0)
    checks.above("clip_norm", clip_norm, 0)
    return _signed(lambda loss: -(loss < jnp.asarray(until, loss.dtype)).astype(loss.dtype), clip_norm)


def _signed(factor_fn: Any, clip_norm: Any) -> GradFn:
    """`factor_fn(loss)` times the gradient of the mean loss, which is cut to a length; the factor is a constant."""

    def grad_fn(key: Key, loss_fn: LossFn, params: Params, batch: Data) -> Params:
        loss, gradient = jax.value_and_grad(losses.empirical(loss_fn))(params, batch, key)
        factor = jax.lax.stop_gradient(factor_fn(loss))
        if clip_norm is not None:
            shorter = tree.clip_factor(gradient, clip_norm)
            factor = factor.astype(shorter.dtype) * shorter
        wide = lambda g: np.promote_types(g.dtype, factor.dtype)
        return jax.tree.map(lambda g: (factor.astype(wide(g)) * g.astype(wide(g))).astype(g.dtype), gradient)

    return grad_fn


def abl(loss_fn: LossFn, *, isolate: Any, refine: Any, unlearn: Any, num_isolated: int, chunk: int = 256) -> Trainer:
    """Trains with poisons in the data, finds them by their loss, and makes the model forget them.

    1. `isolate` trains on all rows, for a few epochs and with gradients that keep ordinary rows from being learned
       (`flooding`); 2. the `num_isolated` present rows of lowest loss are set apart, and `refine` trains on the others;
    3. `unlearn` ascends the loss of those set apart (`unlearning`).

    Threat: changes - the training; sees - the training data; budget - `num_isolated` rows; assumes - poisons are learned faster
    than other rows, and are enough to unlearn.

    Args:
      loss_fn: per-example loss, by which rows are set apart.
      isolate: a trainer, e.g. `bilevel.unrolled(…, grad_fn=flooding(0.5))`; 10 to 20 epochs in the paper.
      refine: a trainer, which starts where `isolate` ended; 60 epochs in the paper. Rows set apart have weight 0 for it.
      unlearn: a trainer on the rows set apart alone, `[num_isolated]` of them: `bilevel.unrolled(…,
        grad_fn=unlearning(until=…))`.
      num_isolated: static; 1 % of the rows in the paper. Where fewer rows are present, all of them are set apart.
      chunk: rows whose loss is taken at once.

    Returns:
      A `Trainer`; info: `isolated [n]` (bool), `score [n]` (minus the loss after step 1: higher is more suspicious; -inf for
      absent rows), `isolate`, `refine`, `unlearn` (the trainers' own). Its derivative is of the trainings; the choice of rows
      is discrete and counts as constant, as that of a hard filter does.

    References: Li et al., "Anti-Backdoor Learning", NeurIPS 2021, section 3.
    """
    checks.count("num_isolated", num_isolated, 1)
    checks.count("chunk", chunk, 1)

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        if num_isolated > data.num_rows:
            raise ValueError(f"num_isolated: expected at most the {data.num_rows} rows of the data, got {num_isolated}.")
        isolate_key, refine_key, unlearn_key = jax.random.split(key, 3)
        params, isolate_info = isolate(isolate_key, params, data)
        one = lambda row: loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row))[0]
        loss = jax.lax.map(one, losses.present(data), batch_size=min(chunk, data.num_rows))
        score = jnp.where(data.weight > 0, -loss, -jnp.inf)
        lowest = jnp.argsort(-score, stable=True)[:num_isolated]
        isolated = jnp.zeros(data.num_rows, bool).at[lowest].set(data.weight[lowest] > 0)
        left = data._replace(weight=jnp.where(isolated, 0, data.weight))
        params, refine_info = refine(refine_key, params, left)
        params, unlearn_info = unlearn(unlearn_key, params, tree.take(data, lowest))
        stages = {"isolate": isolate_info, "refine": refine_info, "unlearn": unlearn_info}
        return params, {"isolated": isolated, "score": score, **stages}

    return Trainer(fit)
