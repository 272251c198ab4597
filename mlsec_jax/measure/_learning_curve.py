"""Backdoor learning curves: how fast a model learns poisoned rows as their weight grows from nothing (Cinà et al.)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlsec_jax import checks
from mlsec_jax.base import Data, Info, Key, Params


class LearningCurve(NamedTuple):
    """What became of the model at each weight of the poison.

    Attributes:
      beta: `[b]`.
      losses: what `losses_fn` gave, its leaves `[b, ...]`.
      params: the trained parameters, leaves `[b, ...]`.
    """

    beta: jax.Array
    losses: Any
    params: Params


class LearningSlope(NamedTuple):
    """How the losses begin to move.

    Attributes:
      slope: `dL/dβ` at β = 0, of the structure of `losses_fn`'s answer.
      theta: `θ = -2/π arctan(slope)` in [-1, 1], of the same structure: near 1 where a loss falls at once, 0 where it
        stands still.
    """

    slope: Any
    theta: Any


class Deviation(NamedTuple):
    """How far parameters have gone.

    Attributes:
      norm: `ρ = ‖w(β)‖`, `[b]`.
      angle: `ν = ½ (1 - cos(w(β_0), w(β)))` in [0, 1], `[b]`: ½ is a right angle.
    """

    norm: jax.Array
    angle: jax.Array


def _weighted(data: Data, poisoned: jax.Array, beta: Any) -> Data:
    return data._replace(weight=jnp.where(poisoned, jnp.asarray(beta, data.weight.dtype) * data.weight, data.weight))


def backdoor_learning_curve(
    key: Key,
    trainer: Any,
    params: Params,
    data: Data,
    poisoned: jax.Array,
    losses_fn: Callable[[Params], Any],
    *,
    betas: Any,
    warm_start: bool = True,
) -> tuple[LearningCurve, Info]:
    """Trains with the poison weighted by each β in turn, and measures the losses on the way: `β ↦ L(w*(β))`.

    `w*(β) = argmin_w Σ_{i clean} ℓ(z_i, w) + β Σ_{j poisoned} ℓ(z_j, w) + λ/2 ‖w‖²`: β = 0 is the clean model, β = 1
    the poisoned one. One program; λ and seeds are further axes by `jax.vmap` or `jax.lax.map` over the call.

    Args:
      key: the trainer's, the same for every β.
      trainer: `(key, params, data) -> (params, info)`. For the formula above its objective is a sum over rows:
        `bilevel.implicit(losses.summed(…))`, `bilevel.kkt_svm`. With a mean of rows λ grows with `Σ weight`.
      params: where training starts.
      data: the poisoned training set, weights as at β = 1.
      poisoned: bool `[n]`, the rows that β weighs (`attacks.badnets` tells them).
      losses_fn: `params -> numbers`, a pytree: the loss on clean and on triggered test rows, errors, ….
      betas: `[b]`, non-negative, in the order of training.
      warm_start: begin each fit where the last one ended. That saves steps where there is one optimum; a network that
        isn't trained to convergence wants False, and so does `kkt_svm`, which has no start.

    Returns:
      `(LearningCurve, info)`; info: the trainer's, leaves `[b, ...]`.

    Reference: Cinà et al., "Backdoor Learning Curves: Explaining Backdoor Poisoning Beyond Influence Functions",
    arXiv:2106.07214, eq. (2)-(4).

    >>> from mlsec_jax.base import dataset
    >>> mean = lambda key, params, data: (jnp.sum(data.weight * data.y) / jnp.sum(data.weight), {})
    >>> rows = dataset(jnp.zeros((2, 1)), jnp.array([0.0, 1.0]))
    >>> poisoned, away = jnp.array([False, True]), lambda params: 1 - params
    >>> betas = jnp.array([0.0, 1.0])
    >>> curve, _ = backdoor_learning_curve(None, mean, jnp.zeros(()), rows, poisoned, away, betas=betas)
    >>> curve.losses.tolist()
    [1.0, 0.5]
    """
    betas = jnp.asarray(betas, data.weight.dtype)
    checks.at_least("betas", betas, 0)
    _check_rows(data, poisoned, betas)

    def fit(start: Params, beta: jax.Array) -> tuple[Params, Any]:
        trained, info = trainer(key, start, _weighted(data, poisoned, beta))
        return (trained if warm_start else start), (losses_fn(trained), trained, info)

    _, (measured, path, info) = jax.lax.scan(fit, params, betas)
    return LearningCurve(betas, measured, path), info


def learning_slope(
    key: Key,
    trainer: Any,
    params: Params,
    data: Data,
    poisoned: jax.Array,
    losses_fn: Callable[[Params], Any],
    *,
    beta: Any = 1e-8,
) -> LearningSlope:
    """The slope of the learning curve where the poison begins to count, by differentiating through the trainer.

    At an optimum, `dL/dβ|₀ = -∇L(w*)ᵀ H⁻¹ Σ_{j poisoned} ∇ℓ(z_j, w*)`, H that of the clean objective. A row of weight 0
    is absent and has no derivative, so it is the limit from above that is taken, at a tiny β.

    Args:
      key: the trainer's.
      trainer: differentiable in the weights, in reverse mode.
      params: where training starts.
      data: the poisoned training set, weights as at β = 1.
      poisoned: bool `[n]`.
      losses_fn: `params -> pytree of scalars`; each costs one reverse pass.
      beta: where the slope is taken, positive.

    Returns:
      `LearningSlope`.

    Edge cases: a support vector machine moves along straight pieces, and its slope is that of the piece at `beta`. One
    without margin vectors at β = 0 has a bias that is not unique, and no slope to trust.

    Reference: Cinà et al., arXiv:2106.07214, eq. (5)-(6). Deviates from the paper's code in: H over the clean rows, as the
    formula has it; the code takes it over the poison.
    """
    checks.above("beta", beta, 0)
    _check_rows(data, poisoned, jnp.ones(1))

    def after(beta: jax.Array) -> Any:
        return losses_fn(trainer(key, params, _weighted(data, poisoned, beta))[0])

    slope = jax.jacrev(after)(jnp.asarray(beta, data.weight.dtype))
    return LearningSlope(slope, jax.tree.map(lambda leaf: -2 / jnp.pi * jnp.arctan(leaf), slope))


def parameter_deviation(path: jax.Array, gram: jax.Array | None = None) -> Deviation:
    """Norm and angle of parameters along a path, against its first point.

    `ρ = ‖w(β)‖`, `ν = ½ (1 - w_0·w(β) / (‖w_0‖ ‖w(β)‖))`. For a kernel machine `w = Σ_i c_i φ(x_i)`, so that
    `w·v = cᵀ K d`.

    Args:
      path: `[b, p]` weights without the bias, or signed dual coefficients `[b, n]`; the first belongs to β = 0.
      gram: `[n, n]`, the kernel of the rows that the coefficients stand for; None for weights.

    Returns:
      `Deviation`. A parameter vector of zero has no direction: its angle is NaN.

    Reference: Cinà et al., arXiv:2106.07214, eq. (7). The published code's RBF figures scatter the coefficients at β = 0
    to wrong rows (scikit-learn's `support_` counts rows of positive weight only); these here don't.

    >>> parameter_deviation(jnp.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]))
    Deviation(norm=Array([1., 2., 1.], dtype=float32), angle=Array([0. , 0.5, 1. ], dtype=float32))
    """
    if path.ndim != 2 or not path.shape[0]:
        raise ValueError(f"path: expected [b, p] with at least one point, got shape {path.shape}.")
    if gram is not None and gram.shape != (path.shape[1], path.shape[1]):
        raise ValueError(f"gram: expected shape {(path.shape[1],) * 2}, got {gram.shape}.")
    images = path if gram is None else path @ gram
    norm = jnp.sqrt(jax.nn.relu(jnp.sum(path * images, axis=1)))
    return Deviation(norm, jnp.clip((1 - images @ path[0] / (norm * norm[0])) / 2, 0, 1))


def _check_rows(data: Data, poisoned: jax.Array, betas: jax.Array) -> None:
    if jnp.shape(poisoned) != (data.num_rows,) or jnp.result_type(poisoned) != jnp.bool_:
        raise ValueError(f"poisoned: expected bool [{data.num_rows}], one a row, got {jnp.result_type(poisoned)} of shape "
                         f"{jnp.shape(poisoned)}.")  # fmt: skip
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas: expected [b] with at least one value, got shape {betas.shape}.")
