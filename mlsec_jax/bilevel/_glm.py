"""Generalised linear models on few rows: Newton on the Gram matrix, the fast path of convex inner problems."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, losses
from mlsec_jax.base import Data, Info, Key, LossFn, Params, Trainer

MakeLoss = Callable[..., LossFn]  # apply_fn -> loss_fn, such as `losses.logistic`
SIZES = 12  # step halvings that the line search tries at once


def gram(x: jax.Array) -> jax.Array:
    """`X Xᵀ` `[n, n]` of the rows `[n, ...]`, to be computed once and given to `glm`."""
    flat = x.reshape(x.shape[0], -1)
    return flat @ flat.T


def glm_apply(params: Params, x: jax.Array, key: Key | None = None) -> jax.Array:
    """The linear score `x·w + b` `[m]`."""
    del key
    return x.reshape(x.shape[0], -1) @ params["w"].reshape(-1) + params["b"].reshape(())


def glm(
    make_loss: MakeLoss,
    *,
    l2: Any,
    known_gram: jax.Array | None = None,
    rows: Any = None,
    num_steps: int = 30,
    tolerance: float = 1e-10,
) -> Trainer:
    """Trains a linear model with an unpenalised bias to its exact optimum, by Newton's method on an n×n Gram matrix.

    Minimises `Σ_i p_i ℓ(x_i·w + b, y_i) + λ/2 ‖w‖²`, `p = weight / Σ weight`: the objective of
    `implicit(losses.regularised(make_loss(glm_apply), l2=λ))`, and the same optimum and derivative. At the optimum
    `w = Xᵀβ`, so with `K = XXᵀ`, z the scores at hand and `S² = diag(p ℓ''(z))`, a Newton step solves

        (λI + S²K) β + S²1 b = S²z - p ℓ'(z),   1ᵀβ = 0

    by one Cholesky factor of `B = λI + SKS` (`(λI + S²K)⁻¹ = (I - S B⁻¹ S K) / λ`), the bias eliminated by its Schur
    complement `sᵀB⁻¹s`. Nothing is divided by ℓ'', so that saturated rows are harmless. Woodbury's identity turns
    the same factor into the inverse Hessian that the implicit function theorem asks for: O(n³ + nd), never O(d³).

    Args:
      make_loss: `losses.logistic`, `losses.squared`, or any `apply_fn -> loss_fn` that is convex and twice
        differentiable in a single score (`partial(losses.hinge, temperature=t)` is).
      l2: λ > 0, on the scale of the mean loss; scikit-learn's `C` is `1 / (λ Σ weight)`.
      known_gram: `gram(x)` of inputs that agree with the data's on every row but `rows`, computed once outside the
        attack's loop; only the poisons' rows and columns are then computed anew, in O(k n d).
      rows: `[k]`, the rows that differ (`threat.rows`), or an integer k for the last k; required with `known_gram`.
      num_steps: Newton steps at most (static); 4 to 8 are usual.
      tolerance: on the norm of the gradient.

    Returns:
      A `Trainer` from `params = {"w": [d], "b": scalar}` and `Data` with x `[n, ...]`. Newton starts from the better of
      zero and one step from `params`, so parameters trained on similar data save steps. Gradients flow in both modes to
      x (all rows, also with `known_gram`), weight, real labels and λ. Info: `stationarity`, `objective`, `num_steps`.

    Edge cases: rows of weight 0 have β = 0. A loss without curvature anywhere leaves the bias undetermined: NaN.
    The solve divides by λ: in float32 `stationarity` stalls at about 3e-5 for λ = 1e-2 and 6e-4 for 1e-4, and at
    1e-6 the answer is wrong. Work in float64.

    >>> from mlsec_jax.base import dataset
    >>> data = dataset(jnp.array([[0.0], [1.0], [2.0]]), jnp.array([1.0, 3.0, 5.0]))
    >>> start = {"w": jnp.zeros(1), "b": jnp.zeros(())}
    >>> params, _ = glm(losses.squared, l2=0.1)(jax.random.key(0), start, data)
    >>> round(float(params["w"][0]), 2), round(float(params["b"]), 2)
    (1.74, 1.26)
    """
    checks.above("l2", l2, 0)
    checks.count("num_steps", num_steps, 1)
    if (known_gram is None) != (rows is None):
        raise ValueError("known_gram and rows: expected both (a Gram matrix, and the rows that differ) or neither.")
    rows = rows if rows is None else checks.rows("rows", rows)
    scalar = _scalar(make_loss)

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        del key
        x, y, weight = _rows_of(data)
        old_w, old_b = jnp.asarray(params["w"]), jnp.asarray(params["b"])
        first = (old_w.reshape(-1).astype(x.dtype), old_b.reshape(()).astype(x.dtype))
        matrix = _gram_of(x, weight, known_gram, rows)
        operands = (x, y, weight, jnp.asarray(l2, x.dtype), matrix, jax.lax.stop_gradient(first), tolerance)
        w, b, info = _optimum(scalar, num_steps, *operands)
        trained = {"w": w.reshape(old_w.shape).astype(old_w.dtype), "b": b.reshape(old_b.shape).astype(old_b.dtype)}
        return trained, jax.lax.stop_gradient(info)

    def probe(key: Key, params: Params, data: Data, cotangent: Params) -> dict[str, jax.Array]:
        trained, info = fit(key, params, data)
        x, y, weight = _rows_of(data)
        lam = jnp.asarray(l2, x.dtype)
        flat = lambda leaves: (leaves["w"].reshape(-1).astype(x.dtype), leaves["b"].reshape(()).astype(x.dtype))
        theta, target = flat(trained), flat(cotangent)
        slope = lambda w, b: _gradient(scalar, w, b, x, y, weight, lam)
        v = _hessian_solve(scalar, *theta, x, y, weight, lam, _gram_of(x, weight, known_gram, rows), target)
        back = jax.jvp(slope, theta, v)[1]
        norm = lambda t: jnp.sqrt(jnp.vdot(t[0], t[0]) + t[1] ** 2)
        residual = norm((back[0] - target[0], back[1] - target[1])) / norm(target)
        return {"stationarity": info["stationarity"], "residual": residual}

    return Trainer(fit, probe)


def _scalar(make_loss: MakeLoss) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The loss as a function of the scores: `(z [n], y) -> [n]`."""
    loss_fn = make_loss(lambda z, x, key=None: z)

    def scalar(z: jax.Array, y: jax.Array) -> jax.Array:
        return loss_fn(z, Data(jnp.zeros((z.shape[0], 0), z.dtype), y, jnp.ones_like(z)))

    return scalar


def _rows_of(data: Data) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Flat inputs, labels and weights; an absent row has the inputs 0 and a label that some row has."""
    rowed, there = losses.present(data), data.weight > 0
    x = rowed.x.reshape(rowed.x.shape[0], -1)
    x = x.astype(np.promote_types(x.dtype, np.float32))  # half precision has no solver
    y = jnp.asarray(rowed.y)
    return x, jnp.where(there, y, y[jnp.argmax(there)]), data.weight.astype(x.dtype)


def _gram_of(x: jax.Array, weight: jax.Array, known_gram: Any, rows: Any) -> jax.Array:
    """The Gram matrix of x; with a known one, only the given rows and columns are computed. Absent rows are 0."""
    if known_gram is None:
        return x @ x.T
    checks.rows_within("rows", rows, x.shape[0])
    cross = x[rows] @ x.T
    there = weight > 0
    known = jnp.where(there[:, None] & there[None, :], jnp.asarray(known_gram, x.dtype), 0)
    return known.at[rows, :].set(cross).at[:, rows].set(cross.T)


def _slopes(scalar: Any, z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ℓ' and ℓ'' at each score."""
    first = jax.grad(lambda z: jnp.sum(scalar(z, y)))
    return jax.jvp(first, (z,), (jnp.ones_like(z),))


def _share(weight: jax.Array) -> jax.Array:
    """`weight / Σ weight`, as `losses.weighted_mean` has it: a row of weight 0 has no derivative of its own."""
    total = jnp.sum(weight)
    return jnp.where(weight > 0, weight, 0) / jnp.where(total > 0, total, 1)


def _gradient(
    scalar: Any, w: jax.Array, b: jax.Array, x: jax.Array, y: jax.Array, weight: jax.Array, lam: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the training objective in (w, b); the one expression whose derivative is propagated."""
    pull = _share(weight) * jax.grad(lambda z: jnp.sum(scalar(z, y)))(x @ w + b)
    return x.T @ pull + lam * w, jnp.sum(pull)


def _factor(matrix: jax.Array, curve: jax.Array, lam: jax.Array) -> tuple[Any, jax.Array]:
    """The Cholesky factor of `B = λI + SKS`, and s."""
    s = jnp.sqrt(curve)
    return jax.scipy.linalg.cho_factor(matrix * s[:, None] * s[None, :] + lam * jnp.eye(s.size, dtype=s.dtype)), s


def _hessian_solve(
    scalar: Any, w: Any, b: Any, x: jax.Array, y: Any, weight: jax.Array, lam: jax.Array, matrix: Any, target: Any
) -> tuple[jax.Array, jax.Array]:
    """`H⁻¹ (g_w, g_b)` at (w, b) by Woodbury's identity; linear in the target, so JAX transposes it."""
    _, second = _slopes(scalar, x @ w + b, y)
    factor, s = _factor(matrix, _share(weight) * second, lam)
    g_w, g_b = target
    across = jax.scipy.linalg.cho_solve(factor, s)  # apart from the next line, which has to stay linear in the target
    inner = jax.scipy.linalg.cho_solve(factor, s * (x @ g_w))
    v_b = (g_b - jnp.vdot(s, inner)) / (lam * jnp.vdot(s, across))
    return (g_w - x.T @ (s * inner)) / lam - x.T @ (s * across) * v_b, v_b


def _newton(
    scalar: Any, num_steps: int, x: Any, y: Any, weight: Any, lam: Any, matrix: Any, start: Any, tolerance: Any
) -> tuple[jax.Array, jax.Array, Info]:
    """Damped Newton in (β, b); along a step z is linear and ‖w‖² quadratic, so trying a size costs O(n)."""
    p = _share(weight)
    dtype = x.dtype
    sizes = 0.5 ** jnp.arange(SIZES, dtype=dtype)
    value = lambda z, square: jnp.sum(jnp.where(p > 0, p * scalar(z, y), 0)) + lam / 2 * square

    def full_step(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The Newton iterate from scores z: β, b, its Kβ and its scores."""
        first, second = _slopes(scalar, z, y)
        curve = p * second
        factor, s = _factor(matrix, curve, lam)
        h = curve * z - p * first
        inner, across = s[None, :] * jax.scipy.linalg.cho_solve(factor, jnp.stack([s * (matrix @ h), s], axis=1)).T
        free = (h - inner) / lam
        b = jnp.sum(free) / jnp.sum(across)
        beta = free - b * across
        values = matrix @ beta
        return beta, b, values, values + b

    def slope_of(beta: jax.Array, z: jax.Array) -> jax.Array:
        pull = p * _slopes(scalar, z, y)[0]
        r = pull + lam * beta
        return jnp.sqrt(jax.nn.relu(jnp.vdot(r, matrix @ r)) + jnp.sum(pull) ** 2)

    def body(carry: Any) -> Any:
        beta, b, values, _, k = carry
        z, square = values + b, jnp.vdot(beta, values)
        to_beta, to_b, to_values, _ = full_step(z)
        d_beta, d_b, d_values = to_beta - beta, to_b - b, to_values - values
        cross, step_square = jnp.vdot(d_beta, values), jnp.vdot(d_beta, d_values)
        at = lambda t: value(z + t * (d_values + d_b), square + 2 * t * cross + t**2 * step_square)
        slope = jnp.vdot(p * _slopes(scalar, z, y)[0], d_values + d_b) + lam * cross
        now = value(z, square)
        good = jax.vmap(at)(sizes) <= now + 1e-4 * sizes * slope + 10 * jnp.finfo(dtype).eps * jnp.abs(now)
        size = jnp.where(jnp.any(good), sizes[jnp.argmax(good)], 0)
        beta, b, values = beta + size * d_beta, b + size * d_b, values + size * d_values
        k = jnp.where(size > 0, k + 1, num_steps)
        return beta, b, values, slope_of(beta, values + b), k

    def unfinished(carry: Any) -> jax.Array:
        return (carry[3] > tolerance) & (carry[4] < num_steps)

    zero = jnp.zeros_like(p)
    beta, b, values, z = full_step(x @ start[0] + start[1])
    warm = value(z, jnp.vdot(beta, values)) < value(zero, jnp.zeros((), dtype))  # False for NaN
    beta, values, b = (jnp.where(warm, leaf, jnp.zeros_like(leaf)) for leaf in (beta, values, b))
    begin = (beta, b, values, slope_of(beta, values + b), jnp.ones((), jnp.int32))
    beta, b, values, _, steps = jax.lax.while_loop(unfinished, body, begin)
    w = x.T @ beta
    g_w, g_b = _gradient(scalar, w, b, x, y, weight, lam)
    info = {
        "stationarity": jnp.sqrt(jnp.vdot(g_w, g_w) + g_b**2),
        "objective": value(values + b, jnp.vdot(beta, values)),
        "num_steps": steps,
    }
    return w, b, info


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _optimum(
    scalar: Any, num_steps: int, x: Any, y: Any, weight: Any, lam: Any, matrix: Any, start: Any, tolerance: Any
) -> tuple[jax.Array, jax.Array, Info]:
    """`(w, b, info)` as a function of x, y, weight and λ that JAX differentiates in both modes."""
    return _newton(scalar, num_steps, x, y, weight, lam, matrix, start, tolerance)


@_optimum.defjvp
def _optimum_jvp(scalar: Any, num_steps: int, primals: Any, tangents: Any) -> Any:
    """`d(w, b) = -H⁻¹ d∇`, d∇ the change of the gradient at a fixed (w, b)."""
    x, y, weight, lam, matrix, _, _ = primals
    w, b, info = _optimum(scalar, num_steps, *primals)
    real = jnp.issubdtype(y.dtype, jnp.floating)
    moves = (x, weight, lam, y) if real else (x, weight, lam)
    d_moves = (tangents[0], tangents[2], tangents[3], tangents[1])[: len(moves)]

    def at_optimum(x: Any, weight: Any, lam: Any, labels: Any = y) -> tuple[jax.Array, jax.Array]:
        return _gradient(scalar, w, b, x, labels, weight, lam)

    change = jax.jvp(at_optimum, moves, d_moves)[1]
    d_w, d_b = _hessian_solve(scalar, w, b, x, y, weight, lam, matrix, (-change[0], -change[1]))
    return (w, b, info), (d_w, d_b, jax.tree.map(_still, info))


def _still(leaf: jax.Array) -> Any:
    """The tangent of what is not differentiated."""
    return jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape, jax.dtypes.float0)
