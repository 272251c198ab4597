"""Synthetic problems whose answers are known in closed form. Each returns `(Data, truth)`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlsec_jax import base, checks


def gaussian_blobs(
    key: base.Key, *, rows_per_class: int, dim: int = 2, mean: float = 1.5, scale: float = 0.6
) -> tuple[base.Data, base.Info]:
    """Two Gaussian classes at ∓mean on the first axis: x | y ~ N((2y - 1) mean e_1, scale² I).

    Every linear rule but the sign of x_1 errs more; the best error is Φ(-mean / scale).

    Args:
      key: the draw's key.
      rows_per_class: rows of each class; class 0 comes first.
      dim: number of features.
      mean: distance of each class's centre from the origin.
      scale: standard deviation of each feature.

    Returns:
      `Data` of `[2 rows_per_class, dim]` inputs and labels in {0, 1}; truth: `w [dim]`, `b` (the direction of the best
      rule, w·x + b being the log-odds) and `error`, the best rule's error.

    Reference: the artificial data of Biggio, Nelson, Laskov, ICML 2012.

    >>> data, truth = gaussian_blobs(jax.random.key(0), rows_per_class=25)
    >>> data.x.shape, round(float(truth["error"]), 4)
    ((50, 2), 0.0062)
    """
    checks.count("rows_per_class", rows_per_class, 1)
    checks.count("dim", dim, 1)
    checks.above("scale", scale, 0)
    y = jnp.repeat(jnp.arange(2, dtype=jnp.int32), rows_per_class)
    first = jnp.zeros((dim,)).at[0].set(1.0)
    centres = (2 * y - 1).astype(first.dtype)[:, None] * (mean * first)[None, :]
    x = centres + scale * jax.random.normal(key, centres.shape)
    error = jax.scipy.stats.norm.cdf(jnp.asarray(-mean / scale, first.dtype))
    truth = {"w": 2 * mean / scale**2 * first, "b": jnp.zeros(()), "error": error}
    return base.dataset(x, y, jnp.ones(y.shape, x.dtype)), truth


def linear_regression(
    key: base.Key, *, num_rows: int, dim: int, noise: float = 0.1
) -> tuple[base.Data, base.Info]:
    """A linear model with known weights: y = w·x + b + noise ε, with x, w, b and ε standard normal.

    Args:
      key: the draw's key.
      num_rows: rows.
      dim: number of features.
      noise: standard deviation of what the model leaves unexplained; 0 makes least squares exact.

    Returns:
      `Data` of `[num_rows, dim]` inputs and real labels; truth: `w [dim]` and `b`.

    >>> data, truth = linear_regression(jax.random.key(0), num_rows=20, dim=3)
    >>> data.y.shape, truth["w"].shape
    ((20,), (3,))
    """
    weights_key, key = jax.random.split(key)
    return _regression(key, jax.random.normal(weights_key, (dim,)), num_rows, noise)


def sparse_regression(
    key: base.Key, *, num_rows: int, dim: int, num_active: int, noise: float = 0.1
) -> tuple[base.Data, base.Info]:
    """A linear model in which few features matter: as `linear_regression`, with w zero outside `num_active` features.

    The active weights are ±1, so that no feature is too weak to be found: LASSO's selected features can be compared
    with the true ones.

    Args:
      key: the draw's key.
      num_rows: rows.
      dim: number of features.
      num_active: how many features have a weight.
      noise: standard deviation of what the model leaves unexplained.

    Returns:
      `Data` of `[num_rows, dim]` inputs and real labels; truth: `w [dim]`, `b` and `support [dim]` (boolean).

    >>> data, truth = sparse_regression(jax.random.key(0), num_rows=20, dim=9, num_active=2)
    >>> int(truth["support"].sum())
    2
    """
    checks.count("num_active", num_active, 1)
    if num_active > dim:
        raise ValueError(f"num_active: expected at most {dim}, the number of features, got {num_active}.")
    support_key, sign_key, key = jax.random.split(key, 3)
    support = jax.random.permutation(support_key, dim) < num_active
    weights = jnp.where(support, jax.random.rademacher(sign_key, (dim,), float), 0.0)
    data, truth = _regression(key, weights, num_rows, noise)
    return data, {**truth, "support": support}


def _regression(key: base.Key, w: jax.Array, num_rows: int, noise: float) -> tuple[base.Data, base.Info]:
    """Draws rows of the linear model with the given weights."""
    checks.count("num_rows", num_rows, 1)
    checks.at_least("noise", noise, 0)
    input_key, bias_key, noise_key = jax.random.split(key, 3)
    x = jax.random.normal(input_key, (num_rows, w.shape[0]))
    b = jax.random.normal(bias_key)
    y = x @ w + b + noise * jax.random.normal(noise_key, (num_rows,))
    return base.dataset(x, y, jnp.ones(y.shape, x.dtype)), {"w": w, "b": b}


def ridge_solution(data: base.Data, l2: float) -> dict[str, jax.Array]:
    """The minimiser of Σ ω_i ½ (w·x_i + b - y_i)² / Σ ω_i + ½ l2 ‖w‖², in closed form; the bias is not penalised.

        w = (X̄ᵀ Ω X̄ + l2 I)⁻¹ X̄ᵀ Ω ȳ,   b = mean(y) - w·mean(x)

    with centred X̄, ȳ, normalised weights Ω and weighted means. Differentiable in everything; an oracle for trainers.

    Args:
      data: `[n, d]` inputs, real labels `[n]`, weights; the inputs of rows of weight 0 are not read.
      l2: strength of the penalty; above 0, or 0 where the weighted inputs have full rank.

    Returns:
      `{"w": [d], "b": []}`.

    Reference: the ridge learner of Xiao et al., ICML 2015 (penalty ½‖w‖², squared loss halved).

    >>> data, truth = linear_regression(jax.random.key(0), num_rows=20, dim=3, noise=0.0)
    >>> bool(jnp.allclose(ridge_solution(data, 0.0)["w"], truth["w"], atol=1e-4))
    True
    """
    checks.at_least("l2", l2, 0)
    share = data.weight / data.weight.sum()
    present = data.weight > 0
    x = jnp.where(present[:, None], data.x, jnp.zeros_like(data.x))
    y = jnp.where(present, data.y, jnp.zeros_like(data.y))
    mean_x, mean_y = share @ x, share @ y
    x, y = x - mean_x[None, :], y - mean_y
    gram = x.T @ (share[:, None] * x) + l2 * jnp.eye(x.shape[1], dtype=x.dtype)
    w = jnp.linalg.solve(gram, x.T @ (share * y))
    return {"w": w, "b": mean_y - w @ mean_x}
