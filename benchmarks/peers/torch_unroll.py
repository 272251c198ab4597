"""The peers' hypergradient through momentum SGD: plain PyTorch, or TorchOpt. Runs in an environment without JAX.

    python benchmarks/peers/torch_unroll.py '{"estimator": "torch", "problem": "problem.npz", "out": "out.npy", ...}'

The problem's weights, data, batches and momentum convention (`v <- mu v + g`, `w <- w - rate v`) are those of
`benchmarks/_hypergradient_worker.py`; the unrolled graph is PyTorch's own (`create_graph=True`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import _served


def apply(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The logits: `[convolution, relu, mean of 2 x 2]`s if the problem has any, then one hidden layer and the head."""
    for i in range(sum(name.startswith("conv") for name in params) // 2):
        x = F.avg_pool2d(F.relu(F.conv2d(x, params[f"conv{i}/w"], params[f"conv{i}/b"], padding="same")), 2)
    if x.ndim == 4:
        x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
    hidden = F.relu(torch.addmm(params["layer0/b"], x, params["layer0/w"]))
    return torch.addmm(params["head/b"], hidden, params["head/w"])


def load(path: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`(params, the rest)`; images `[n, h, w, c]` become `[n, c, h, w]`, kernels `[h, w, c, o]` `[o, c, h, w]`."""
    arrays = dict(np.load(path))
    params, rest = {}, {}
    for name, value in arrays.items():
        tensor = torch.from_numpy(value)
        if value.ndim == 4:
            tensor = tensor.permute((3, 2, 0, 1) if name.startswith("params/") else (0, 3, 1, 2)).contiguous()
        tensor = tensor.long() if value.dtype.kind == "i" else tensor
        if name.startswith("params/"):
            params[name.removeprefix("params/")] = tensor
        else:
            rest[name] = tensor
    return params, rest


def train_plain(params: list[torch.Tensor], rate: float, momentum: float, gradient: Callable, num_steps: int):
    velocity = [torch.zeros_like(leaf) for leaf in params]
    for t in range(num_steps):
        slope = gradient(params, t)
        velocity = [momentum * v + g for v, g in zip(velocity, slope)]
        params = [w - rate * v for w, v in zip(params, velocity)]
    return params


def train_torchopt(params: Any, rate: float, momentum: float, gradient: Callable, num_steps: int):
    import torchopt

    optimizer = torchopt.sgd(rate, momentum=momentum, moment_requires_grad=True)
    params = tuple(params)
    state = optimizer.init(params)
    for t in range(num_steps):
        updates, state = optimizer.update(tuple(gradient(params, t)), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return list(params)


def main() -> None:
    spec = json.loads(sys.argv[1])
    params, problem = load(spec["problem"])
    names, first = list(params), list(params.values())
    poison = problem["x"][-spec["points"] :].clone().requires_grad_()
    clean = problem["x"][: -spec["points"]]
    train = {"torch": train_plain, "torchopt": train_torchopt}[spec["estimator"]]

    def gradient_of_poison() -> np.ndarray:
        x, y = torch.cat([clean, poison]), problem["y"]

        def gradient(leaves: list[torch.Tensor], t: int) -> tuple[torch.Tensor, ...]:
            rows = problem["rows"][t]
            loss = F.cross_entropy(apply(dict(zip(names, leaves)), x[rows]), y[rows])
            return torch.autograd.grad(loss, leaves, create_graph=True)

        start = [leaf.clone().requires_grad_() for leaf in first]
        last = train(start, spec["learning_rate"], spec["momentum"], gradient, spec["num_steps"])
        goal = F.cross_entropy(apply(dict(zip(names, last)), problem["goal_x"]), problem["goal_y"])
        found = torch.autograd.grad(goal, poison)[0]
        return (found.permute(0, 2, 3, 1) if found.ndim == 4 else found).numpy()

    _served.serve(gradient_of_poison, Path(spec["out"]))


if __name__ == "__main__":
    main()
