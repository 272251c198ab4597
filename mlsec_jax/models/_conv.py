"""A convolution as fast inside a loop as outside of it, in every order and mode of differentiation.

XLA's CPU backend rewrites a convolution to the form that its fast kernels take in the entry computation only. In
the body of a `scan` the gradients of `lax.conv_general_dilated`, whose dimension labels need that rewriting, fall to
a naive emitter, 3 to 100 times slower. Here the two transposes are written with labels that need none.

One bilinear primitive does it. With stride s, dilation a of the input, dilation b of the kernel, and groups g,

    out[g, n, p, q, o] = sum_{i, j, c} pad(dilate_a(x))[g, n, s p + b i, s q + b j, c] kernel[g, i, j, c, o],

and its transposes are itself with (s, a, b) permuted:

    d/dx:       (a, s, b)  of the cotangent with the kernel flipped in space and its channels swapped,
    d/dkernel:  (b, a, s)  of x as [c, h, w, n] with the cotangent, as [p, q, n, o], for a kernel.

It is closed under batching too: a batch of inputs alone joins the rows, a batch of kernels alone joins the output
channels, a batch of both joins the groups. Hence no derivative and no `vmap` ever leaves it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from mlsec_jax import checks
from mlsec_jax.models._conv_kernels import extent, run_anywhere, run_on_cpu

Pair = tuple[int, int]

_STATIC = ("stride", "padding", "input_dilation", "kernel_dilation", "batch_rule")

conv_p = Primitive("loop_safe_conv")


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int | Pair = 1,
    padding: str | Sequence[Pair] = "SAME",
    dilation: int | Pair = 1,
    batch_rule: str | None = None,
) -> jax.Array:
    """Two-dimensional convolution whose derivatives are as fast in a loop as in a single call.

    out[n, p, q, o] = sum_{i, j, c} pad(x)[n, s p + d i, s q + d j, c] kernel[i, j, c, o]

    Equal to `lax.conv_general_dilated` with labels ("NHWC", "HWIO", "NHWC"), derivatives of every order included. On CPU
    few channels are computed in blocks of outputs, where a NaN or infinite pixel may reach neighbours that do not see it.

    Args:
      x: images `[n, h, w, c]`, floating.
      kernel: `[kh, kw, c, o]`, of the same dtype.
      stride: one integer, or one for each of the two directions.
      padding: "SAME", "VALID", or `((top, bottom), (left, right))`; negative numbers crop.
      dilation: distance between the kernel's taps, one integer or two.
      batch_rule: how `vmap` over inputs and kernels *together* runs (many models at once, per-example gradients):
        "map" runs them one after the other, "vmap" as one grouped convolution. None: "map" on CPU, where grouped
        convolutions are some five times slower, "vmap" elsewhere. A batch of only one of the two is always folded
        into a single convolution.

    Returns:
      `[n, p, q, o]`.

    >>> conv(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), stride=2).shape
    (2, 4, 4, 5)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"x and kernel: expected [n, h, w, c] and [kh, kw, c, o] with the same c, got {x.shape} and {kernel.shape}."
        )
    return grouped_conv(
        x[None],
        kernel[None],
        stride=stride,
        padding=padding,
        kernel_dilation=dilation,
        batch_rule=batch_rule,
    )[0]


def grouped_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int | Pair = 1,
    padding: str | Sequence[Pair] = "SAME",
    input_dilation: int | Pair = 1,
    kernel_dilation: int | Pair = 1,
    batch_rule: str | None = None,
) -> jax.Array:
    """One convolution for each of g groups: x `[g, n, h, w, c]`, kernel `[g, kh, kw, c, o]` -> `[g, n, p, q, o]`."""
    if batch_rule is not None:
        checks.one_of("batch_rule", batch_rule, ("map", "vmap"))
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != kernel.dtype:
        raise ValueError(f"x and kernel: expected the same floating dtype, got {x.dtype} and {kernel.dtype}.")
    stride, input_dilation, kernel_dilation = map(
        _pair, ("stride", "input_dilation", "kernel_dilation"), (stride, input_dilation, kernel_dilation)
    )
    inputs = tuple(extent(h, a) for h, a in zip(x.shape[2:4], input_dilation, strict=True))
    taps = tuple(extent(k, b) for k, b in zip(kernel.shape[1:3], kernel_dilation, strict=True))
    padding = _padding(padding, inputs, taps, stride)
    return conv_p.bind(
        *vary_alike(x, kernel),
        stride=stride,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
        batch_rule=batch_rule,
    )


def _pair(name: str, value: int | Pair) -> Pair:
    """One integer for both directions, or two; at least 1."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected one integer or two, got {value!r}.")
    for number in pair:
        checks.count(name, number, 1)
    return pair


def _padding(
    padding: str | Sequence[Pair], inputs: Sequence[int], taps: Sequence[int], stride: Pair
) -> tuple[Pair, ...]:
    """Padding as two pairs of integers."""
    if isinstance(padding, str):
        checks.one_of("padding", padding, ("SAME", "VALID"))
        if padding == "VALID":
            return ((0, 0), (0, 0))
        totals = [max((-(-h // s) - 1) * s + k - h, 0) for h, k, s in zip(inputs, taps, stride, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    try:
        top_bottom, left_right = ((operator.index(low), operator.index(high)) for low, high in padding)
    except (TypeError, ValueError) as error:
        expected = "'SAME', 'VALID' or integers ((top, bottom), (left, right))"
        raise ValueError(f"padding: expected {expected}, got {padding!r}.") from error
    return top_bottom, left_right


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays; inside `shard_map` all vary over the same axes, as a primitive's operands have to."""
    axes = frozenset().union(*map(_varying, arrays))
    return tuple(_vary(array, tuple(axes - _varying(array))) for array in arrays)


def _varying(array: jax.Array) -> frozenset:
    """The manual mesh axes an array varies over (empty outside `shard_map`)."""
    aval = jax.typeof(array)
    manual = getattr(aval, "manual_axis_type", None)  # called `vma` in other releases of jax
    return getattr(aval, "vma", frozenset()) if manual is None else manual.varying


def _vary(array: jax.Array, axes: tuple) -> jax.Array:
    """The same array, said to vary over more manual axes (the transpose is a `psum`)."""
    return lax.pcast(array, axes, to="varying") if axes else array


# The primitive: shape, transposes, batching.


@conv_p.def_abstract_eval
def _abstract(x, kernel, *, stride, padding, input_dilation, kernel_dilation, batch_rule):
    """Shape and sharding of the result: rows like x's, channels like the kernel's."""
    del batch_rule
    space = []
    for axis in (0, 1):
        taps = extent(kernel.shape[1 + axis], kernel_dilation[axis])
        room = extent(x.shape[2 + axis], input_dilation[axis]) + sum(padding[axis]) - taps
        if room < 0:
            raise ValueError(
                f"x and kernel: expected the padded image to cover the kernel, got images {x.shape[2:4]}, kernel "
                f"{kernel.shape[1:3]}, padding {padding}."
            )
        space.append(room // stride[axis] + 1)
    shape = (*x.shape[:2], *space, kernel.shape[4])
    sharding = x.sharding
    if not sharding.mesh.empty or not kernel.sharding.mesh.empty:
        rows, channels = x.sharding.spec[1], kernel.sharding.spec[4]
        spec = jax.P(x.sharding.spec[0], rows, None, None, channels if rows is None else None)
        sharding = (kernel if sharding.mesh.empty else x).sharding.update(spec=spec)
    return x.update(shape=shape, weak_type=False, sharding=sharding)


def _transpose_input(cotangent, x, kernel, *, stride, padding, input_dilation, kernel_dilation, batch_rule):
    """The cotangent of x: a convolution of the output's cotangent with the flipped kernel."""
    pads = []
    for axis in (0, 1):
        taps = extent(kernel.shape[1 + axis], kernel_dilation[axis])
        low = taps - 1 - padding[axis][0]
        inputs = extent(x.aval.shape[2 + axis], input_dilation[axis])
        high = inputs - 1 + taps - extent(cotangent.shape[2 + axis], stride[axis]) - low
        pads.append((low, high))
    # XLA moves neither a reversal nor a transpose out of a loop over which the kernel stays the same, as it does in all
    # crafting, but it moves what is behind a barrier: at width 64 the flips took a third of an iteration on one image.
    flipped = lax.optimization_barrier(jnp.swapaxes(jnp.flip(kernel, (1, 2)), 3, 4))
    return conv_p.bind(
        cotangent,
        flipped,
        stride=input_dilation,
        padding=tuple(pads),
        input_dilation=stride,
        kernel_dilation=kernel_dilation,
        batch_rule=batch_rule,
    )


def _transpose_kernel(cotangent, x, kernel, *, stride, padding, input_dilation, kernel_dilation, batch_rule):
    """The cotangent of the kernel: x, its channels for rows, convolved with the output's cotangent."""
    pads = []
    for axis in (0, 1):
        taps = extent(kernel.aval.shape[1 + axis], kernel_dilation[axis])
        low = padding[axis][0]
        inputs = extent(x.shape[2 + axis], input_dilation[axis])
        high = taps - 1 + extent(cotangent.shape[2 + axis], stride[axis]) - inputs - low
        pads.append((low, high))
    out = conv_p.bind(
        jnp.transpose(x, (0, 4, 2, 3, 1)),
        jnp.transpose(cotangent, (0, 2, 3, 1, 4)),
        stride=kernel_dilation,
        padding=tuple(pads),
        input_dilation=input_dilation,
        kernel_dilation=stride,
        batch_rule=batch_rule,
    )
    return jnp.transpose(out, (0, 2, 3, 1, 4))


def _batch(operands, axes, **params):
    """Inputs alone join the rows, kernels alone the output channels, both together the groups."""
    x, kernel = operands
    x_axis, kernel_axis = axes
    if kernel_axis is None:
        x = jnp.moveaxis(x, x_axis, 1)  # [g, b, n, h, w, c]
        out = conv_p.bind(x.reshape(x.shape[0], -1, *x.shape[3:]), kernel, **params)
        return out.reshape(*x.shape[:3], *out.shape[2:]), 1
    if x_axis is None:
        kernel = jnp.moveaxis(kernel, kernel_axis, 4)  # [g, kh, kw, c, b, o]
        out = conv_p.bind(x, kernel.reshape(*kernel.shape[:4], -1), **params)
        return out.reshape(*out.shape[:4], *kernel.shape[4:]), 4
    x, kernel = jnp.moveaxis(x, x_axis, 0), jnp.moveaxis(kernel, kernel_axis, 0)
    out = conv_p.bind(x.reshape(-1, *x.shape[2:]), kernel.reshape(-1, *kernel.shape[2:]), **params)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


# The primitive: how it runs (`_conv_kernels`).


@functools.partial(jax.jit, static_argnames=_STATIC)
def _eager(x, kernel, **params):
    """What an eager call runs: the compiled primitive."""
    return conv_p.bind(x, kernel, **params)


def _lowered(run):
    """`run` as a lowering; a mesh with explicit axes is left to the compiler in there."""

    def lowered(x, kernel, **params):
        out = _abstract(jax.typeof(x), jax.typeof(kernel), **params).sharding
        if AxisType.Explicit in getattr(out.mesh, "axis_types", ()):
            return jax.sharding.auto_axes(functools.partial(run, **params), out_sharding=out)(x, kernel)
        return run(x, kernel, **params)

    return mlir.lower_fun(lowered, multiple_results=False)


conv_p.def_impl(_eager)
ad.defbilinear(conv_p, _transpose_input, _transpose_kernel)
batching.primitive_batchers[conv_p] = _batch
mlir.register_lowering(conv_p, _lowered(run_anywhere))
mlir.register_lowering(conv_p, _lowered(run_on_cpu), platform="cpu")
