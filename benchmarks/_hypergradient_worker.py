"""One estimator of `hypergradients` in a process of its own: `python -m benchmarks._hypergradient_worker SPEC`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks import STARTED, _machine, _served
from mlsec_jax import bilevel, losses, models, parallel, threat
from mlsec_jax.loop import Schedule

L2 = 0.01  # of the head alone: its curvature is at least that, and a Neumann series converges


def network(name: str) -> models.Model:
    """784-100-10, or two convolutions of 8 and 16 channels under a layer of 64: 79,510 or 54,314 parameters."""
    return models.lenet(channels=(8, 16), widths=(64,)) if name == "cnn" else models.mlp(widths=(100,))


def trainer(spec: dict[str, Any], loss_fn: Callable, schedule: Schedule) -> mj.Trainer:
    """The trainer of an estimator's name."""
    rate, momentum, num_steps = spec["learning_rate"], spec["momentum"], spec["num_steps"]
    batching = lambda key, num_rows, num_steps: schedule
    family, _, option = spec["estimator"].partition("_")
    if family == "unrolled":
        return bilevel.unrolled(loss_fn, optax.sgd(rate, momentum or None), num_steps, remat=option, batching=batching)
    if family == "truncated":
        optimizer = optax.sgd(rate, momentum or None)
        return bilevel.truncated(loss_fn, optimizer, num_steps, last=num_steps // 10, batching=batching)
    if family == "forward":
        optimizer = optax.sgd(rate, momentum or None)
        return bilevel.forward(loss_fn, optimizer, num_steps, rows=spec["points"], batching=batching)
    if family == "implicit":
        solve = {
            "cholesky": bilevel.cholesky(),
            "cg": bilevel.cg(tolerance=spec["tolerance"]),
            "neumann": bilevel.neumann(200, scale=spec["scale"]),
            "nystrom": bilevel.nystrom(100, damping=L2),
        }[option]
        objective = losses.regularised(loss_fn, l2=L2, penalise=lambda path, leaf: path.startswith("head"))
        solver = bilevel.lbfgs(tolerance=spec["tolerance"])
        only_head = lambda path, leaf: path.startswith("head")
        return bilevel.implicit(objective, solver=solver, linear_solve=solve, trainable=only_head)
    return bilevel.back_gradient(
        loss_fn, rate, num_steps, momentum=momentum, reversal=spec["estimator"], batching=batching
    )


def spread_rows(loss_fn: Callable) -> Callable:
    """The same losses of a batch, its rows spread over the devices."""
    row = lambda params, row: loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row))[0]
    spread = parallel.spread(row, inner="vmap", in_axes=(None, 0))
    return lambda params, batch, key=None: spread(params, batch)


def build(spec: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[Callable[..., jax.Array], tuple]:
    """`poison -> d goal / d poison`, and the poison."""
    dtype = jnp.float64 if spec["x64"] else jnp.float32
    float_of = lambda value: jnp.asarray(value, dtype if value.dtype.kind == "f" else None)
    leaves = {name: float_of(value) for name, value in arrays.items()}
    params: dict[str, dict[str, jax.Array]] = {}
    for name, value in leaves.items():
        if name.startswith("params/"):
            _, layer, leaf = name.split("/")
            params.setdefault(layer, {})[leaf] = value
    loss_fn = losses.cross_entropy(network(spec["net"]).apply)
    goal_fn = losses.goal_loss(loss_fn)
    if spec["devices"] > 1:
        loss_fn = spread_rows(loss_fn)
    train = mj.dataset(leaves["x"], leaves["y"])
    goal = mj.dataset(leaves["goal_x"], leaves["goal_y"])
    poisons = spec["points"]
    reach = threat.perturb_rows(jnp.arange(train.num_rows - poisons, train.num_rows))

    def gradient(poison: jax.Array, rows: jax.Array, params: Any, train: mj.Data, goal: mj.Data) -> jax.Array:
        schedule = Schedule(rows, jnp.ones(rows.shape, jnp.float32))
        fit = trainer(spec, loss_fn, schedule)
        outer = lambda x: goal_fn(fit(jax.random.key(0), params, reach.embed(x, train))[0], train, goal)
        return jax.grad(outer)(poison)

    return gradient, (train.x[-poisons:], leaves["rows"], params, train, goal)


def main() -> None:
    spec = json.loads(sys.argv[1])
    _machine.choose(None, spec["devices"])
    _machine.start(None)
    jax.config.update("jax_enable_x64", spec["x64"])
    gradient, operands = build(spec, dict(np.load(spec["problem"])))
    compiled = jax.jit(gradient).lower(*operands).compile()
    memory = compiled.memory_analysis()
    facts = {"start_seconds": time.perf_counter() - STARTED}  # imports, the problem, the program compiled or read
    facts |= {} if memory is None else {"temp_mb": memory.temp_size_in_bytes / _served.MIB}
    _served.serve(lambda: np.asarray(compiled(*operands)), Path(spec["out"]), **facts)


if __name__ == "__main__":
    main()
