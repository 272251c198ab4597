"""Mixup: train on convex combinations of rows and of their labels (Zhang et al. 2018; as a defense Borgnia et al. 2021)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses, tree
from mlsec_jax.base import Data, Key
from mlsec_jax.defenses import _mixing
from mlsec_jax.loop import BatchTransform


def mixup(*, num_classes: int, ways: int = 2, alpha: Any = 1.0) -> BatchTransform:
    """Each row becomes a mixture of `ways` rows of its batch, and so does its label.

    `x̃_i = Σ_k λ_k x_{π_k(i)}`, `λ ~ Dirichlet(α, …, α)`, π_1 the identity and the others independent permutations, all drawn
    once for each batch. The loss of a mixture is `Σ_k λ_k w_k CE(f(x̃), y_{π_k})`, w the rows' weights: as a row of `Data`,
    `w̃ = Σ_k λ_k w_k` and `ỹ = Σ_k λ_k w_k y_k / w̃`. The weights of a batch keep their sum; rows of weight 0 stay as they
    are, and are nobody's partner.

    Threat: changes - the batches of training; sees - nothing; budget - α and `ways`; assumes - a trigger that is diluted is
    not learned. It doesn't hold where every row of a class carries the trigger.

    Args:
      num_classes: static.
      ways: how many rows are mixed, static, at least 1; 4 and 8 are the stronger variants.
      alpha: positive; large values mix evenly.

    Returns:
      `(key, batch) -> batch` with soft labels `[n, num_classes]`, for `defended(during=...)` and the `during` slot of
      trainers. Poisons must be in the batch before, and test data are never mixed.

    References: Zhang et al., ICLR 2018, eq. (1); Borgnia et al., ICASSP 2021, section 3. Deviates from the paper in: the first
    permutation is the identity, which is the same up to the order of rows.

    >>> from mlsec_jax.base import dataset
    >>> batch = dataset(jnp.eye(2), jnp.array([0, 1]))
    >>> mixed = mixup(num_classes=2)(jax.random.key(0), batch)
    >>> bool(jnp.allclose(mixed.x, mixed.y))
    True
    """
    checks.count("num_classes", num_classes, 2)
    checks.count("ways", ways, 1)
    checks.above("alpha", alpha, 0)

    def transform(key: Key, batch: Data) -> Data:
        share_key, *partner_keys = jax.random.split(key, ways)
        y = _mixing.distributions(batch, num_classes)
        shares = jax.random.dirichlet(share_key, jnp.full(ways, alpha, batch.weight.dtype))
        rows = jnp.stack([jnp.arange(batch.num_rows), *(_mixing.partners(k, batch.weight) for k in partner_keys)])
        keep = batch.weight > 0

        def mix(x: jax.Array, own: jax.Array) -> jax.Array:
            checks.floating("batch.x", x)
            mixed = jnp.tensordot(shares.astype(x.dtype), x[rows], axes=1)
            return jnp.where(tree.per_row(keep, own), mixed, own)

        x = jax.tree.map(mix, losses.present(batch).x, batch.x)
        return Data(x, *_mixing.mix_labels(y, batch.weight, rows, shares))

    return transform
