"""Trainers that reach an optimum and are differentiated there by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from mlsec_jax import checks, linalg, tree
from mlsec_jax.base import Data, Info, Key, Params, Trainer
from mlsec_jax.bilevel._hoist import hoist
from mlsec_jax.bilevel._jaxopt import jaxopt
from mlsec_jax.losses import Objective

Solver = Callable[..., tuple[Params, Info]]  # (objective, params, data) -> (params, info)
LinearSolve = Callable[[Any, Any], Any]  # (matvec, b) -> x, of a symmetric map
Smooth = Callable[..., jax.Array]  # (chosen, data, operands) -> scalar; operands: fixed leaves, closed-over tracers, l1


def cholesky() -> LinearSolve:
    """The KKT system solved densely: O(p³) time, O(p²) memory, exact."""
    return linalg.cholesky_solve


def lu() -> LinearSolve:
    """Dense LU: for indefinite Hessians, at which `cholesky` gives NaN."""
    return linalg.lu_solve


def cg(*, tolerance: float = 1e-10, num_steps: int = 1000, damping: Any = 0.0) -> LinearSolve:
    """Conjugate gradients on Hessian-vector products; solves `(H + ρ I) v = g`."""
    checks.count("num_steps", num_steps, 1)
    return partial(jaxopt.linear_solve.solve_cg, tol=tolerance, maxiter=num_steps, ridge=damping)


def normal_cg(*, tolerance: float = 1e-10, num_steps: int = 1000, damping: Any = 0.0) -> LinearSolve:
    """Conjugate gradients on the normal equations: for maps that are not positive definite."""
    return partial(jaxopt.linear_solve.solve_normal_cg, tol=tolerance, maxiter=num_steps, ridge=damping)


def gmres(*, tolerance: float = 1e-10, num_steps: int = 100, damping: Any = 0.0) -> LinearSolve:
    """GMRES: for maps that are not symmetric."""
    return partial(jaxopt.linear_solve.solve_gmres, tol=tolerance, maxiter=num_steps, ridge=damping)


def neumann(num_terms: int, *, scale: Any) -> LinearSolve:
    """The truncated Neumann series of `num_terms` terms; needs `0 < scale · λ_max < 2` (Lorraine et al., 2020)."""
    checks.count("num_terms", num_terms, 1)
    checks.above("scale", scale, 0)
    return partial(linalg.neumann_solve, num_terms=num_terms, scale=scale)


def nystrom(rank: int, *, damping: Any, seed: int = 0) -> LinearSolve:
    """The Nyström approximation of the Hessian from `rank` of its columns (Hataya & Yamada, 2023)."""
    checks.count("rank", rank, 1)
    checks.above("damping", damping, 0)
    return partial(linalg.nystrom_solve, jax.random.key(seed), rank=rank, damping=damping)


def _smooth_only(objective: Objective) -> bool:
    """Whether there is no L1 part, for sure."""
    return isinstance(objective.l1, (int, float)) and objective.l1 == 0


def _require_smooth(name: str, objective: Objective) -> None:
    """Raises if there is an L1 part, which the named solver would leave out."""
    if not _smooth_only(objective):
        raise ValueError(f"solver: expected proximal_gradient() (the default) for an objective with l1, got {name}().")


def lbfgs(*, num_steps: int = 500, tolerance: float = 1e-10, memory: int = 10) -> Solver:
    """jaxopt's L-BFGS with its zoom line search. An objective with l1 raises."""

    def solve(objective: Objective, params: Params, data: Data) -> tuple[Params, Info]:
        _require_smooth("lbfgs", objective)
        solver = jaxopt.LBFGS(
            objective.smooth, maxiter=num_steps, tol=tolerance, history_size=memory, implicit_diff=False
        )
        result = solver.run(params, data)
        return result.params, {"num_steps": result.state.iter_num}

    return solve


def newton(*, num_steps: int = 100, tolerance: float = 1e-12) -> Solver:
    """Newton's method with a dense Hessian and step halving; for convex objectives, quadratic convergence.

    Where no size of a step descends, because curvature has vanished in some direction, it goes on with `H + ‖∇‖ I`. It ends
    early where only rounding is left to gain. An objective with l1 raises.
    """
    checks.count("num_steps", num_steps)

    def solve(objective: Objective, params: Params, data: Data) -> tuple[Params, Info]:
        _require_smooth("newton", objective)
        flat, unravel = ravel_pytree(params)
        value = lambda w: objective.smooth(unravel(w), data)
        gradient, hessian = jax.grad(value), jax.hessian(value)

        def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            w, g, k, careful, _ = carry
            ridge = jnp.where(careful, jnp.linalg.norm(g), 0) * jnp.eye(w.size, dtype=w.dtype)
            matrix = linalg.damped(hessian(w))
            step = linalg.solve(matrix + ridge.astype(matrix.dtype), g)
            sizes = 0.5 ** jnp.arange(12, dtype=w.dtype)
            values = jax.lax.map(lambda size: value(w - size * step), sizes)
            start = value(w)
            slack = 10 * jnp.finfo(w.dtype).eps * jnp.abs(start)
            good = values <= start - 1e-4 * sizes * jnp.vdot(g, step) + slack
            size, stuck = jnp.argmax(good), ~jnp.any(good)
            w = w - sizes[size] * jnp.where(stuck, 0, step)
            after = gradient(w)
            level = (values[size] >= start - slack) & (2 * jnp.linalg.norm(after) > jnp.linalg.norm(g))
            return w, after, k + 1, stuck | careful, jnp.where(stuck, careful, level)

        def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
            return (jnp.linalg.norm(carry[1]) > tolerance) & (carry[2] < num_steps) & ~carry[4]

        begin: tuple[jax.Array, ...] = (flat, gradient(flat), jnp.zeros((), jnp.int32), jnp.asarray(False), jnp.asarray(False))
        w, g, k, *_ = jax.lax.while_loop(unfinished, body, begin)
        return unravel(jnp.where(jnp.isfinite(jnp.linalg.norm(g)), w, jnp.nan)), {"num_steps": k}

    return solve


def proximal_gradient(*, num_steps: int = 5000, tolerance: float = 1e-12) -> Solver:
    """jaxopt's accelerated proximal gradient: for objectives with an L1 part."""

    def solve(objective: Objective, params: Params, data: Data) -> tuple[Params, Info]:
        solver = jaxopt.ProximalGradient(
            objective.smooth, partial(_prox, objective), maxiter=num_steps, tol=tolerance, implicit_diff=False
        )
        result = solver.run(params, None, data)
        return result.params, {"num_steps": result.state.iter_num}

    return solve


def _prox(objective: Objective, params: Params, hyper: None = None, scaling: Any = 1.0) -> Params:
    """Soft thresholding of the penalised leaves: the proximal operator of `scaling · l1 · ‖·‖₁`."""
    del hyper
    mask = tree.mask_of(params, objective.penalise)

    def each(leaf: jax.Array, penalised: bool) -> jax.Array:
        bound = jnp.asarray(scaling, leaf.dtype) * jnp.asarray(objective.l1, leaf.dtype)
        return jnp.sign(leaf) * jax.nn.relu(jnp.abs(leaf) - bound) if penalised else leaf

    return jax.tree.map(each, params, mask)


def implicit(
    objective: Objective,
    *,
    solver: Solver | None = None,
    linear_solve: LinearSolve | None = None,
    trainable: tree.Where = None,
) -> Trainer:
    """Trains to the optimum; the derivative comes from the implicit function theorem there, not from the path.

    At `∇_θ 𝓛(θ*, data) = 0`: `dθ*/d data = -(∇²_θ 𝓛)⁻¹ ∂_data ∇_θ 𝓛`, so the reverse pass solves one symmetric
    system `H v = g`. With an L1 part every object is restricted to the active set `{θ_j ≠ 0}`.
    Reference: Muñoz-González et al., AISec 2017, eq. (8); Xiao et al., ICML 2015 (LASSO). The derivative with respect
    to the initial parameters is zero, as it is for a unique optimum. The λ of the penalties, and whatever else the loss
    closes over, are differentiated like the data.

    Args:
      objective: one object for the fit and the derivative (`losses.regularised`).
      solver: `newton()`, `lbfgs()`, `proximal_gradient()`, or any `(objective, params, data) -> (params, info)`.
        Default: `newton()`, or `proximal_gradient()` with an L1 part.
      linear_solve: `cholesky()`, `lu()`, `cg()`, `normal_cg()`, `gmres()`, `neumann()`, `nystrom()`, or any
        `(matvec, b) -> x`. Default: `cholesky()`.
      trainable: which leaves are trained (`tree.mask_of`).

    Returns:
      A `Trainer`; info: `stationarity` (norm of the optimality residual), `objective`, and the solver's `num_steps`.
      Use float64 where the optimum matters: in float32 stationarity stalls near 1e-4 of the gradient's scale.
    """
    smooth_only = _smooth_only(objective)
    solve_inner = solver or (newton() if smooth_only else proximal_gradient())
    solve_linear = linear_solve or cholesky()

    def lay_out(params: Params, data: Data) -> tuple[Smooth, Params, Any]:
        """The smooth part as a pure function, what is trained, and operands: what the objective closes over is there."""
        chosen, fixed = tree.partition(params, trainable)
        given = lambda chosen, _, args: objective.smooth(tree.merge(chosen, args[0]), args[1])
        pure, hoisted = hoist(given, chosen, (fixed, data))
        if hoisted:
            smooth = lambda chosen, data, operands: pure(chosen, jnp.int32(0), ((operands[0], data), operands[1]))
        else:
            smooth = lambda chosen, data, operands: given(chosen, None, (operands[0], data))
        return smooth, chosen, (fixed, hoisted, None if smooth_only else jnp.asarray(objective.l1))

    def inner(smooth: Smooth, operands: Any) -> Objective:
        l1 = objective.l1 if smooth_only else operands[2]
        return objective._replace(smooth=lambda chosen, data: smooth(chosen, data, operands), l1=l1)

    def active_of(chosen: Params) -> Params:
        mask = tree.mask_of(chosen, objective.penalise)
        return jax.tree.map(lambda leaf, penalised: (leaf != 0) | (not penalised), chosen, mask)

    def optimality(smooth: Smooth, chosen: Params, data: Data, operands: Any) -> Params:
        within = inner(smooth, operands)
        gradient = jax.grad(within.smooth)
        if smooth_only:
            return gradient(chosen, data)
        active = jax.lax.stop_gradient(active_of(chosen))
        mask = tree.mask_of(chosen, objective.penalise)
        inside = jax.tree.map(lambda leaf, keep: jnp.where(keep, leaf, 0), chosen, active)

        def each(g: jax.Array, leaf: jax.Array, keep: jax.Array, penalised: bool) -> jax.Array:
            slope = jnp.asarray(within.l1, leaf.dtype) * jax.lax.stop_gradient(jnp.sign(leaf)) if penalised else 0
            return jnp.where(keep, g + slope, leaf)

        return jax.tree.map(each, gradient(inside, data), chosen, active, mask)

    def hessian_at(smooth: Smooth, chosen: Params, data: Data, operands: Any) -> Callable[[Params], Params]:
        """`v -> ∂optimality · v`."""
        return lambda v: jax.jvp(lambda c: optimality(smooth, c, data, operands), (chosen,), (v,))[1]

    def polish(smooth: Smooth, found: Params, data: Data, operands: Any) -> Params:
        """Newton steps on the active set that the first-order solver found; each is kept if it helps."""

        def body(_: int, now: Params) -> Params:
            residual = optimality(smooth, now, data, operands)
            matvec = hessian_at(smooth, now, data, operands)
            then = tree.add_scaled(now, -1.0, linalg.cholesky_solve(matvec, residual))
            mask = tree.mask_of(now, objective.penalise)
            same = jax.tree.map(lambda a, b, keep: jnp.all(jnp.sign(a) == jnp.sign(b)) | (not keep), now, then, mask)
            better = tree.norm(optimality(smooth, then, data, operands)) < tree.norm(residual)
            better &= jnp.all(jnp.stack(jax.tree.leaves(same)))
            return jax.tree.map(lambda a, b: jnp.where(better, b, a), now, then)

        return jax.lax.fori_loop(0, 3, body, found)

    def optimum(smooth: Smooth, chosen: Params, data: Data, operands: Any) -> tuple[Params, Info]:
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes inside
            found, info = solve_inner(inner(smooth, operands), chosen, data)
        return (found if smooth_only else polish(smooth, found, data, operands)), info

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        del key
        smooth, chosen, operands = lay_out(params, data)
        stationary = partial(optimality, smooth)
        rule = jaxopt.implicit_diff.custom_root(stationary, has_aux=True, solve=solve_linear)
        trained, info = rule(partial(optimum, smooth))(jax.lax.stop_gradient(chosen), data, operands)
        whole = tree.merge(trained, operands[0])
        residual = tree.norm(stationary(trained, data, operands))
        info = {**info, "stationarity": residual, "objective": objective.value(whole, data)}
        return whole, jax.lax.stop_gradient(info)

    def probe(key: Key, params: Params, data: Data, cotangent: Params) -> dict[str, jax.Array]:
        trained, info = fit(key, params, data)
        smooth, chosen, operands = lay_out(trained, data)
        target, _ = tree.partition(cotangent, trainable)
        matvec = hessian_at(smooth, chosen, data, operands)
        solution = solve_linear(matvec, target)
        residual = tree.norm(tree.add_scaled(matvec(solution), -1.0, target)) / tree.norm(target)
        report = {"stationarity": info["stationarity"], "residual": residual}
        if not smooth_only:
            report["pattern"] = ravel_pytree(active_of(chosen))[0].astype(jnp.int32)
        return report

    return Trainer(fit, probe)
