"""Our side of `crafting` in a process of its own: `python -m benchmarks.speed._crafting_worker SPEC`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _machine, _served


def network(width: int) -> Any:
    """ResNet-18 for 32x32 images, with group norm, at the given width."""
    from mlsec_jax import models

    return models.resnet(width=width, blocks=(2, 2, 2, 2))


def write(spec: dict[str, Any]) -> None:
    """Weights, 20 base images and some targets (coarse coloured squares under noise), for every framework."""
    import jax

    rng = np.random.default_rng(spec["seed"])

    def images(number: int) -> np.ndarray:
        squares = rng.uniform(size=(number, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
        return (0.8 * squares + 0.2 * rng.uniform(size=squares.shape)).astype(np.float32)

    key = jax.random.key(spec["seed"])
    params = jax.jit(lambda key: network(spec["width"]).init(key, (32, 32, 3)))(key)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {"params/" + "/".join(key.key for key in keys): np.asarray(leaf) for keys, leaf in leaves}
    arrays |= {"base": images(20), "target": images(spec["targets"])}
    np.savez(spec["write"], **arrays)  # type: ignore[arg-type]


def nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """`{"params/a/b": leaf}` as the pytree `{"a": {"b": leaf}}`."""
    import jax.numpy as jnp

    params: dict[str, Any] = {}
    for name in (name for name in arrays if name.startswith("params/")):
        node = params
        *path, last = name.split("/")[1:]
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(arrays[name])
    return params


def program(spec: dict[str, Any], features_fn: Callable) -> Callable:
    """`(params, subject, goal, key) -> poisons [k, ...]` after the given number of iterations on one target."""
    import jax
    import jax.numpy as jnp
    import optax

    import mlsec_jax as mj
    from mlsec_jax import attacks, combine, threat

    k = spec["poisons"]
    if spec["attack"] == "pass":  # what an iteration cannot do without: the features, and a gradient of the inputs

        def passes(params: Any, subject: mj.Data, goal: mj.Data, key: jax.Array) -> jax.Array:
            del goal, key
            slope = jax.grad(lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(features_fn(params, x))))
            body = lambda x, _: (x - 1e-6 * slope(x), None)
            return jax.lax.scan(body, subject.x[:k], None, length=spec["num_steps"])[0]

        return passes
    reach = threat.perturb_rows(jnp.arange(k), radius=spec["radius"])
    if spec["attack"] == "bullseye":
        optimizer = optax.adam(spec["learning_rate"])
        attack = attacks.bullseye_polytope(features_fn, threat=reach, optimizer=optimizer)
    else:
        attack = attacks.feature_collision(features_fn, threat=reach)

    def craft(params: Any, subject: mj.Data, goal: mj.Data, key: jax.Array) -> jax.Array:
        known = mj.Known(params=params, goal=goal)
        return combine.run(attack, key, subject, known, num_steps=spec["num_steps"])[0].poison

    return craft


def call(spec: dict[str, Any]) -> Callable[[], np.ndarray]:
    """What is timed. The starting points' features, and a gradient there, are written beside the result."""
    import jax
    import jax.numpy as jnp

    import mlsec_jax as mj
    from mlsec_jax import parallel

    if spec["attack"] == "matmul":
        square = jax.random.normal(jax.random.key(0), (spec["side"], spec["side"]))
        product = jax.jit(jnp.dot)
        return lambda: np.asarray(product(square, square)[:1])
    arrays = dict(np.load(spec["problem"]))
    params, model = nested(arrays), network(spec["width"])
    zeros = lambda n: jnp.zeros(n, jnp.int32)
    subject, targets = mj.dataset(arrays["base"], zeros(len(arrays["base"]))), arrays["target"][: spec["targets"]]
    half_square = lambda x: (jnp.sum((out := model.features(params, x)) ** 2) / 2, out)
    slopes, features = jax.jit(jax.grad(half_square, has_aux=True))(subject.x[: spec["poisons"]])
    np.save(Path(spec["out"]).with_suffix(".features.npy"), features)
    np.save(Path(spec["out"]).with_suffix(".slopes.npy"), slopes)
    goals = mj.dataset(targets[:, None], jnp.zeros((len(targets), 1), jnp.int32))._replace(weight=jnp.ones((len(targets), 1)))
    layers = lambda params, x, key=None: model.layers(params, x, key)[-spec["layers"] :]
    keys = jax.random.split(jax.random.key(0), len(targets))
    if len(targets) == 1 and spec["devices"] > 1:  # the rows of the one batch are spread; else the targets are
        row = lambda params, x: jax.tree.map(lambda leaf: leaf[0], layers(params, x[None]))
        over_rows = parallel.spread(row, inner="vmap", in_axes=(None, 0))
        craft = program(spec, lambda params, x, key=None: over_rows(params, x))
    else:
        craft = program(spec, layers)
    if len(targets) == 1:
        first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
        run, operands = craft, (params, subject, first(goals), keys[0])
    else:
        run = parallel.spread(craft, inner="map", in_axes=(None, None, 0, 0))
        operands = (params, subject, goals, keys)
    compiled = jax.jit(run).lower(*operands).compile()
    return lambda: np.asarray(compiled(*operands))


def main() -> None:
    spec = json.loads(sys.argv[1])
    _machine.choose("cpu", spec["devices"])
    _machine.start("cpu")
    if "write" in spec:
        return write(spec)
    _served.serve(call(spec), Path(spec["out"]))


if __name__ == "__main__":
    main()
