"""The depthwise convolution: every channel with a kernel of its own, as a sum over the kernel's taps.

XLA's CPU backend has no fast kernel for as many groups as channels, in a loop least of all. A sum of shifted images,
each times one weight a channel, is plain arithmetic: it fuses, in a loop as outside of it, and has every derivative.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mlsec_jax import checks


def depthwise(x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Two-dimensional convolution of each channel by itself, with "SAME" padding.

    out[n, p, q, c] = sum_{i, j} pad(x)[n, s p + i, s q + j, c] kernel[i, j, c]

    Equal to `lax.conv_general_dilated` with as many feature groups as channels, derivatives of every order included.

    Args:
      x: images `[n, h, w, c]`, floating.
      kernel: `[kh, kw, c]`, of the same dtype.
      stride: distance between the positions, in both directions.

    Returns:
      `[n, ceil(h / stride), ceil(w / stride), c]`.

    >>> depthwise(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3)), stride=2).shape
    (2, 4, 4, 3)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim != 4 or kernel.ndim != 3 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"x and kernel: expected [n, h, w, c] and [kh, kw, c] with the same c, got {x.shape} and {kernel.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != kernel.dtype:
        raise ValueError(f"x and kernel: expected the same floating dtype, got {x.dtype} and {kernel.dtype}.")
    checks.count("stride", stride, 1)
    taps = kernel.shape[:2]
    space = [-(-side // stride) for side in x.shape[1:3]]
    spans = [stride * (size - 1) + 1 for size in space]
    totals = [max(span + k - 1 - side, 0) for span, k, side in zip(spans, taps, x.shape[1:3], strict=True)]
    pads = [(total // 2, total - total // 2, 0) for total in totals]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    out = jnp.zeros((x.shape[0], *space, x.shape[3]), x.dtype)
    for i in range(taps[0]):
        for j in range(taps[1]):
            shifted = padded[:, i : i + spans[0] : stride, j : j + spans[1] : stride]
            out = out + shifted * kernel[i, j][None, None, None]
    return out
