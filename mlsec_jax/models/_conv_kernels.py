"""How the loop-safe convolution runs: by XLA's own, widened on CPU where XLA leaves it to a slow kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]

_LABELS = ("NHWC", "HWIO", "NHWC")
_MAX_SLICES = 64  # at more positions than these, one input channel goes through a convolution as well
_FEW_CHANNELS = 16  # up to here XLA:CPU leaves a convolution to its slow kernel,
_COLUMNS = 32  # where a product with fewer columns costs as much as with that many
_BLOCKS = tuple((b, d) for b in (1, 2, 4, 8) for d in (1, 2, 4, 8))


def extent(length: int, dilation: int) -> int:
    """The length of an axis once `dilation - 1` zeros stand between its entries."""
    return dilation * (length - 1) + 1


def _convolve(x, kernel, stride, padding, input_dilation, kernel_dilation):
    """XLA's convolution."""
    return lax.conv_general_dilated(
        x, kernel, stride, padding, input_dilation, kernel_dilation, dimension_numbers=_LABELS
    )


def _convolve_wide(x, kernel, stride, padding, input_dilation, kernel_dilation):
    """The same where channels are few: each block of b x d neighbouring outputs becomes b d o channels of one.

    out[n, b p + u, d q + v, o] = sum_{i, j, c} pad(x)[n, b p + i, d q + j, c] wide[i, j, c, u, v, o],
    wide[i, j, c, u, v, o] = kernel[i - u, j - v, c, o], zero outside of the kernel.

    XLA:CPU has a fast kernel for more than 16 channels, in or out. With no more it multiplies patches by the kernel
    as a matrix, where fewer than 32 columns cost as much as 32. A block adds zeros to the sums but takes b d times
    fewer patches, each (kh + b - 1) (kw + d - 1) large; the one that costs least by that count is taken.
    """
    n, (kh, kw, c, o) = x.shape[0], kernel.shape
    height, width = (x.shape[1 + axis] + sum(padding[axis]) - kernel.shape[axis] + 1 for axis in (0, 1))

    def cost(block: Pair) -> int:
        b, d = block
        patches, columns = n * -(-height // b) * -(-width // d), b * d * o
        return (kh + b - 1) * (kw + d - 1) * patches * -(-columns // _COLUMNS)

    few = max(c, o) <= _FEW_CHANNELS and _area((kh, kw)) <= _area((height, width))
    plain = stride == input_dilation == kernel_dilation == (1, 1)
    b, d = min(_BLOCKS, key=cost) if few and plain else (1, 1)
    if (b, d) == (1, 1):
        return _convolve(x, kernel, stride, padding, input_dilation, kernel_dilation)
    rows, columns = -(-height // b), -(-width // d)
    shift = lambda u, v: jnp.pad(kernel, ((u, b - 1 - u), (v, d - 1 - v), (0, 0), (0, 0)))
    wide = jnp.stack([shift(u, v) for u in range(b) for v in range(d)], axis=3)
    wide = wide.reshape(kh + b - 1, kw + d - 1, c, b * d * o)
    (top, bottom), (left, right) = padding
    padding = ((top, bottom + rows * b - height), (left, right + columns * d - width))
    out = _convolve(x, wide, (b, d), padding, (1, 1), (1, 1)).reshape(n, rows, columns, b, d, o)
    return jnp.swapaxes(out, 2, 3).reshape(n, rows * b, columns * d, o)[:, :height, :width]


def run_anywhere(x, kernel, *, batch_rule, convolve=_convolve, **params):
    """The convolution in XLA's own terms; more than one group is a loop or a grouped convolution."""
    one = lambda x, kernel: _run_one(x, kernel, convolve=convolve, **params)
    if x.shape[0] == 1:
        return one(x[0], kernel[0])[None]
    if batch_rule == "map":
        return lax.map(lambda operands: one(*operands), (x, kernel))
    return jax.vmap(one)(x, kernel)


def _run_one(x, kernel, *, convolve, stride, padding, input_dilation, kernel_dilation):
    """One group; negative padding becomes a crop first."""
    if min(map(min, padding)) < 0:
        crop = [(min(low, 0), min(high, 0), a - 1) for (low, high), a in zip(padding, input_dilation, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *crop, (0, 0, 0)])
        padding = [(max(low, 0), max(high, 0)) for low, high in padding]
        input_dilation = (1, 1)
    if stride == input_dilation == kernel_dilation == (1, 1) and _area(kernel.shape[:2]) > _area(x.shape[1:3]):
        return _run_swapped(x, kernel, padding, convolve)
    return convolve(x, kernel, stride, padding, input_dilation, kernel_dilation)


def run_on_cpu(x, kernel, *, batch_rule, **params):
    """On CPU few channels are widened, many groups run one after the other, and one image a group is cut up."""
    few = min(_MAX_SLICES, _area(kernel.shape[1:3]))
    if x.shape[4] == 1 and _area(_space(x, kernel, **params)) <= few:
        return _run_patches(x, kernel, **params)
    return run_anywhere(x, kernel, batch_rule=batch_rule or "map", convolve=_convolve_wide, **params)


def _space(x, kernel, *, stride, padding, input_dilation, kernel_dilation):
    """How many positions the kernel takes along each axis."""
    inputs = [extent(x.shape[2 + i], input_dilation[i]) + sum(padding[i]) for i in (0, 1)]
    return [(inputs[i] - extent(kernel.shape[1 + i], kernel_dilation[i])) // stride[i] + 1 for i in (0, 1)]


def _run_patches(x, kernel, *, stride, padding, input_dilation, kernel_dilation):
    """All groups at once as patches times kernel, cut position by position: gradients of a kernel, by example."""
    space = _space(
        x, kernel, stride=stride, padding=padding, input_dilation=input_dilation, kernel_dilation=kernel_dilation
    )
    pads = [(low, high, a - 1) for (low, high), a in zip(padding, input_dilation, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *pads, (0, 0, 0)])[..., 0]
    spans = [extent(taps, step) for taps, step in zip(kernel.shape[1:3], kernel_dilation, strict=True)]

    def cut(*position: int) -> jax.Array:
        rows, columns = (
            slice(s * place, s * place + span, step)
            for s, place, span, step in zip(stride, position, spans, kernel_dilation, strict=True)
        )
        return x[:, :, rows, columns].reshape(*x.shape[:2], -1)

    patches = jnp.stack([cut(p, q) for p in range(space[0]) for q in range(space[1])], axis=2)
    out = jnp.einsum("gnpt,gto->gnpo", patches, kernel.reshape(kernel.shape[0], -1, kernel.shape[4]))
    return out.reshape(*x.shape[:2], *space, kernel.shape[4])


def _area(sides):
    """The entries of a window, or of an image."""
    return sides[0] * sides[1]


def _run_swapped(x, kernel, padding, convolve):
    """The same with the roles of image and kernel exchanged, for a kernel that is larger than the image.

    The image's share of the derivative of a kernel's gradient is such a convolution: of a kernel's cotangent with a
    whole batch. Taken as it stands, nearly all of its products are with padding.
    """
    pads = []
    for axis in (0, 1):
        image, taps = x.shape[1 + axis], kernel.shape[axis]
        low = padding[axis][0] + image - taps
        high = padding[axis][1] + image - taps
        pads.append((low, high))
    image = jnp.transpose(jnp.flip(kernel, (0, 1)), (3, 0, 1, 2))
    out = _run_one(
        image,
        jnp.transpose(jnp.flip(x, (1, 2)), (1, 2, 3, 0)),
        convolve=convolve,
        stride=(1, 1),
        padding=pads,
        input_dilation=(1, 1),
        kernel_dilation=(1, 1),
    )
    return jnp.transpose(out, (3, 1, 2, 0))
