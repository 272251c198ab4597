"""One model a partition by a PyTorch loop, in an environment without JAX: `python partitions_with_torch.py SPEC`.

The rows of the partitions are those that our side dealt, padding left out, so every model trains on its own rows alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks import _served


def model(kind: str, arrays: dict[str, np.ndarray]) -> nn.Module:
    """The network with the weights that everyone starts from, in PyTorch's order `[out, in]`."""
    zeros = np.zeros((arrays["x"].shape[1], arrays["out"].shape[1]), np.float32)
    weights = [arrays["hidden"], arrays["out"]] if kind == "mlp" else [zeros]
    layers: list[nn.Module] = []
    for weight in weights:
        layer = nn.Linear(*weight.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight.T))
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def call(spec: dict) -> Callable[[], np.ndarray]:
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    arrays, dealt = dict(np.load(spec["problem"])), dict(np.load(spec["dealt"]))
    there = [weight > 0 for weight in dealt["weight"]]
    rows = [torch.from_numpy(x[keep]) for x, keep in zip(dealt["x"], there)]
    labels = [torch.from_numpy(y[keep].astype(np.int64)) for y, keep in zip(dealt["y"], there)]
    tests = torch.from_numpy(arrays["tests"])

    def train() -> np.ndarray:
        logits = []
        for x, y in zip(rows, labels):
            net = model(spec["kind"], arrays)
            optimizer = torch.optim.SGD(net.parameters(), lr=spec["learning_rate"], momentum=spec["momentum"])
            for _ in range(spec["num_steps"]):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                logits.append(net(tests).numpy())
        return np.stack(logits)

    return train


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    _served.serve(call(spec), Path(spec["out"]))
