"""Our side of `partitions` in a process of its own: `python -m benchmarks.speed._partitions_worker SPEC`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _machine, _served

CAPACITY = 100


def linear(params: Any, x: Any, key: Any = None) -> Any:
    """Softmax regression's logits."""
    return x @ params["w"] + params["b"][None]


def mlp(params: Any, x: Any, key: Any = None) -> Any:
    """The logits of one hidden layer."""
    import jax

    return linear(params["out"], jax.nn.relu(linear(params["hidden"], x)))


def call(spec: dict[str, Any]) -> Callable[[], np.ndarray]:
    """What is timed: the ensemble trained, and its logits `[k, tests, c]`. The partitions' rows are left for the peer."""
    import jax
    import jax.numpy as jnp
    import optax

    import mlsec_jax as mj
    from mlsec_jax import bilevel, defenses, losses, train

    arrays = {name: jnp.asarray(value) for name, value in np.load(spec["problem"]).items()}
    data, num_partitions = mj.dataset(arrays["x"], arrays["y"]), spec["partitions"]
    layer = lambda w: {"w": w, "b": jnp.zeros(w.shape[1])}
    if spec["kind"] == "linear":
        apply_fn, first = linear, "w"
        start = layer(jnp.zeros((data.x.shape[1], arrays["out"].shape[1])))
    else:
        apply_fn, first = mlp, "hidden/w"
        start = {"hidden": layer(arrays["hidden"]), "out": layer(arrays["out"])}
    optimizer = optax.sgd(spec["learning_rate"], momentum=spec["momentum"])
    plain = bilevel.unrolled(losses.cross_entropy(apply_fn), optimizer, spec["num_steps"])
    trainer = plain if spec["plain"] else train.row_space(plain, lambda path, leaf: path == first)
    own = {"num_partitions": num_partitions, "capacity": CAPACITY}
    ensemble, _ = defenses.partition_aggregation(trainer, apply_fn, **own)

    def work(params: Any, data: mj.Data, tests: jax.Array) -> jax.Array:
        models, _ = ensemble(jax.random.key(0), params, data)
        return jax.lax.map(lambda model: apply_fn(model, tests), models)

    if not Path(spec["dealt"]).exists():
        itself: Callable = lambda key, params, rows: (rows, {})
        deal, _ = defenses.partition_aggregation(itself, apply_fn, **own)
        dealt, info = jax.jit(deal)(jax.random.key(0), start, data)
        assert int(info["unused"]) == 0, "a partition is larger than the capacity"
        np.savez(spec["dealt"], x=dealt.x, y=dealt.y, weight=dealt.weight)
    compiled = jax.jit(work).lower(start, data, arrays["tests"]).compile()
    return lambda: np.asarray(compiled(start, data, arrays["tests"]))


def main() -> None:
    spec = json.loads(sys.argv[1])
    _machine.choose("cpu", 1)
    _machine.start("cpu")
    _served.serve(call(spec), Path(spec["out"]))


if __name__ == "__main__":
    main()
