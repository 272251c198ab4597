"""Is this derivative right? The question every bilevel attack should be asked once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, tree
from mlsec_jax.base import Data, Key, OuterFn, Params, Trainer


def diagnose(
    trainer: Any,
    key: Key,
    params: Params,
    data: Data,
    *,
    outer: OuterFn,
    goal: Any,
    rows: Any,
    num_directions: int = 4,
    step: float = 1e-5,
) -> dict[str, jax.Array]:
    """Compares a trainer's derivative with central differences, for which it retrains `2 · num_directions` times.

    Random directions u move the inputs of `rows`; `(F(x + h u) - F(x - h u)) / 2h` is set against `⟨∇F, u⟩`. Use
    float64: in float32 the differences themselves carry an error of about `1e-7 |F| / h`.

    Args:
      trainer: a `Trainer`, or a plain function of its signature.
      key: split into the key of training and the key of the directions.
      params: initial parameters.
      data: the training set as the victim sees it (poisons embedded).
      outer: `(params, data, goal) -> scalar`.
      goal: what `outer` reads.
      rows: `[k]`, the rows whose inputs move, or an integer k for the last k.
      num_directions: static.
      step: h.

    Returns:
      A dict: `cosine` between the two lists of slopes; `rel_error`, `‖difference‖ / ‖central differences‖`;
      `crossed`, whether any difference crossed a change of the trainer's mask or active set (then the two need not
      agree); and what the trainer says of itself at `data`: `stationarity`, `residual`, `drift`, `pattern`, `overflow`.
    """
    checks.count("num_directions", num_directions, 1)
    checks.above("step", step, 0)
    train_key, direction_key = jax.random.split(key)
    chosen = checks.rows("rows", rows)
    checks.rows_within("rows", chosen, data.num_rows)
    data = jax.tree.map(jnp.asarray, data)
    start = tree.take(data.x, chosen)
    probe = trainer.probe if isinstance(trainer, Trainer) else (lambda *args: {})

    def with_rows(x: Any) -> Data:
        return data._replace(x=tree.put(data.x, chosen, x))

    def value(x: Any) -> jax.Array:
        moved = with_rows(x)
        return outer(trainer(train_key, params, moved)[0], moved, goal)

    def report(x: Any) -> dict[str, jax.Array]:
        moved = with_rows(x)
        trained, _ = trainer(train_key, params, moved)
        cotangent = jax.grad(lambda p: outer(p, moved, goal), allow_int=True)(trained)
        return probe(train_key, params, moved, cotangent)

    gradient = jax.grad(value)(start)
    here = report(start)

    def along(k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = iter(jax.random.split(jax.random.fold_in(direction_key, k), len(jax.tree.leaves(start))))
        u = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, leaf.dtype), start)
        ahead, behind = tree.add_scaled(start, step, u), tree.add_scaled(start, -step, u)
        crossed = jnp.asarray(False)
        if "pattern" in here:
            patterns = [report(x)["pattern"] for x in (ahead, behind)]
            crossed = jnp.any(jnp.stack([jnp.any(p != here["pattern"]) for p in patterns]))
        slope = tree.dot(gradient, u)
        return ((value(ahead) - value(behind)) / (2 * step)).astype(slope.dtype), slope, crossed

    differences, slopes, crossed = jax.lax.map(along, jnp.arange(num_directions))
    return {
        "cosine": tree.cosine(differences, slopes),
        "rel_error": tree.norm(differences - slopes) / tree.norm(differences),
        "crossed": jnp.any(crossed),
        **here,
    }
