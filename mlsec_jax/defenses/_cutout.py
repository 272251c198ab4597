"""Cutout: blank a square of every image (DeVries & Taylor 2017; as a defense Borgnia et al. 2021)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks
from mlsec_jax.base import Data, Key
from mlsec_jax.defenses import _mixing
from mlsec_jax.loop import BatchTransform


def cutout(*, side: int, fill: Any = 0.0) -> BatchTransform:
    """A square of `side` pixels around a uniform pixel, cut at the border, takes the value `fill`; labels stay.

    Threat: changes - the batches of training; sees - nothing; budget - `side`; assumes - a trigger is small and in one place.

    Args:
      side: static, in pixels; 16 of 28 in Borgnia et al.
      fill: the value, in the data's own units.

    Returns:
      `(key, batch) -> batch` of images `[n, h, w, c]`, each with a square of its own.

    References: DeVries & Taylor, arXiv:1708.04552; Borgnia et al., ICASSP 2021, section 3.
    """
    checks.count("side", side)

    def transform(key: Key, batch: Data) -> Data:
        x = _mixing.images(batch)
        draw = lambda k: _mixing.box(k, x.shape[1], x.shape[2], (side, side))
        blank = jax.vmap(draw)(jax.random.split(key, x.shape[0]))
        return batch._replace(x=jnp.where(blank[:, :, :, None], jnp.asarray(fill, x.dtype), x))

    return transform
