"""Our side of `detectors` in a process of its own: `python -m benchmarks.speed._detectors_worker SPEC`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _machine, _served


def call(spec: dict[str, Any]) -> Callable[[], np.ndarray]:
    """What is timed: features in, scores out (`[n]`; clusters: 1 where the rule of size takes a row for a poison)."""
    import jax
    import jax.numpy as jnp

    import mlsec_jax as mj
    from mlsec_jax import combine, scores

    arrays = np.load(spec["problem"])
    data = mj.dataset(jnp.asarray(arrays["x"]), jnp.asarray(arrays["y"], jnp.int32))
    num_classes = int(arrays["y"].max()) + 1
    features = lambda params, x, key=None: x
    if spec["detector"] == "spectral":
        scorer = scores.spectral(features, num_classes=num_classes, centred=spec["centred"])
        detect = lambda key, data: scorer(key, None, data, mj.Known())
    else:
        scorer = scores.activation_clusters(features, num_classes=num_classes)
        rule = combine.filter_above(scorer, threshold=1 - 0.35, reads_model=False)
        detect = lambda key, data: 1 - rule(key, data, mj.Known())[0].weight
    compiled = jax.jit(detect).lower(jax.random.key(0), data).compile()
    return lambda: np.asarray(compiled(jax.random.key(0), data))


def main() -> None:
    spec = json.loads(sys.argv[1])
    _machine.choose("cpu", 1)
    _machine.start("cpu")
    _served.serve(call(spec), Path(spec["out"]))


if __name__ == "__main__":
    main()
