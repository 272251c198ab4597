"""The support vector machine, trained to its exact optimum and differentiated at its active set."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, losses
from mlsec_jax.base import ApplyFn, Data, Info, Key, Params, Trainer
from mlsec_jax.bilevel._kernels import Kernel, linear

ZERO, MARGIN, BOUND, ABSENT = 0, 1, 2, -1  # the pattern: a = 0, 0 < a < cap, a = cap, a row of weight 0
POLISH = 30  # active-set steps after the interior point at most; it ends when the pattern stays, as a rule after one


class SVMParams(NamedTuple):
    """A trained support vector machine, `f(x) = Σ_i coef_i K(x, support_i) + bias`.

    Attributes:
      coef: `[n]`, signed dual coefficients `y_i a_i`; 0 for rows that do not support.
      bias: scalar.
      support: `[n, d]`, the training inputs themselves, in at least float32.
    """

    coef: jax.Array
    bias: jax.Array
    support: jax.Array


def svm_apply(kernel: Kernel) -> ApplyFn:
    """The decision function `(params, x, key=None) -> [m]`; its sign is the label."""

    def apply_fn(params: SVMParams, x: jax.Array, key: Key | None = None) -> jax.Array:
        del key
        x = x.reshape(x.shape[0], -1).astype(np.promote_types(x.dtype, params.support.dtype))
        return kernel(x, params.support) @ params.coef + params.bias

    return apply_fn


def kkt_svm(
    *,
    kernel: Kernel | None = None,
    C: Any = 1.0,
    bias: bool = True,
    tolerance: float = 1e-10,
    num_steps: int = 60,
    ridge: float = 1e-13,
) -> Trainer:
    """Trains a support vector machine exactly; the derivative comes from the KKT system of its active set.

    Solves `min_a ½ aᵀQa - 1ᵀa`, `0 ≤ a_i ≤ C w_i`, `Σ y_i a_i = 0`, `Q_ij = y_i y_j K(x_i, x_j)`: a primal-dual
    interior point finds the active set, then the KKT system on that set is solved to the last digits. With S the
    margin vectors (`0 < a < C w`) and `c = y a`, they satisfy `Σ_j K_ij c_j + b = y_i` on S and `Σ_i c_i = 0`, whose
    differential is

        [K_SS 1; 1ᵀ 0] [dc_S; db] = -[(dK c)_S + K_SB dc_B; Σ dc_B],   dc_B = y_B C dw_B on the bound vectors B.

    Gradients flow to the inputs, the weights, C and the kernel's own parameters, in forward and reverse mode, and
    through `params.support` to the kernel values at test points (the term ∂K_kc of Biggio et al.). Labels have no
    derivative, and the initial parameters are ignored. A row that does not support has gradient zero, as it should.

    Args:
      kernel: `linear()` (default), `polynomial(degree, coef)`, `rbf(gamma)`, or any differentiable
        `(a [m, d], b [n, d]) -> [m, n]` that is positive semi-definite.
      C: weight of the hinge losses, `½‖w‖² + C Σ_i w_i max(0, 1 - y_i f(x_i))`: scikit-learn's, with sample weights.
      bias: whether there is a free bias. False drops `Σ y_i a_i = 0` and keeps the bias at 0; with the kernel
        `K(a, b) + 1` the bias is then penalised like any weight, as in liblinear (scikit-learn's `LinearSVC`).
      tolerance: of the interior point's complementarity, relative to the largest coefficient; in float32 it stops at about
        1e-6.
      num_steps: its greatest number of steps (static); 15 to 25 are usual.
      ridge: added to K_SS, times the mean of K's diagonal. Duplicates among the margin vectors make K_SS singular;
        this keeps the solve finite and moves a regular one by less than 1e-12.

    Returns:
      A `Trainer` from `Data` with labels in {0, 1} or {-1, +1} to `SVMParams`, O(n³). Info: `stationarity` (the
      largest violation of the KKT conditions, coefficients relative to the largest one), `objective` (primal),
      `num_margin`, `num_bound`, `num_steps`.

    Edge cases: rows of weight 0 are decoupled, their coefficient is 0. Without a margin vector the bias is free in an
    interval: its midpoint is taken, and its derivative is the midpoint's. With one class only, all coefficients are 0
    and the bias is the label. At a change of the active set the derivative is one-sided (`bilevel.diagnose`).

    Reference: Biggio, Nelson, Laskov, ICML 2012, eq. (6)-(10). Deviates from the paper in: bound vectors move with
    their weight, and training is exact, not incremental.

    >>> from mlsec_jax.base import dataset
    >>> data = dataset(jnp.array([[-1.0], [1.0]]), jnp.array([0, 1]))
    >>> params, _ = kkt_svm()(jax.random.key(0), None, data)
    >>> [round(float(c), 4) for c in params.coef]
    [-0.5, 0.5]
    """
    checks.above("C", C, 0)
    checks.count("num_steps", num_steps, 1)
    kernel = kernel or linear()

    def prepare(data: Data) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        checks.binary("data.y", data.y, data.weight)
        x = losses.present(data).x
        x = x.reshape(x.shape[0], -1).astype(np.promote_types(x.dtype, np.float32))  # half precision has no solver
        sign = jnp.where(data.y > 0, 1, -1).astype(x.dtype)
        cap = jnp.asarray(C, x.dtype) * data.weight.astype(x.dtype)
        return x, kernel(x, x), sign, cap

    def fit(key: Key, params: Params, data: Data) -> tuple[SVMParams, Info]:
        del key, params
        x, gram, sign, cap = prepare(data)
        coef, shift, pattern, steps = _optimum(num_steps, bias, gram, sign, cap, tolerance, ridge)
        values = gram @ coef
        hinge = jax.nn.relu(1 - sign * (values + shift))
        info = {
            "stationarity": _violation(bias, gram, sign, cap, coef, shift),
            "objective": jnp.vdot(coef, values) / 2 + jnp.vdot(cap, hinge),
            "num_margin": jnp.sum(pattern == MARGIN),
            "num_bound": jnp.sum(pattern == BOUND),
            "num_steps": steps,
        }
        return SVMParams(coef, shift, x), jax.lax.stop_gradient(info)

    def probe(key: Key, params: Params, data: Data, cotangent: SVMParams) -> dict[str, jax.Array]:
        _, gram, sign, cap = prepare(data)
        coef, shift, pattern, _ = _optimum(num_steps, bias, gram, sign, cap, tolerance, ridge)
        margin = (pattern == MARGIN).astype(gram.dtype)
        matrix = _kkt_matrix(bias, gram, margin, ridge)
        target = jnp.append(margin * cotangent.coef, cotangent.bias)
        exact = _kkt_matrix(bias, gram, margin, 0.0)
        residual = jnp.linalg.norm(exact @ jnp.linalg.solve(matrix, target) - target)
        scale = jnp.maximum(jnp.linalg.norm(target), jnp.finfo(target.dtype).tiny)
        stationarity = _violation(bias, gram, sign, cap, coef, shift)
        return {"stationarity": stationarity, "residual": residual / scale, "pattern": pattern}

    return Trainer(fit, probe)


def _violation(free: bool, gram: jax.Array, sign: jax.Array, cap: jax.Array, coef: jax.Array, bias: jax.Array) -> jax.Array:
    """The natural residual `max |a - clip(a - m (y f - 1), 0, cap)| / m`, m the largest a, and `|Σ c| / m` if the bias is free.

    It is 0 at an optimum, and the same in all units of the inputs.
    """
    a = sign * coef
    unit = _largest(a)
    gap = sign * (gram @ coef + bias) - 1
    natural = jnp.where(cap > 0, jnp.abs(a - jnp.clip(a - unit * gap, 0, cap)), 0)
    return (jnp.maximum(jnp.max(natural), jnp.abs(jnp.sum(coef))) if free else jnp.max(natural)) / unit


def _largest(a: jax.Array) -> jax.Array:
    """The largest coefficient, the unit of the others; 1 if all are 0."""
    most = jnp.max(jnp.abs(a))
    return jnp.where(most > 0, most, 1)


def _kkt_matrix(free: bool, gram: jax.Array, margin: jax.Array, ridge: Any) -> jax.Array:
    """`[K_SS 1; 1ᵀ 0]` at full size: identity off the margin set, and in the corner if nothing determines the bias."""
    scale = jnp.asarray(ridge, gram.dtype) * jnp.mean(jnp.abs(jnp.diagonal(gram)))
    block = gram * margin[:, None] * margin[None, :] + jnp.diag(1 - margin + scale * margin)
    border = margin if free else jnp.zeros_like(margin)
    corner = jnp.where(jnp.any(border > 0), 0, 1).astype(gram.dtype)
    return jnp.block([[block, border[:, None]], [border[None, :], corner[None, None]]])


def _bias_ends(values: jax.Array, sign: jax.Array, pattern: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Without margin vectors, the rows that bound the bias from below and from above, and whether there are such.

    A row at 0 wants `y f ≥ 1`, a row at its bound `y f ≤ 1`; `e = y - K c` is where each turns.
    """
    turn = sign - values
    low = ((pattern == ZERO) & (sign > 0)) | ((pattern == BOUND) & (sign < 0))
    high = ((pattern == ZERO) & (sign < 0)) | ((pattern == BOUND) & (sign > 0))
    lowest, highest = jnp.argmax(jnp.where(low, turn, -jnp.inf)), jnp.argmin(jnp.where(high, turn, jnp.inf))
    # one side only: both ends are the one there is
    left, right = jnp.where(jnp.any(low), lowest, highest), jnp.where(jnp.any(high), highest, lowest)
    return left, right, turn, jnp.any(low | high)


def _on_pattern(
    free: bool, gram: jax.Array, sign: jax.Array, cap: jax.Array, pattern: jax.Array, ridge: float
) -> tuple[jax.Array, jax.Array]:
    """The coefficients and the bias that solve the KKT system of a given pattern (one step of refinement)."""
    margin = (pattern == MARGIN).astype(gram.dtype)
    fixed = jnp.where(pattern == BOUND, sign * cap, 0)
    target = jnp.append(margin * (sign - gram @ fixed), -jnp.sum(fixed) if free else 0)
    empty = ~jnp.any(margin > 0)
    target = jnp.where(empty, jnp.zeros_like(target), target)
    factor = jax.scipy.linalg.lu_factor(_kkt_matrix(free, gram, margin, ridge))
    exact = _kkt_matrix(free, gram, margin, 0.0)
    solution = jax.scipy.linalg.lu_solve(factor, target)
    solution = solution + jax.scipy.linalg.lu_solve(factor, target - exact @ solution)
    coef = margin * solution[:-1] + fixed
    if not free:
        return coef, jnp.zeros_like(solution[-1])
    left, right, turn, bounded = _bias_ends(gram @ coef, sign, pattern)
    middle = jnp.where(bounded, (turn[left] + turn[right]) / 2, 0)
    return coef, jnp.where(empty, middle, solution[-1])


def _interior_point(
    free: bool, gram: jax.Array, sign: jax.Array, cap: jax.Array, tolerance: float, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Mehrotra's predictor-corrector on the dual, scaled to a mean cap of 1: `(pattern, a, bias, steps)`.

    Every step solves `(Q + z/a + v/s) da + y db = h`, `yᵀda = -yᵀa` by one Cholesky factorisation; z and v are the
    multipliers of `a ≥ 0` and `s = cap - a ≥ 0`. Absent rows are an identity block that never moves nor counts.
    Without a free bias the border y is zero.
    """
    dtype = gram.dtype
    here = cap > 0
    count = jnp.maximum(jnp.sum(here.astype(dtype)), 1)
    unit = jnp.where(jnp.any(here), jnp.sum(cap) / count, 1)
    both = here[:, None] & here[None, :]
    q = jnp.where(both, gram * sign[:, None] * sign[None, :] * unit, jnp.eye(cap.size, dtype=dtype))
    y = jnp.where(here, sign, 0) if free else jnp.zeros_like(sign)
    top = jnp.where(here, cap / unit, 1)
    one = here.astype(dtype)
    only = lambda v: jnp.where(here, v, 0)
    gap_of = lambda a, s, z, v: (jnp.vdot(a, only(z)) + jnp.vdot(s, only(v))) / (2 * count)
    floor = jnp.maximum(jnp.asarray(tolerance, dtype), 8 * jnp.finfo(dtype).eps)

    def longest(v: jax.Array, dv: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(here & (dv < 0), -v / jnp.where(dv < 0, dv, -1), jnp.inf))

    def body(carry: Any) -> Any:
        a, b, z, v, k, _ = carry
        s = top - a
        slope = q @ a - one + y * b - only(z) + only(v)
        gap = gap_of(a, s, z, v)
        factor = jax.scipy.linalg.cho_factor(q + jnp.diag(only(z / a + v / s)))
        back = jax.scipy.linalg.cho_solve(factor, y)
        curve = jnp.vdot(y, back)

        def direction(rz: jax.Array, rv: jax.Array) -> tuple[jax.Array, ...]:
            h = only(-slope + rz / a - rv / s)
            forward = jax.scipy.linalg.cho_solve(factor, h)
            db = (jnp.vdot(y, forward) + jnp.vdot(y, a)) / jnp.where(curve > 0, curve, 1)
            da = only(forward - back * db)
            return da, db, only((rz - z * da) / a), only((rv + v * da) / s)

        def reach(da: jax.Array, dz: jax.Array, dv: jax.Array) -> tuple[jax.Array, jax.Array]:
            primal = jnp.minimum(longest(a, da), longest(s, -da))
            return jnp.minimum(primal, 1), jnp.minimum(jnp.minimum(longest(z, dz), longest(v, dv)), 1)

        da, _, dz, dv = direction(-a * z, -s * v)
        primal, dual = reach(da, dz, dv)
        predicted = gap_of(a + primal * da, s - primal * da, z + dual * dz, v + dual * dv)
        centre = (predicted / gap) ** 3 * gap
        da, db, dz, dv = direction(centre - a * z - da * dz, centre - s * v + da * dv)
        primal, dual = reach(da, dz, dv)
        step = jnp.minimum(jnp.asarray(0.995, dtype) * jnp.minimum(primal, dual), 1)
        new = (a + step * da, b + step * db, z + step * dz, v + step * dv)
        good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in new]))
        a, b, z, v = (jnp.where(good, fresh, old) for fresh, old in zip(new, (a, b, z, v)))
        slope = q @ a - one + y * b - only(z) + only(v)
        error = jnp.maximum(gap_of(a, top - a, z, v) / _largest(only(a)), jnp.max(jnp.abs(only(slope))))
        return a, b, z, v, k + 1, jnp.where(good & (gap > 0), error, 0)

    def unfinished(carry: Any) -> jax.Array:
        return (carry[5] > floor) & (carry[4] < num_steps)

    half = top / 2
    first = jnp.maximum(jnp.max(jnp.abs(only(q @ half - one))), 1) * jnp.ones_like(top)
    begin = (half, jnp.zeros((), dtype), first, first, jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, dtype))
    a, b, z, v, steps, _ = jax.lax.while_loop(unfinished, body, begin)
    size = _largest(only(a))  # multipliers are about 1, coefficients of that size
    # a row of tiny cap is close to both its ends: the nearer counts
    pattern = jnp.where((a < size * z) & (a <= top - a), ZERO, jnp.where(top - a < size * v, BOUND, MARGIN))
    return jnp.where(here, pattern, ABSENT).astype(jnp.int32), only(a) * unit, b, steps


def _pattern_of(
    gram: jax.Array, sign: jax.Array, cap: jax.Array, coef: jax.Array, bias: jax.Array, pattern: jax.Array
) -> jax.Array:
    """The next pattern of the primal-dual active-set method: which constraint the solution of this one violates."""
    a = sign * coef
    gap = sign * (gram @ coef + bias) - 1
    from_margin = jnp.where(a <= 0, ZERO, jnp.where(a >= cap, BOUND, MARGIN))
    from_zero = jnp.where(gap < 0, MARGIN, ZERO)
    from_bound = jnp.where(gap > 0, MARGIN, BOUND)
    new = jnp.where(pattern == MARGIN, from_margin, jnp.where(pattern == ZERO, from_zero, from_bound))
    return jnp.where(pattern == ABSENT, ABSENT, new).astype(jnp.int32)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _optimum(
    num_steps: int, free: bool, gram: jax.Array, sign: jax.Array, cap: jax.Array, tolerance: Any, ridge: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`(coef, bias, pattern, steps)`: the interior point, then active-set steps; the least violation is kept."""
    pattern, a, b, steps = _interior_point(free, gram, sign, cap, tolerance, num_steps)

    def body(carry: Any) -> Any:
        best, best_violation, pattern, k, _ = carry
        coef, bias = _on_pattern(free, gram, sign, cap, pattern, ridge)
        violation = _violation(free, gram, sign, cap, coef, bias)
        better = violation < best_violation
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (coef, bias, pattern), best)
        then = _pattern_of(gram, sign, cap, coef, bias, pattern)
        return best, jnp.where(better, violation, best_violation), then, k + 1, jnp.any(then != pattern)

    start = (sign * a, b, pattern)
    violation = _violation(free, gram, sign, cap, sign * a, b)
    begin = (start, violation, pattern, jnp.zeros((), jnp.int32), jnp.asarray(True))
    (coef, bias, pattern), *_ = jax.lax.while_loop(lambda carry: carry[4] & (carry[3] < POLISH), body, begin)
    return coef, bias, pattern, steps


@_optimum.defjvp
def _optimum_jvp(num_steps: int, free: bool, primals: Any, tangents: Any) -> Any:
    """The differential of the KKT system with its pattern held; labels and tolerances have none."""
    gram, sign, cap, tolerance, ridge = primals
    d_gram, _, d_cap, _, _ = tangents
    coef, bias, pattern, steps = _optimum(num_steps, free, gram, sign, cap, tolerance, ridge)
    margin = (pattern == MARGIN).astype(gram.dtype)
    d_fixed = jnp.where(pattern == BOUND, sign * d_cap, 0)
    d_values = d_gram @ coef + gram @ d_fixed
    left, right, _, bounded = _bias_ends(gram @ coef, sign, pattern)
    middle = jnp.where(bounded, -(d_values[left] + d_values[right]) / 2, 0)
    last = jnp.where(jnp.any(margin > 0), -jnp.sum(d_fixed), middle) if free else jnp.zeros_like(middle)
    solution = jnp.linalg.solve(_kkt_matrix(free, gram, margin, ridge), jnp.append(-margin * d_values, last))
    still = (np.zeros(pattern.shape, jax.dtypes.float0), np.zeros(steps.shape, jax.dtypes.float0))
    return (coef, bias, pattern, steps), (margin * solution[:-1] + d_fixed, solution[-1], *still)
