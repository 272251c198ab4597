"""Random crops and flips as a transform of batches that can be differentiated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mlsec_jax import checks
from mlsec_jax.base import Data, Key
from mlsec_jax.loop import BatchTransform


def augment(*, pad: Any = 4, flip: bool = True, subpixel: bool = False) -> BatchTransform:
    """The usual augmentation of small images: a random shift of up to `pad` pixels, and a mirror image half the time.

    out_i[a, b] = sum_{p, q} R_i[a, p] C_i[b, q] x_i[p, q],   R_i[a, p] = max(0, 1 - |a + r_i - p|),

    C_i likewise for columns, reversed when image i is flipped; what lies outside the image is 0. For whole shifts the
    matrices choose pixels, so the images are exact copies; it is linear in the images, with its transpose a product
    with the same matrices, so that gradients with respect to images (attacks through the victim's augmentation) cost
    as little as the augmentation.

    Args:
      pad: the largest shift, in pixels. Whole shifts are uniform on {-pad, ..., pad}: the crop of an image padded by
        `pad` zeros on each side.
      flip: whether to mirror left and right with probability 1/2.
      subpixel: shifts uniform on the interval [-pad, pad], pixels interpolated linearly (Geiping et al. 2021 craft
        under such).

    Returns:
      `(key, batch) -> batch`, for `defended(during=...)` and the `during` slot of trainers; labels and weights stay.
      Each row of images `[n, h, w, c]` draws its own shift and flip.

    >>> from mlsec_jax.base import dataset
    >>> batch = dataset(jnp.ones((2, 8, 8, 1)), jnp.array([0, 1]))
    >>> augment(pad=2)(jax.random.key(0), batch).x.shape
    (2, 8, 8, 1)
    """
    if subpixel:
        checks.at_least("pad", pad, 0)
    else:
        checks.count("pad", pad)

    def transform(key: Key, batch: Data) -> Data:
        x = batch.x
        if not hasattr(x, "ndim") or x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"batch.x: expected floating images [n, h, w, c], got {x!r}.")
        n, h, w, _ = x.shape
        shift_key, flip_key = jax.random.split(key)
        if subpixel:
            reach = jnp.asarray(pad, x.dtype)
            shifts = jax.random.uniform(shift_key, (2, n), x.dtype, -reach, reach)
        else:
            shifts = jax.random.randint(shift_key, (2, n), -pad, pad + 1).astype(x.dtype)
        rows, columns = _hat(shifts[0], h), _hat(shifts[1], w)
        if flip:
            flipped = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1))
            columns = jnp.where(flipped, columns[:, ::-1], columns)
        product = lambda subscripts, *arrays: jnp.einsum(subscripts, *arrays, precision=lax.Precision.HIGHEST)
        return batch._replace(x=product("nbq,naqc->nabc", columns, product("nap,npqc->naqc", rows, x)))

    return transform


def _hat(shifts: jax.Array, size: int) -> jax.Array:
    """`[n]` shifts -> `[n, size, size]`, what each source adds to each target: 1 at distance 0, 0 from 1 on."""
    index = jnp.arange(size, dtype=shifts.dtype)
    distance = index[None, :, None] + shifts[:, None, None] - index[None, None]
    return jax.nn.relu(1 - jnp.abs(distance))
