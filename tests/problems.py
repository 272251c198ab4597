"""One small problem that every law runs on: three Gaussian classes, a softmax model, two reserved rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import mlsec_jax as mj
from mlsec_jax import losses, threat

NUM_ROWS, DIM, CLASSES, POISONS = 12, 4, 3, 2


class Problem(NamedTuple):
    """Everything a method of any kind may ask for."""

    params: dict
    train: mj.Data
    known: mj.Known
    apply_fn: object
    loss_fn: object


def apply_fn(params, x, key=None):
    """Softmax regression."""
    return x @ params["w"] + params["b"][None]


def make(dtype=jnp.float32, seed=0, target=0):
    """The problem; `target` is the class that the attacker wants."""
    x_key, goal_key, clean_key = jax.random.split(jax.random.key(seed), 3)
    centres = jnp.eye(CLASSES, DIM, dtype=dtype)
    y = jnp.arange(NUM_ROWS, dtype=jnp.int32) % CLASSES
    x = jnp.clip(centres[y] * 0.6 + 0.2 + 0.1 * jax.random.normal(x_key, (NUM_ROWS, DIM), dtype), 0, 1)
    start = mj.dataset(x[:POISONS], (y[:POISONS] + 1) % CLASSES)
    goal_x = jnp.clip(centres[jnp.full(5, (target + 1) % CLASSES)] * 0.6 + 0.2, 0, 1)
    goal_x = goal_x + 0.05 * jax.random.normal(goal_key, goal_x.shape, dtype)
    goal = mj.dataset(goal_x, jnp.full(5, target, jnp.int32))
    clean_y = jnp.arange(9, dtype=jnp.int32) % CLASSES
    clean = mj.dataset(
        jnp.clip(centres[clean_y] * 0.6 + 0.2 + 0.1 * jax.random.normal(clean_key, (9, DIM), dtype), 0, 1), clean_y
    )
    params = {"w": jnp.zeros((DIM, CLASSES), dtype), "b": jnp.zeros(CLASSES, dtype)}
    known = mj.Known(params=params, goal=goal, clean=clean, holdout=clean)
    train = threat.reserve(mj.dataset(x, y), start)
    return Problem(params, train, known, apply_fn, losses.cross_entropy(apply_fn))
