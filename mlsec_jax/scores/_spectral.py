"""Spectral signatures: how far a row goes along its class's first principal direction (Tran, Li & Madry 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, linalg, losses
from mlsec_jax.base import ApplyFn, Data, Key, Known, Params, Scorer
from mlsec_jax.scores._by_class import blocks, near_to_all


def spectral(
    features_fn: ApplyFn, *, num_classes: int, centred: bool = True, num_steps: int = 16, tolerance: float = 1e-4
) -> Scorer:
    """The squared projection on the top singular vector of the centred features of the row's class.

    `τ_i = ((φ(x_i) - μ_y) · v_y)²`, v_y the first right singular vector of the matrix of rows `φ(x_j) - μ_y`, `y_j = y`.
    The published defense removes `1.5 ε n_y` rows of every class and trains once more:
    `filter_top(spectral(…), fraction=1.5 * eps, num_classes=…)`.

    All classes are one program, which reads the features once a Lanczos step (one round of them where a direction stands
    out) and forms no matrix of `d x d`. The derivative with respect to the data goes through v (`linalg.top_eigenvector`),
    so that an adaptive attack sees the defense.

    Args:
      features_fn: `(params, x, key=None) -> [n, ...]`, flattened.
      num_classes: static; labels are integers below it.
      centred: False scores `|φ(x_i) · v_y|` without centring it, as the original code does (v is of the centred matrix
        there too): it ranks by the class mean as well, and is here for comparison only.
      num_steps: of a round of Lanczos, static; rounds follow until the tolerance is met.
      tolerance: of v, positive: `‖C v - λ v‖ ≤ tolerance λ`, C the class's covariance; v's own error is that times
        `λ / (λ - λ₂)`.

    Returns:
      A `Scorer`; rows of weight 0 score 0. Under `jit`, where features of NaN don't raise, all of their class score NaN.

    References: Tran, Li & Madry, NeurIPS 2018, algorithm 1.
    """
    checks.count("num_classes", num_classes, 1)
    checks.count("num_steps", num_steps, 1)
    checks.above("tolerance", tolerance, 0)

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        del known
        checks.integer_labels("data.y", data.y)
        checks.labels("data.y", data.y, data.weight, num_classes)
        h = features_fn(params, losses.present(data).x)
        h = h.reshape(h.shape[0], -1).astype(np.promote_types(h.dtype, np.float32))
        checks.finite("features_fn", h, data.weight)
        block = blocks(data, num_classes)
        common = jax.lax.stop_gradient(near_to_all(h, block))
        near, weight = block.take(h) - common[None, None], block.take(data.weight.astype(h.dtype))
        size = block.total(jnp.sum(weight, axis=1))[:, None]
        size = jnp.where(size > 0, size, 1)
        mean = block.total(jax.lax.map(lambda part: part[1] @ part[0], (near, weight))) / size

        def scatter(u: jax.Array) -> jax.Array:
            """The covariance of each class times a vector of its own, `[c, d]`; the data are read once."""
            offset = jnp.sum(mean * u, axis=1)[block.label]

            def each(part: tuple) -> tuple[jax.Array, jax.Array]:
                x, w, u, offset = part
                along = w * (x @ u - offset)
                return along @ x, jnp.sum(along)

            moved, along = jax.lax.map(each, (near, weight, u[block.label], offset))
            return (block.total(moved) - mean * block.total(along)[:, None]) / size

        start = jax.random.normal(key, mean.shape, h.dtype)
        v = linalg.top_eigenvector(scatter, start, num_steps=num_steps, tolerance=tolerance)
        origin = mean if centred else -jnp.broadcast_to(common, mean.shape)
        reach = jax.lax.map(lambda part: part[0] @ part[1] - part[2],
                            (near, v[block.label], jnp.sum(origin * v, axis=1)[block.label]))  # fmt: skip
        return block.back(jnp.square(reach) if centred else jnp.abs(reach), data.num_rows)

    return score
