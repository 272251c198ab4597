"""Back-gradient: the hypergradient by running SGD backwards instead of storing where it went."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, loop, tree
from mlsec_jax.base import Data, Info, Key, LossFn, Params, Trainer
from mlsec_jax.bilevel._hoist import hoist
from mlsec_jax.bilevel._reversible import as_fraction, reversible_sgd
from mlsec_jax.bilevel._unrolled import final_info, plain_scan, unrolled

REVERSALS = ("stored", "approximate", "fixed_point", "exact")
Gradient = Callable[[Params, jax.Array, Any], Params]  # (params, step, args) -> gradient


class _Walk(NamedTuple):
    """The static part of a float run: `v ← μ v + g(w)`, `w ← w - η v`.

    Attributes:
      gradient: of one step.
      momentum: μ.
      num_steps: T.
      num_inversions: iterations that invert a step, at most.
      segment: steps between stored states, from which the walk back starts anew; T for none.
    """

    gradient: Gradient
    momentum: float
    num_steps: int
    num_inversions: int
    segment: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The steps, first to last, as runs of equal segments: `(number of segments, length)`."""
        whole, rest = divmod(self.num_steps, self.segment)
        return [span for span in ((1, rest), (whole, self.segment)) if span[0] * span[1]]


def _step(walk: _Walk, rate: Any, args: Any, state: tuple[Params, Params], t: jax.Array) -> tuple[Params, Params]:
    params, velocity = state
    slope = walk.gradient(params, t, args)
    velocity = tree.add_scaled(slope, walk.momentum, velocity) if walk.momentum else slope
    return tree.add_scaled(params, -rate, velocity), velocity


def _undo(walk: _Walk, rate: Any, args: Any, state: tuple[Params, Params], t: jax.Array) -> tuple[Params, Params]:
    """Where a step may have come from, in floats: right up to the drift that `probe` measures."""
    params, velocity = state
    if walk.momentum:
        before = tree.add_scaled(params, rate, velocity)
        rest = tree.add_scaled(velocity, -1.0, walk.gradient(before, t, args))
        return before, jax.tree.map(lambda leaf: leaf / jnp.asarray(walk.momentum, leaf.dtype), rest)
    tiny = jax.tree.map(lambda leaf: jnp.finfo(leaf.dtype).eps * (1 + jnp.max(jnp.abs(leaf), initial=0)), params)

    def closer(carry: tuple[Params, jax.Array, jax.Array]) -> tuple[Params, jax.Array, jax.Array]:
        guess, k, _ = carry
        then = tree.add_scaled(params, rate, walk.gradient(guess, t, args))
        moved = jax.tree.map(lambda new, old, eps: jnp.any(jnp.abs(new - old) > eps), then, guess, tiny)
        return then, k + 1, jnp.any(jnp.stack(jax.tree.leaves(moved)))

    go_on = lambda carry: carry[2] & (carry[1] < walk.num_inversions)
    return jax.lax.while_loop(go_on, closer, (params, jnp.int32(0), jnp.asarray(True)))[0], velocity


def _start(params: Params) -> tuple[Params, Params]:
    return params, jax.tree.map(jnp.zeros_like, params)


def _run(walk: _Walk, rate: Any, params: Params, args: Any) -> tuple[Any, list[Any]]:
    """The last state, and the states at the end of every segment, stacked span by span."""
    state, ends, start = _start(params), [], 0
    for number, length in walk.spans:
        times = jnp.arange(start, start + number * length, dtype=jnp.int32).reshape(number, length)

        def segment(state: Any, steps: jax.Array) -> tuple[Any, Any]:
            state = plain_scan(partial(_step, walk, rate, args), state, steps)
            return state, state

        state, stored = jax.lax.scan(segment, state, times)
        ends.append((times, stored))
        start += number * length
    return state, ends


def _back(walk: _Walk, ends: list[Any], body: Callable[[Any, Any, jax.Array], Any], carry: Any) -> tuple[Any, Any]:
    """Runs `body(state, carry, t) -> (state, carry)` over all steps from last to first, anew from each stored end."""
    first = None
    for times, stored in reversed(ends):

        def segment(carry: Any, part: Any) -> tuple[Any, Any]:
            steps, state = part
            state, carry = plain_scan(lambda both, t: body(both[0], both[1], t), (state, carry), steps[::-1])
            return carry, state

        carry, states = jax.lax.scan(segment, carry, (times, stored), reverse=True)
        first = tree.take(states, 0)
    return first, carry


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(walk: _Walk, rate: jax.Array, params: Params, args: Any) -> Params:
    return _run(walk, rate, params, args)[0][0]


def _train_forward(walk: _Walk, rate: jax.Array, params: Params, args: Any) -> tuple[Any, Any]:
    last, ends = _run(walk, rate, params, args)
    return last[0], (rate, params, args, ends)


def _train_backward(walk: _Walk, saved: Any, cotangent: Params) -> tuple[jax.Array, Params, Any]:
    rate, params, args, ends = saved
    real, rest = tree.partition(args)

    def body(state: Any, carry: Any, t: jax.Array) -> tuple[Any, Any]:
        d_state, d_rate, d_real = carry
        state = _undo(walk, rate, args, state, t)
        forward = lambda s, r, a: _step(walk, r, tree.merge(a, rest), s, t)
        d_state, more_rate, more_real = jax.vjp(forward, state, rate, real)[1](d_state)
        return state, (d_state, d_rate + more_rate, jax.tree.map(jnp.add, d_real, more_real))

    zeros = jax.tree.map(jnp.zeros_like, (params, rate, real))
    _, (d_state, d_rate, d_real) = _back(walk, ends, body, ((cotangent, zeros[0]), zeros[1], zeros[2]))
    return d_rate, d_state[0], d_real


_train.defvjp(_train_forward, _train_backward)


def back_gradient(
    loss_fn: LossFn,
    learning_rate: Any,
    num_steps: int,
    *,
    momentum: float | Fraction = 0.0,
    reversal: str = "stored",
    num_inversions: int = 200,
    anchor_every: int = 10,
    **slots: Unpack[loop.Slots],
) -> Trainer:
    """Trains by (momentum) SGD; the reverse pass needs where training went, and `reversal` says how it gets it.

    From `dw = ∇_w L(w_T)`, `dv = 0`, for `t = T-1 … 0`: `dv -= η dw`; `dx += (∂_x g(w_t))ᵀ dv`;
    `dw += (∂_w g(w_t))ᵀ dv`; `dv *= μ`, the exact adjoint, for which w_t is

    - `"stored"`: kept, T states. Exact.
    - `"approximate"`: walked back in floats. For plain SGD `w_t ≈ w_{t+1} + η g(w_{t+1})`, the 2017 paper's; the path is
      wrong after some steps while the direction of the hypergradient often survives. With momentum it is the naive
      reversal, which divides errors by μ a step: NaN after hundreds.
    - `"fixed_point"`: `w ← w_{t+1} + η g(w)` iterated to convergence; plain SGD only, converges where `η λ_max < 1`,
      at the rate η λ_max. Walking back multiplies rounding errors by `1 / (1 - η λ)` a step, so every
      `anchor_every`-th state is stored and the walk starts anew there: T / 10 states. Its `probe` reports the drift.
    - `"exact"`: integers, bit for bit (`0 < μ < 1` rational); `T log₂(1/μ)` bits a parameter.

    Args:
      loss_fn: per-example loss.
      learning_rate: η, at least 0; may be a tracer; for `"stored"` also an optax schedule.
      num_steps: T, static; 0 steps, like params of which nothing is trained, give the start back.
      momentum: μ, static: `v ← μ v + g`, `w ← w - η v`, as in `optax.sgd`.
      reversal: one of the four.
      num_inversions: iterations of `"fixed_point"`, at most.
      anchor_every: steps between the stored states of `"fixed_point"`.
      **slots: of `loop.sgd`.

    Returns:
      A `Trainer`; info: `loss`, and `overflow` for `"exact"`.

    References: Muñoz-González et al., AISec 2017, algorithm 3; Domke, AISTATS 2012; Maclaurin et al., ICML 2015.
    Deviates from the 2017 paper in: second derivatives are taken at w_t, not at w_{t+1} (its index is off by one).
    """
    checks.one_of("reversal", reversal, REVERSALS)
    checks.count("num_inversions", num_inversions, 1)
    checks.count("anchor_every", anchor_every, 1)
    if not callable(learning_rate):
        checks.at_least("learning_rate", learning_rate, 0)
    elif reversal != "stored":
        raise ValueError(f"learning_rate: expected a number for reversal={reversal!r}; a schedule is for 'stored'.")
    if not checks.is_concrete(momentum):
        raise ValueError("momentum: expected a static number, got a tracer.")
    checks.between("momentum", float(momentum), 0.0, 1.0)
    if reversal == "fixed_point" and momentum:
        raise ValueError(f"momentum: reversal='fixed_point' is for plain SGD, got momentum {momentum}; use 'exact'.")
    if reversal == "exact" and not momentum:
        raise ValueError("momentum: reversal='exact' needs 0 < momentum < 1, got 0; use 'fixed_point' or 'stored'.")
    if reversal == "exact":
        as_fraction(momentum)

    def batched(transform: loop.BatchTransform) -> Trainer:
        more = loop.with_transform(slots, transform)
        return back_gradient(
            loss_fn,
            learning_rate,
            num_steps,
            momentum=momentum,
            reversal=reversal,
            num_inversions=num_inversions,
            anchor_every=anchor_every,
            **more,
        )

    optimizer = optax.sgd(learning_rate, float(momentum) or None)
    if reversal == "stored":
        stored = unrolled(loss_fn, optimizer, num_steps, remat="step", **slots)
        return dataclasses.replace(stored, batched=batched)
    plan = loop.sgd(loss_fn, optimizer, num_steps, **slots)

    def gradient(chosen: Params, t: jax.Array, args: Any) -> Params:
        fixed, data, steps = args
        return plan.gradient(chosen, fixed, data, tree.take(steps, t))

    def prepare(key: Key, params: Params, data: Data) -> tuple[Params, Params, Any]:
        chosen, fixed = tree.partition(params, slots.get("trainable"))
        return chosen, fixed, (fixed, data, plan.slots(key, data.num_rows))

    def walk_of(chosen: Params, args: Any) -> tuple[_Walk, Any]:
        """The float run; tracers that the loss closes over become operands."""
        pure, hoisted = hoist(gradient, chosen, args)
        inversions, segment = (num_inversions, anchor_every) if reversal == "fixed_point" else (1, max(num_steps, 1))
        return _Walk(pure, float(momentum), num_steps, inversions, segment), (args, hoisted)

    def rate_of(chosen: Params) -> jax.Array:
        """The learning rate as a float, which has a derivative."""
        return jnp.asarray(learning_rate, jnp.result_type(*jax.tree.leaves(chosen)))

    def stays(params: Params) -> bool:
        """Whether training is the identity."""
        return num_steps == 0 or not jax.tree.leaves(tree.partition(params, slots.get("trainable"))[0])

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        if stays(params):
            same = {"overflow": jnp.asarray(False)} if reversal == "exact" else {}
            return params, jax.lax.stop_gradient({**final_info(loss_fn, params, data), **same})
        chosen, fixed, args = prepare(key, params, data)
        info: dict[str, jax.Array] = {}
        if reversal == "exact":
            last, info = reversible_sgd(gradient, momentum=momentum, num_steps=num_steps)(learning_rate, chosen, args)
        else:
            walk, both = walk_of(chosen, args)
            last = _train(walk, rate_of(chosen), chosen, both)
        trained = tree.merge(last, fixed)
        return trained, jax.lax.stop_gradient({**final_info(loss_fn, trained, data), **info})

    def probe(key: Key, params: Params, data: Data, cotangent: Params) -> dict[str, jax.Array]:
        """`drift`: ‖ŵ₀ - w₀‖ / ‖w_T‖ of the walk back (for `exact`: the number of parameters not equal bit for bit)."""
        del cotangent
        if stays(params):
            return {"drift": jnp.zeros((), int if reversal == "exact" else float)}
        chosen, _, args = prepare(key, params, data)
        if reversal == "exact":
            run = reversible_sgd(gradient, momentum=momentum, num_steps=num_steps)
            return {"drift": run.roundtrip(learning_rate, chosen, args)[0]}
        walk, both = walk_of(chosen, args)
        rate = rate_of(chosen)
        last, ends = _run(walk, rate, chosen, both)
        undo = lambda state, carry, t: (_undo(walk, rate, both, state, t), carry)
        first = _back(walk, ends, undo, ())[0][0]
        return {"drift": tree.norm(tree.add_scaled(first, -1.0, chosen)) / tree.norm(last[0])}

    return Trainer(fit, probe, batched)
