"""One small problem that every law runs on: three Gaussian classes, a softmax model, two reserved rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import mlsec_jax as mj
from mlsec_jax import losses, threat

NUM_ROWS, DIM, CLASSES, POISONS = 12, 4, 3, 2


class Problem(NamedTuple):
    """Everything a method of any kind may ask for; `reserved` and `touched` are rows of `train`."""

    params: dict
    train: mj.Data
    known: mj.Known
    apply_fn: object
    loss_fn: object
    reserved: jax.Array
    touched: jax.Array


def apply_fn(params, x, key=None):
    """Softmax regression."""
    return x @ params["w"] + params["b"][None]


def make(dtype=jnp.float32, seed=0, target=0, absent=0):
    """The problem; `target` is the class that the attacker wants, `absent` rows of weight 0 and NaN come first."""
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
    if absent:
        nothing = mj.dataset(jnp.full((absent, DIM), jnp.nan, dtype), jnp.zeros(absent, y.dtype), jnp.zeros(absent, dtype))
        train = jax.tree.map(lambda *parts: jnp.concatenate(parts), nothing, train)
    reserved = jnp.arange(NUM_ROWS, NUM_ROWS + POISONS) + absent
    touched = jnp.array([0, 4, 7]) + absent
    return Problem(params, train, known, apply_fn, losses.cross_entropy(apply_fn), reserved, touched)


def binary(problem):
    """The same rows as a two-class problem with one logit (labels 0 and 1)."""
    apply = lambda params, x, key=None: x @ params["w"] + params["b"]
    to_two = lambda data: data._replace(y=(data.y > 0).astype(jnp.int32))
    params = {"w": problem.params["w"][:, 0], "b": problem.params["b"][0]}
    known = problem.known.replace(
        params=params,
        goal=to_two(problem.known.goal),
        clean=to_two(problem.known.clean),
        holdout=to_two(problem.known.holdout),
    )
    return problem._replace(
        params=params, train=to_two(problem.train), known=known, apply_fn=apply, loss_fn=losses.logistic(apply)
    )


def regression(problem):
    """The same rows with real labels and a linear model."""
    problem = binary(problem)
    truth = jnp.asarray([0.7, 0.0, -0.4, 0.0], problem.train.x.dtype)
    shift = 0.3 * problem.known.goal.y[0].astype(truth.dtype)
    label = lambda data: data._replace(y=jnp.nan_to_num(data.x) @ truth)
    known = problem.known.replace(goal=label(problem.known.goal)._replace(y=label(problem.known.goal).y + shift + 0.1))
    return problem._replace(train=label(problem.train), known=known, loss_fn=losses.squared(problem.apply_fn))


def images(problem):
    """The same rows as images of 2x2 with one channel, and a softmax model of them with weights."""
    to_images = lambda data: data._replace(x=data.x.reshape(-1, 2, 2, 1))
    params = {"w": jnp.cos(jnp.arange(DIM * CLASSES, dtype=problem.train.x.dtype)).reshape(DIM, CLASSES)}
    return problem._replace(train=to_images(problem.train), params=params, known=problem.known.replace(params=params))
