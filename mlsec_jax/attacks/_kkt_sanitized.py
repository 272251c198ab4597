"""The KKT attack on sanitized linear classifiers (Koh, Steinhardt & Liang, Machine Learning 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, losses, tree
from mlsec_jax.base import ApplyFn, Data, Info, Key, Known, Params, Transform
from mlsec_jax.scores._sphere_slab import axis_of, centroids, class_quantile


class Feasible(NamedTuple):
    """Where a poison of either class goes unnoticed; leading axis 2: the negative and the positive class.

    Attributes:
      means: `[2, d]`, centroids.
      radius: `[2]`, of the sphere `‖x - μ_y‖ ≤ r_y`.
      axis: `[d]`, the unit vector between centroids.
      slab: `[2]`, `|(x - μ_y)ᵀ axis| ≤ s_y`.
      loss: `[2]`, the largest hinge loss at the decoy, at least 0.
      box: `[2]`, least and greatest input.
    """

    means: jax.Array
    radius: jax.Array
    axis: jax.Array
    slab: jax.Array
    loss: jax.Array
    box: jax.Array


def linear_parts(apply_fn: ApplyFn, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weight `[d]` and bias of a single-output linear model, whatever its parameters are called.

    Args:
      apply_fn: `(params, x, key=None) -> [n]` or `[n, 1]`, affine in x.
      params: its parameters.
      x: `[n, ...]`, for the shape.
    """
    zero = jnp.zeros((1,) + x.shape[1:], x.dtype)
    output = lambda row: apply_fn(params, row).reshape(())
    bias, weight = jax.value_and_grad(output)(zero)
    return weight.reshape(-1), bias


def feasible_set(train: Data, weight: jax.Array, bias: jax.Array, *, percentile: Any, lo: Any, hi: Any) -> Feasible:
    """The sphere, slab, box and loss bounds that `percentile` of each clean class satisfies, at a decoy."""
    rows, means, member = centroids(train)
    own = (train.y > 0).astype(jnp.int32)
    square = jnp.sum(jnp.square(rows - means[own]), axis=1)
    axis = axis_of(means)
    sign = 2 * own.astype(rows.dtype) - 1
    hinge = jax.nn.relu(1 - sign * (rows @ weight + bias))
    cut = lambda value: class_quantile(value, member, percentile)
    box = jnp.stack([jnp.asarray(lo, rows.dtype), jnp.asarray(hi, rows.dtype)])
    return Feasible(means, jnp.sqrt(cut(square)), axis, cut(jnp.abs((rows - means[own]) @ axis)), cut(hinge), box)


def _between(x: jax.Array, direction: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The nearest points to `x [2, d]` with `low ≤ x·direction ≤ high`, bounds `[2]`."""
    square = jnp.vdot(direction, direction)
    value = x @ direction
    gap = (jnp.clip(value, low, high) - value) / jnp.where(square > 0, square, 1)
    return x + gap[:, None] * direction[None, :]


def project_feasible(
    points: jax.Array, feasible: Feasible, weight: jax.Array, bias: jax.Array, *, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """The nearest points that are feasible and whose hinge is active at the decoy, by Dykstra's algorithm.

    The intersection, for the class of sign y, of sphere, slab, box and `1 - loss_y ≤ y (x·weight + bias) ≤ 1`.

    Args:
      points: `[2, d]`, one for the negative and one for the positive class.
      feasible: the set.
      weight: `[d]`, the decoy.
      bias: the decoy's.
      num_steps: static, sweeps over the four sets.

    Returns:
      `(points [2, d], violation [2])`, the largest excess over any bound: large where the intersection is empty.
    """
    along = feasible.means @ feasible.axis
    sign = jnp.array([-1, 1], points.dtype)
    ends = jnp.stack([sign - bias, sign * (1 - feasible.loss) - bias])
    low, high = jnp.min(ends, axis=0), jnp.max(ends, axis=0)

    def ball(x: jax.Array) -> jax.Array:
        from_mean = x - feasible.means
        square = jnp.sum(jnp.square(from_mean), axis=1)
        far = square > jnp.square(feasible.radius)
        scale = jnp.where(far, feasible.radius * jax.lax.rsqrt(jnp.where(far, square, 1)), 1)
        return feasible.means + scale[:, None] * from_mean

    sets = (
        lambda x: _between(x, weight, low, high),
        lambda x: _between(x, feasible.axis, along - feasible.slab, along + feasible.slab),
        lambda x: jnp.clip(x, feasible.box[0], feasible.box[1]),
        ball,
    )

    def sweep(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, owed = carry
        new = []
        for k, nearest in enumerate(sets):
            trial = x + owed[k]
            x = nearest(trial)
            new.append(trial - x)
        return (x, jnp.stack(new)), None

    start = (points, jnp.zeros((len(sets),) + points.shape, points.dtype))
    (x, _), _ = jax.lax.scan(sweep, start, None, length=num_steps)
    excess = jnp.stack([jnp.max(jnp.abs(nearest(x) - x), axis=1) for nearest in sets])
    return x, jnp.max(excess, axis=0)


def solve_poisons(
    decoy: tuple[jax.Array, jax.Array],
    pull: jax.Array,
    split: jax.Array,
    feasible: Feasible,
    *,
    num_steps: int = 200,
    num_sweeps: int = 30,
) -> tuple[jax.Array, Info]:
    """The two poisons that make the decoy most nearly stationary: accelerated projected gradient on a convex problem.

    `min_{x_-, x_+} ‖pull - ε_+ x_+ + ε_- x_-‖²` over the feasible set, `split = (ε_-, ε_+)`.

    Args:
      decoy: `(weight [d], bias)`.
      pull: `[d]`, the clean gradient plus the regulariser's at the decoy.
      split: `[2]`, non-negative: copies of either point as a share of the clean rows.
      feasible: the set.
      num_steps: static, gradient steps.
      num_sweeps: static, Dykstra sweeps a step.

    Returns:
      `(points [2, d], info)`; info: `residual` (the norm that is left), `violation [2]`.
    """
    coefficient = split * jnp.array([1, -1], split.dtype)
    curvature = jnp.vdot(coefficient, coefficient)
    step_size = 1 / jnp.where(curvature > 0, curvature, 1)
    project = lambda x: project_feasible(x, feasible, *decoy, num_steps=num_sweeps)[0]

    def body(carry: tuple[jax.Array, jax.Array, jax.Array], _: None) -> tuple[Any, None]:
        x, ahead, t = carry
        left = pull + coefficient @ ahead
        new = project(ahead - step_size * coefficient[:, None] * left[None, :])
        faster = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        return (new, new + ((t - 1) / faster) * (new - x), faster), None

    start = project(feasible.means)
    (x, _, _), _ = jax.lax.scan(body, (start, start, jnp.ones((), start.dtype)), None, length=num_steps)
    x, violation = project_feasible(x, feasible, *decoy, num_steps=10 * num_sweeps)
    left = pull + coefficient @ x
    return x, {"residual": jnp.sqrt(jnp.vdot(left, left)), "violation": violation}


def decoy_data(train: Data, holdout: Data, margin: jax.Array, quantile: Any, copies: Any) -> Data:
    """The clean set plus `copies` of the holdout rows of the smallest margins, labels flipped: its optimum is a decoy.

    Args:
      train: n rows.
      holdout: m rows.
      margin: `[m]`, `y f(x)` of the clean model.
      quantile: which share of the holdout rows is flipped.
      copies: the weight of each.

    Returns:
      `Data` of n + m rows; those not flipped have weight 0.
    """
    weight = holdout.weight
    cut = class_quantile(margin, weight[None, :].astype(margin.dtype), quantile)[0]
    flipped = jnp.where(jnp.any(holdout.y < 0), -holdout.y, jnp.where(holdout.y > 0, 0, 1).astype(holdout.y.dtype))
    weight = jnp.where(margin <= cut, weight * jnp.asarray(copies, weight.dtype), 0)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), train, holdout._replace(y=flipped, weight=weight))


def kkt_sanitized(
    apply_fn: ApplyFn,
    trainer: Any,
    victim: Any = None,
    *,
    num_poisons: int,
    l2: Any,
    percentile: Any = 0.9,
    lo: Any = 0.0,
    hi: Any = 1.0,
    quantiles: Sequence[float] = (0.05, 0.10, 0.15, 0.20, 0.25),
    copies: Sequence[float] = (1.0, 3.0, 8.0, 25.0),
    splits: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_steps: int = 200,
    num_sweeps: int = 30,
) -> Transform:
    """Two distinct poisons, copied, that make a bad "decoy" model optimal and pass the sanitizers.

    For a decoy θ* and copies `ε_± n` of `x_±`, the KKT condition of the poisoned hinge objective,
    `g + (1 + ε) λ θ* - ε_+ x_+ + ε_- x_- = 0` with g the gradient of the clean mean hinge loss, is solved in least
    squares over the feasible set: a convex problem. Every decoy (`quantiles` × `copies`) is tried with every split of
    the budget and with the split that balances the bias, `ε_- = (ε - g_b) / 2`; the poisoned set that harms the
    retrained victim most on the holdout is kept.

    Threat: changes - it fills the last `num_poisons` (reserved) rows, inputs and labels; sees - the training set, θ₀
    (`known.params`) and data of its own (`known.holdout`); budget - `num_poisons` rows inside the sphere, the slab, the
    box and the loss bound that `percentile` of each clean class satisfies; assumes - a linear victim with hinge loss
    and l2/2 ‖w‖², and a sanitizer no stricter than those bounds.

    Args:
      apply_fn: `(params, x, key=None) -> [n]` or `[n, 1]`, affine in x.
      trainer: of the decoys, `(key, params, data) -> (params, info)` (smoothed hinge, the same l2).
      victim: what candidates are judged by, usually `defended(trainer, before=...)`; default: `trainer`.
      num_poisons: static.
      l2: λ of the victim, on the scale of the mean loss.
      percentile: of each clean class, for all bounds.
      lo: least input.
      hi: greatest input.
      quantiles: shares of the holdout flipped for decoys.
      copies: how often they are repeated.
      splits: shares of the budget given to the positive class; the bias-balancing split is tried besides.
      num_steps: static, gradient steps a problem.
      num_sweeps: static, Dykstra sweeps a step.

    Returns:
      A `Transform` of training `Data` with labels {0, 1} or {-1, +1} and `num_poisons` reserved rows at its end
      (`threat.reserve`). Info: `points [2, d]`, `num_positive`, `residual`, `violation`, `decoy` of the best candidate,
      and `losses [candidates]`, the victim's mean 0-1 loss on the holdout for all.

    References: Koh, Steinhardt & Liang, Machine Learning 111, 2022 (arXiv:1811.00741), section 4. Deviates from the
    paper in: every decoy is tried instead of the Pareto front; no integer constraint on word counts.
    """
    checks.count("num_poisons", num_poisons)
    checks.between("percentile", percentile, 0.0, 1.0)
    judge = trainer if victim is None else victim

    def signed(params: Params, data: Data) -> jax.Array:
        output = apply_fn(params, losses.present(data).x).reshape(data.num_rows)
        return jnp.where(data.y > 0, output, -output)

    def transform(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        start = known.require("params", by="attacks.kkt_sanitized")
        holdout = known.require("holdout", by="attacks.kkt_sanitized")
        checks.data("subject", subject)
        checks.binary("subject.y", subject.y, subject.weight)
        checks.data("known.holdout", holdout)
        if checks.is_concrete(subject) and np.ptp(np.asarray(subject.y)[np.asarray(subject.weight) > 0]) == 0:
            raise ValueError("subject.y: expected rows of both classes, got one.")
        first = subject.num_rows - num_poisons
        if first < 0 or (checks.is_concrete(subject.weight) and np.any(np.asarray(subject.weight)[first:] > 0)):
            raise ValueError(f"num_poisons: expected {num_poisons} reserved rows at the end (threat.reserve).")
        if num_poisons == 0:
            return subject, {}
        decoy_key, judge_key = jax.random.split(key)
        x, dtype = subject.x, subject.x.dtype
        clean_margin = signed(trainer(decoy_key, start, subject)[0], holdout)
        total = jnp.sum(subject.weight).astype(dtype)
        budget = num_poisons / total
        negative = jnp.where(jnp.any(subject.y < 0), -1, 0).astype(subject.y.dtype)

        def poisoned(points: jax.Array, positive: jax.Array) -> Data:
            chosen = (jnp.arange(num_poisons, dtype=positive.dtype) < positive).astype(jnp.int32)
            rows = points[chosen].reshape((num_poisons,) + x.shape[1:])
            labels = jnp.where(chosen > 0, 1, negative).astype(subject.y.dtype)
            data = subject._replace(x=x.at[first:].set(rows), y=subject.y.at[first:].set(labels))
            return data._replace(weight=data.weight.at[first:].set(1))

        def candidate(grid: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, Any]:
            quantile, repeats, share = grid
            params, _ = trainer(decoy_key, start, decoy_data(subject, holdout, clean_margin, quantile, repeats))
            decoy = linear_parts(apply_fn, params, x)
            feasible = feasible_set(subject, *decoy, percentile=percentile, lo=lo, hi=hi)
            active = jnp.where(signed(params, subject) < 1, subject.weight.astype(dtype), 0) / total
            sign = jnp.where(subject.y > 0, 1, -1).astype(dtype)
            rows = losses.present(subject).x.reshape(subject.num_rows, -1)
            slope, slope_bias = -(active * sign) @ rows, -jnp.sum(active * sign)
            balanced = jnp.clip((budget + slope_bias) / (2 * budget), 0, 1)
            positive = jnp.round(num_poisons * jnp.where(share < 0, balanced, share))
            split = jnp.stack([num_poisons - positive, positive]) / total
            pull = slope + (1 + budget) * jnp.asarray(l2, dtype) * decoy[0]
            points, info = solve_poisons(decoy, pull, split, feasible, num_steps=num_steps, num_sweeps=num_sweeps)
            trained, _ = judge(judge_key, start, poisoned(points, positive))
            wrong = losses.weighted_mean((signed(trained, holdout) <= 0).astype(dtype), holdout.weight)
            return {"points": points, "num_positive": positive, "decoy": decoy, "losses": wrong, **info}

        shares = jnp.asarray((*splits, -1.0), dtype)
        mesh = jnp.meshgrid(jnp.asarray(quantiles, dtype), jnp.asarray(copies, dtype), shares, indexing="ij")
        tried = jax.lax.map(candidate, tuple(axis.reshape(-1) for axis in mesh))
        best = tree.take(tried, jnp.argmax(tried["losses"]))
        return poisoned(best["points"], best["num_positive"]), {**best, "losses": tried["losses"]}

    return transform
