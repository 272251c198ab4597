"""CutMix: paste a box of another row's image, and mix the labels by area (Yun et al. 2019; Borgnia et al. 2021)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses, tree
from mlsec_jax.base import Data, Key
from mlsec_jax.defenses import _mixing
from mlsec_jax.loop import BatchTransform


def cutmix(*, num_classes: int, alpha: Any = 1.0, probability: Any = 0.5) -> BatchTransform:
    """Each image gets a box of a partner's pixels, and that share of its label.

    `x̃ = B ⊙ x + (1 - B) ⊙ x_π`. With the given probability a batch draws `λ ~ Beta(α, α)` and one box of sides
    `⌊H √(1 - λ)⌋`, `⌊W √(1 - λ)⌋` around a uniform pixel, cut at the border; then λ is the exact share of pixels kept. The loss
    is `λ w CE(f(x̃), y) + (1 - λ) w_π CE(f(x̃), y_π)`: as a row of `Data`, `w̃ = λ w + (1 - λ) w_π` and ỹ the mean of the labels
    by those two parts. The weights of a batch keep their sum; rows of weight 0 stay as they are, and are nobody's partner.

    Threat: changes - the batches of training; sees - nothing; budget - α and the probability; assumes - a trigger is small:
    most boxes miss it or take it to a row of another class.

    Args:
      num_classes: static.
      alpha: positive.
      probability: that a batch is cut, in [0, 1].

    Returns:
      `(key, batch) -> batch` of images `[n, h, w, c]` with soft labels `[n, num_classes]`, for `defended(during=...)` and the
      `during` slot of trainers. Test data are never mixed.

    References: Yun et al., ICCV 2019, eq. (1)-(2); Borgnia et al., ICASSP 2021, section 3.
    """
    checks.count("num_classes", num_classes, 2)
    checks.above("alpha", alpha, 0)
    checks.between("probability", probability, 0, 1)

    def transform(key: Key, batch: Data) -> Data:
        coin_key, share_key, box_key, partner_key = jax.random.split(key, 4)
        own = _mixing.images(batch)
        y = _mixing.distributions(batch, num_classes)
        height, width = own.shape[1:3]
        a = jnp.asarray(alpha, batch.weight.dtype)
        part = jnp.sqrt(1 - jax.random.beta(share_key, a, a, dtype=a.dtype))
        sides = [jnp.floor(size * part).astype(jnp.int32) for size in (height, width)]
        cut = jax.random.bernoulli(coin_key, probability) & _mixing.box(box_key, height, width, sides)
        partner = _mixing.partners(partner_key, batch.weight)
        x = losses.present(batch).x
        mixed = jnp.where(cut[None, :, :, None], x[partner], x)
        pasted = jnp.sum(cut, dtype=batch.weight.dtype) / cut.size
        rows, shares = jnp.stack([jnp.arange(batch.num_rows), partner]), jnp.stack([1 - pasted, pasted])
        keep = tree.per_row(batch.weight > 0, own)
        return Data(jnp.where(keep, mixed, own), *_mixing.mix_labels(y, batch.weight, rows, shares))

    return transform
