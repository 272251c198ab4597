"""How the loop-safe convolution runs: by XLA's own, on CPU in other forms where XLA leaves it to a slow kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pair = tuple[int, int]

_LABELS = ("NHWC", "HWIO", "NHWC")
_MAX_SLICES = 64  # at more positions than these, one input channel goes through a convolution as well
_FEW_CHANNELS = 16  # up to here XLA:CPU leaves a convolution to its slow kernel,
_COLUMNS = 32  # where a product with fewer columns costs as much as with that many
_FEW_IMAGES = 8  # up to here a kernel that dwarfs the output is fast as a matrix product
_LARGE = 128  # if it has as many taps: it is a cotangent then, while the copy of a weight would cost more than is saved;
_LONG = 2**15  # in a kernel of more positions times channels than these, so is one with more rows
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
    """On CPU few channels are widened, few images multiplied, one image a group is cut up, and groups wait in turn."""
    few = min(_MAX_SLICES, _area(kernel.shape[1:3]))
    batch_rule = batch_rule or "map"
    if x.shape[4] == 1 and _area(_space(x, kernel, **params)) <= few:
        return _run_patches(x, kernel, **params)
    if _product_pays(x, kernel, **params):
        return _run_product(x, kernel, params["padding"], batch_rule)
    return run_anywhere(x, kernel, batch_rule=batch_rule, convolve=_convolve_wide, **params)


def _product_pays(x, kernel, *, stride, padding, input_dilation, kernel_dilation) -> bool:
    """Whether `_run_product` is faster: few images, and a kernel, within the image, that dwarfs the output.

    So it is where the product's rows, the output's positions times images, are few against its columns, the output's
    channels, or not too many where the kernel is too long for the caches. Then patches are never much larger than the
    kernel. Measured with 1 to 16 images, 8 to 64 output channels, 1 x 1 to 7 x 7 positions, kernels of 8 x 8 to 32 x 32
    and 32 to 200 channels. Small kernels would gain little, and few images in a layer of their own size would lose.
    """
    if not stride == input_dilation == kernel_dilation == (1, 1):
        return False
    images, (p, q, n, o) = x.shape[1], kernel.shape[1:]
    space = _space(x, kernel, stride=stride, padding=padding, input_dilation=input_dilation, kernel_dilation=kernel_dilation)
    positions = _area(space)
    rows = images * positions
    dwarfed = images <= _FEW_IMAGES and max(4 * positions, _LARGE) <= p * q <= _area(x.shape[2:4])
    return dwarfed and (2 * rows <= 3 * o or (rows <= 5 * o and p * q * n > _LONG))


def _run_product(x, kernel, padding, batch_rule):
    """The convolution of few images with a large kernel as one matrix product, of blocks of d of the kernel's columns.

    out[m, i, j, o] = sum_v part[m, i, j + v, v, o],    v = 0, ..., d - 1,
    part[m, i, j, v, o] = sum_{n, p, q} pad(x)[m, p + i, d q + j, n] kernel[p, d q + v, n, o].

    The gradient of a layer's kernel is such a convolution: its input channels are the images, the batch the channels,
    the cotangent the kernel, over whose entries XLA:CPU takes some 10 ns each where they are many. The part is a matrix
    product of patches, one for each block, with the cotangent. Blocks take d times fewer patches and widen the product;
    pairs serve three positions best, fours five (d = 3 or 6 misses the vector's width). Patches are cut along one axis
    after the other, because slices of few neighbouring numbers cost more than the sums. The batch goes first before
    groups are mapped, so the transposes meet those of the gradient, outside of the loop.
    """
    (height, width, n), (p, q, _, o) = x.shape[2:], kernel.shape[1:]
    (top, bottom), (left, right) = padding
    tall, broad = height + top + bottom - p + 1, width + left + right - q + 1
    d = 2 if broad < 5 else 4
    blocks, reach = -(-q // d), -(-(broad - 1) // d) + 1  # of d columns in the kernel, and in a patch
    pads = ((0, 0, 0), (top, bottom, 0), (left, d * (blocks + reach - 1) - width - left, 0), (0, 0, 0))

    def one(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = lax.pad(x, jnp.zeros((), x.dtype), pads)
        x = x.reshape(n, p + tall - 1, blocks + reach - 1, -1)
        x = jnp.concatenate([x[:, :, j : j + blocks] for j in range(reach)], axis=3)
        x = jnp.concatenate([x[:, i : i + p] for i in range(tall)], axis=3)
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, d * blocks - q), (0, 0)))
        x, kernel = x.reshape(n * p * blocks, -1), kernel.reshape(n * p * blocks, -1)
        exact = np.promote_types(x.dtype, np.float32)
        part = lax.dot_general(x, kernel, (((0,), (0,)), ((), ())), preferred_element_type=exact)
        part = part.reshape(tall, d * reach, -1, d, o)
        out = part[:, :broad, :, 0]
        for v in range(1, d):
            out += part[:, v : broad + v, :, v]
        return out.astype(kernel.dtype)

    operands = jnp.transpose(x, (0, 4, 2, 3, 1)), jnp.transpose(kernel, (0, 3, 1, 2, 4))
    if x.shape[0] == 1:
        out = one(*(v[0] for v in operands))[None]
    else:
        out = lax.map(lambda v: one(*v), operands) if batch_rule == "map" else jax.vmap(one)(*operands)
    return jnp.transpose(out, (0, 3, 1, 2, 4))


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
