"""Momentum SGD on integers: run forward, then backward to the very bits it started from.

Reversing `v <- mu v + g` in floats divides rounding errors by `mu` at every step and is NaN after a thousand. Here
weights and velocity are 64-bit fixed-point integers, the digits that `mu v` shifts out are kept in an information
buffer of `log2(1 / mu)` bits a parameter and step, and every step has an exact inverse
(Maclaurin, Duvenaud & Adams 2015).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks
from mlsec_jax.base import Info, Params
from mlsec_jax.bilevel import _fixed_point as fixed
from mlsec_jax.bilevel._fixed_point import Words
from mlsec_jax.bilevel._hoist import GradFn, hoist

_FRACTION_BITS = {"float32": 44, "float64": 50}


class ReversibleState(NamedTuple):
    """Everything that the run back needs, for `p` parameters: 20 bytes and `num_steps * log2(1 / mu)` bits each.

    Attributes:
      weights: the weights, fixed point, `[p]`.
      velocity: the momentum trace, fixed point, `[p]`.
      store: uint32 `[p]`, the open end of the information buffer; 0 at the start.
      buffer: uint16 `[rows, p]`, its closed part; as many rows as the schedule ever spills, and a spare one.
      overflow: bool, whether a number was not finite or left `+-2**(63 - fraction_bits)`; all is void then.
    """

    weights: Words
    velocity: Words
    store: jax.Array
    buffer: jax.Array
    overflow: jax.Array


class _Setting(NamedTuple):
    """The static part of a run."""

    grad_fn: GradFn
    momentum: Fraction
    num_steps: int
    fraction_bits: int


class _Flat(NamedTuple):
    """How a parameter pytree lies in one vector."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    dtype: Any

    @classmethod
    def of(cls, params: Params) -> _Flat:
        leaves, treedef = jax.tree.flatten(params)
        dtypes = tuple(jnp.asarray(leaf).dtype for leaf in leaves)
        if not leaves or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            raise ValueError(f"params: expected real floating leaves, got {[str(dtype) for dtype in dtypes]}.")
        wide = any(dtype == jnp.float64 for dtype in dtypes)
        shapes = tuple(jnp.shape(leaf) for leaf in leaves)
        return cls(treedef, shapes, dtypes, jnp.dtype(jnp.float64 if wide else jnp.float32))

    def ravel(self, tree: Params) -> jax.Array:
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef or tuple(map(jnp.shape, leaves)) != self.shapes:
            shapes = list(map(jnp.shape, leaves))
            like = f"{self.treedef} of {list(self.shapes)}"
            raise ValueError(f"gradient: expected a pytree like params, {like}, got {treedef} of {shapes}.")
        return jnp.concatenate([jnp.asarray(leaf).astype(self.dtype).ravel() for leaf in leaves])

    def unravel(self, vector: jax.Array) -> Params:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        leaves = [
            vector[end - int(np.prod(shape)) : end].reshape(shape).astype(dtype)
            for end, shape, dtype in zip(ends, self.shapes, self.dtypes)
        ]
        return jax.tree.unflatten(self.treedef, leaves)


def as_fraction(momentum: float | Fraction) -> Fraction:
    """The momentum as a fraction with a denominator of at most 2**16; a float must lie within 1e-9 of one.

    >>> as_fraction(0.9)
    Fraction(9, 10)
    """
    if not checks.is_concrete(momentum):
        raise ValueError("momentum: expected a static number, got a tracer (the buffer's size depends on it).")
    exact = momentum if isinstance(momentum, Fraction) else Fraction(float(momentum))
    near = exact.limit_denominator(2**fixed.LIMB)
    if not 0 < near < 1:
        raise ValueError(f"momentum: expected 0 < momentum < 1 (plain SGD loses no digits to keep), got {momentum}.")
    if abs(near - exact) > Fraction(1, 10**9):
        raise ValueError(f"momentum: expected a fraction with denominator at most 65536, got {momentum}; try {near}.")
    return near


def buffer_rows(momentum: float | Fraction, num_steps: int) -> int:
    """The 16-bit words a parameter that the closed part of the buffer fills in `num_steps` steps.

    >>> buffer_rows(0.9, 1000), buffer_rows(0.5, 1000)
    (8, 61)
    """
    mu = as_fraction(momentum)
    return int(fixed.spill_schedule(mu.numerator, mu.denominator, num_steps).sum())


def _scanned(setting: _Setting, rates: jax.Array) -> tuple[jax.Array, ...]:
    """What the loop reads at each step: its number, its learning rate, whether it spills, and into which row."""
    spill = fixed.spill_schedule(setting.momentum.numerator, setting.momentum.denominator, setting.num_steps)
    rows = np.cumsum(spill) - spill
    return jnp.arange(setting.num_steps, dtype=jnp.int32), rates, jnp.asarray(spill), jnp.asarray(rows, jnp.int32)


def _gradient(setting: _Setting, flat: _Flat, weights: jax.Array, step: jax.Array, args: Any) -> jax.Array:
    """The gradient as a vector."""
    return flat.ravel(setting.grad_fn(flat.unravel(weights), step, args))


def _sealed_gradient(
    setting: _Setting, flat: _Flat, weights: Words, step: jax.Array, args: Any
) -> tuple[Words, jax.Array]:
    """The gradient from integers to integers, compiled alike wherever it is called.

    Forward and reverse loops are compiled apart, and fused with its surroundings the same gradient may round
    differently in each (seen on CPU). A branch on a condition that the compiler cannot decide is compiled alone.
    """

    def evaluate(weights: Words, step: jax.Array, args: Any) -> tuple[Words, jax.Array]:
        value = _gradient(setting, flat, fixed.decode(weights, setting.fraction_bits, flat.dtype), step, args)
        return fixed.encode(value, setting.fraction_bits)

    def never(weights: Words, step: jax.Array, args: Any) -> tuple[Words, jax.Array]:
        del step, args
        return weights, weights.lo == 0

    return jax.lax.cond(step >= 0, evaluate, never, weights, step, args)


def _forward_step(
    setting: _Setting, flat: _Flat, args: Any, state: ReversibleState, scanned: Any
) -> tuple[ReversibleState, None]:
    """`v <- mu v + g(w)`, `w <- w - rate v`."""
    step, rate, spill, row = scanned
    bits, mu = setting.fraction_bits, setting.momentum
    low = (state.store & 0xFFFF).astype(jnp.uint16)
    buffer = jax.lax.dynamic_update_index_in_dim(state.buffer, low, row, 0)  # final only where the step spills
    store = jnp.where(spill, state.store >> fixed.LIMB, state.store)
    kept, store = fixed.multiply_rational(state.velocity, store, mu.numerator, mu.denominator)
    gradient, bad_gradient = _sealed_gradient(setting, flat, state.weights, step, args)
    velocity = fixed.add(kept, gradient)
    move, bad_move = fixed.encode(rate * fixed.decode(velocity, bits, flat.dtype), bits)
    back = fixed.negate(move)
    weights = fixed.add(state.weights, back)
    left = fixed.wrapped(kept, gradient, velocity) | fixed.wrapped(state.weights, back, weights)
    overflow = state.overflow | jnp.any(bad_gradient | bad_move | left)
    return ReversibleState(weights, velocity, store, buffer, overflow), None


def _undo(
    setting: _Setting, flat: _Flat, args: Any, state: ReversibleState, scanned: Any
) -> tuple[ReversibleState, jax.Array]:
    """The inverse of `_forward_step`, bit for bit; also returns the velocity it met, as floats."""
    step, rate, spill, row = scanned
    bits, mu = setting.fraction_bits, setting.momentum
    velocity = fixed.decode(state.velocity, bits, flat.dtype)
    move, _ = fixed.encode(rate * velocity, bits)
    weights = fixed.add(state.weights, move)
    gradient, _ = _sealed_gradient(setting, flat, weights, step, args)
    kept = fixed.add(state.velocity, fixed.negate(gradient))
    before, store = fixed.multiply_rational(kept, state.store, mu.denominator, mu.numerator)
    low = jax.lax.dynamic_index_in_dim(state.buffer, row, 0, keepdims=False).astype(jnp.uint32)
    store = jnp.where(spill, (store << fixed.LIMB) | low, store)
    return ReversibleState(weights, before, store, state.buffer, state.overflow), velocity


def _start(setting: _Setting, flat: _Flat, params: Params) -> ReversibleState:
    """The state before the first step: the weights, and zeros."""
    weights, bad = fixed.encode(flat.ravel(params), setting.fraction_bits)
    shape = weights.lo.shape
    rows = buffer_rows(setting.momentum, setting.num_steps) + 1
    buffer = jnp.zeros((rows, *shape), jnp.uint16)
    return ReversibleState(weights, fixed.zeros(shape), jnp.zeros(shape, jnp.uint32), buffer, jnp.any(bad))


def _mismatches(state: ReversibleState, start: ReversibleState) -> jax.Array:
    """How many parameters came back with a weight, velocity or store other than they started with."""
    mine, theirs = ((*s.weights, *s.velocity, s.store) for s in (state, start))
    return jnp.sum(functools.reduce(jnp.logical_or, [a != b for a, b in zip(mine, theirs)]))


def _run(setting: _Setting, flat: _Flat, rates: jax.Array, params: Params, args: Any) -> ReversibleState:
    step = functools.partial(_forward_step, setting, flat, args)
    return jax.lax.scan(step, _start(setting, flat, params), _scanned(setting, rates))[0]


def _read(setting: _Setting, flat: _Flat, state: ReversibleState) -> Params:
    """The weights as a pytree of floats; NaN if the run overflowed."""
    weights = fixed.decode(state.weights, setting.fraction_bits, flat.dtype)
    return flat.unravel(jnp.where(state.overflow, jnp.nan, weights))


def _is_real(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _pull_back(
    setting: _Setting,
    flat: _Flat,
    rates: jax.Array,
    params: Params,
    args: Any,
    state: ReversibleState,
    cotangent: Params,
) -> tuple[jax.Array, Params, Any, jax.Array]:
    """Algorithm 2 of Maclaurin et al.: the run back and the adjoint in one loop."""
    leaves, treedef = jax.tree.flatten(args)
    real = [leaf for leaf in leaves if _is_real(leaf)]

    def with_real(values: list[jax.Array]) -> Any:
        fresh = iter(values)
        return jax.tree.unflatten(treedef, [next(fresh) if _is_real(leaf) else leaf for leaf in leaves])

    def back(carry: Any, scanned: Any) -> tuple[Any, jax.Array]:
        state, d_weights, d_velocity, d_real = carry
        step, rate = scanned[:2]
        state, velocity = _undo(setting, flat, args, state, scanned)
        weights = fixed.decode(state.weights, setting.fraction_bits, flat.dtype)
        d_velocity = d_velocity - rate * d_weights
        d_rate = -jnp.vdot(d_weights, velocity)
        pull = jax.vjp(lambda w, values: _gradient(setting, flat, w, step, with_real(values)), weights, real)[1]
        more_weights, more_real = pull(d_velocity)
        d_real = jax.tree.map(jnp.add, d_real, more_real)
        d_velocity = d_velocity * float(setting.momentum)
        return (state, d_weights + more_weights, d_velocity, d_real), d_rate

    d_last = flat.ravel(cotangent)
    carry = (state, d_last, jnp.zeros_like(d_last), jax.tree.map(jnp.zeros_like, real))
    (first, d_weights, _, d_real), d_rates = jax.lax.scan(back, carry, _scanned(setting, rates), reverse=True)
    mismatches = _mismatches(first, _start(setting, flat, params))
    void = state.overflow | (mismatches > 0)

    sound = lambda x: jnp.where(void, jnp.nan, x)
    fresh = iter(jax.tree.map(sound, d_real))
    d_args = jax.tree.unflatten(treedef, [next(fresh) if _is_real(leaf) else None for leaf in leaves])
    return sound(d_rates), flat.unravel(sound(d_weights)), d_args, mismatches


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(setting: _Setting, rates: jax.Array, params: Params, args: Any) -> tuple[Params, jax.Array]:
    flat = _Flat.of(params)
    state = _run(setting, flat, rates, params, args)
    return _read(setting, flat, state), state.overflow


def _train_forward(setting: _Setting, rates: jax.Array, params: Params, args: Any) -> tuple[Any, Any]:
    flat = _Flat.of(params)
    state = _run(setting, flat, rates, params, args)
    return (_read(setting, flat, state), state.overflow), (rates, params, args, state)


def _train_backward(setting: _Setting, kept: Any, cotangents: Any) -> tuple[jax.Array, Params, Any]:
    rates, params, args, state = kept
    return _first_order(_pull_back(setting, _Flat.of(params), rates, params, args, state, cotangents[0])[:3])


@jax.custom_vjp
def _first_order(derivative: Any) -> Any:
    """The same; integers have no derivative, so that a second one would be wrong."""
    return derivative


def _no_second_order(kept: None, cotangent: Any) -> Any:
    raise ValueError("reversal: the derivative of 'exact' runs on integers and can't be differentiated again; take 'stored'.")


_first_order.defvjp(lambda derivative: (derivative, None), _no_second_order)


_train.defvjp(_train_forward, _train_backward)


@dataclasses.dataclass(frozen=True)
class ReversibleSGD:
    """Exactly reversible momentum SGD. It is called like a function: `(learning_rate, params, args) -> (params, info)`.

    Attributes:
      fit: the run; `jax.grad` goes through it to the learning rate, the initial parameters and `args`.
      roundtrip: of the same arguments, runs forward and back and returns `(mismatches, first params)`: how many
        parameters came back with another weight, velocity or store than they started with, bit for bit (0 if exact).
    """

    fit: Callable[..., tuple[Params, Info]]
    roundtrip: Callable[..., tuple[jax.Array, Params]]

    def __call__(self, learning_rate: Any, params: Params, args: Any = ()) -> tuple[Params, Info]:
        """Trains: the same as `fit`."""
        return self.fit(learning_rate, params, args)


def reversible_sgd(
    grad_fn: GradFn, *, momentum: float | Fraction, num_steps: int, fraction_bits: int | None = None
) -> ReversibleSGD:
    """Momentum SGD whose derivative runs the training backward instead of storing it.

        v_{t+1} = mu v_t + g(w_t),   w_{t+1} = w_t - rate_t v_{t+1},   v_0 = 0        (as `optax.sgd` does)

    and, from the cotangent `dw` of `w_T` and `dv = 0`, for `t = T-1 … 0`, with `w_t`, `v_t` recovered exactly,

        dv <- dv - rate_t dw;  drate_t = -<dw, v_{t+1}>;  dargs += (dg/dargs)' dv;  dw += (dg/dw)' dv;  dv <- mu dv.

    Memory: 20 bytes and `num_steps * log2(1 / mu)` bits a parameter (`buffer_rows` counts them), whatever the
    gradient needs for itself. Time: five gradient evaluations a step, where a stored trajectory needs three.

    Numbers: fixed point in steps of `2**-fraction_bits` up to `2**(63 - fraction_bits)`; a
    product with `mu = n / d` is off by less than `n` such steps, so momenta with small denominators are the sharp
    ones. The derivative is that of the unrounded recursion. Without x64 the same integers serve float32.

    Nothing fails in silence: if a weight, velocity or gradient leaves the range or is not finite, `info["overflow"]`
    is True and the parameters are NaN; if the run back misses the start by one bit (a gradient that is not
    deterministic), all cotangents are NaN.

    Args:
      grad_fn: `(params, step, args) -> gradient`, a pytree like `params`; `step` is an int32 scalar. Deterministic
        and differentiable. Tracers that it closes over are found and differentiated; data belong in `args`.
      momentum: `0 < mu < 1`, static; a `Fraction`, or a float within 1e-9 of one with a denominator up to 65536.
      num_steps: number of steps, static.
      fraction_bits: bits after the binary point, static. Default: 44 for float32 (steps of 5.7e-14 up to 524,288), and
        50 for float64 (8.9e-16, 8,192), or retraining would be too coarse to be differenced. The paper's: 52.

    Returns:
      A `ReversibleSGD`; `learning_rate` is a scalar or `[num_steps]`, `params` any pytree of real floats (float64
      arithmetic if one is float64), `args` any pytree, its integer leaves without derivative.

    >>> quadratic = reversible_sgd(lambda w, step, a: w - a, momentum=0.9, num_steps=50)
    >>> final, info = quadratic(0.1, jnp.ones(2), jnp.zeros(2))
    >>> int(quadratic.roundtrip(0.1, jnp.ones(2), jnp.zeros(2))[0]), bool(info["overflow"])
    (0, False)

    Reference: Maclaurin, Duvenaud & Adams, "Gradient-based Hyperparameter Optimization through Reversible Learning",
    ICML 2015, Algorithms 1-3. Deviates from the paper in the momentum convention (optax's), in the buffer (a bounded
    word that spills 16 bits at steps known beforehand, for one big integer) and in checking its own return.
    """
    checks.count("num_steps", num_steps)
    if fraction_bits is not None:
        checks.count("fraction_bits", fraction_bits, 1)
        checks.between("fraction_bits", fraction_bits, 1, 62)
    mu = as_fraction(momentum)

    def prepare(learning_rate: Any, params: Params, args: Any) -> tuple[_Setting, jax.Array, Params, Any]:
        params, args = jax.tree.map(jnp.asarray, (params, args))
        dtype = _Flat.of(params).dtype
        rate = jnp.asarray(learning_rate).astype(dtype)
        if rate.shape not in ((), (num_steps,)):
            raise ValueError(f"learning_rate: expected a scalar or shape ({num_steps},), got shape {rate.shape}.")
        pure_fn, hoisted = hoist(grad_fn, params, args)
        setting = _Setting(pure_fn, mu, num_steps, fraction_bits or _FRACTION_BITS[dtype.name])
        return setting, jnp.broadcast_to(rate, (num_steps,)), params, (args, hoisted)

    def fit(learning_rate: Any, params: Params, args: Any = ()) -> tuple[Params, Info]:
        final, overflow = _train(*prepare(learning_rate, params, args))
        return final, {"overflow": overflow}

    def roundtrip(learning_rate: Any, params: Params, args: Any = ()) -> tuple[jax.Array, Params]:
        setting, rates, params, args = prepare(learning_rate, params, args)
        flat = _Flat.of(params)
        undo = lambda state, scanned: (_undo(setting, flat, args, state, scanned)[0], None)
        last = _run(setting, flat, rates, params, args)
        first = jax.lax.scan(undo, last, _scanned(setting, rates), reverse=True)[0]
        return _mismatches(first, _start(setting, flat, params)), _read(setting, flat, first)

    return ReversibleSGD(fit, roundtrip)
