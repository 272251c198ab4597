"""Clean-label poisons by ART 1.20.1, in its own environment: `python craft_with_art.py SPEC`.

The attacks are as they come, on a `PyTorchClassifier` of the network that `craft_with_torch.py` describes. With
`"frozen": true` its parameters ask for no gradients, which ART leaves to its user.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # ART's progress bars; read when torch imports tqdm

import craft_with_torch as bare  # beside this file
import numpy as np
import torch
from art.attacks.poisoning import BullseyePolytopeAttackPyTorch, FeatureCollisionAttack
from art.estimators.classification import PyTorchClassifier
from torch import nn

from benchmarks import _served


class Part(nn.Module):
    """A part of the network as a module that ART can look into; counts its forward passes."""

    def __init__(self, fn: Callable, params: dict[str, torch.Tensor], name: str):
        super().__init__()
        own = {key: nn.Parameter(leaf) for key, leaf in params.items() if key.startswith(f"{name}/")}
        self.fn, self.leaves, self.passes = fn, nn.ParameterDict(own), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.fn(dict(self.leaves.items()), x)


def network(params: dict[str, torch.Tensor]) -> nn.Sequential:
    """The stem, the blocks, the features and a head, each a child with its name."""
    parts = {name: Part(lambda own, x, name=name: bare.block(own, name, x), params, name) for name in bare.blocks(params)}
    parts = {"stem": Part(bare.stem, params, "stem"), **parts, "features": Part(lambda own, x: bare.pool(x), {}, "")}
    return nn.Sequential(OrderedDict(**parts, head=nn.LazyLinear(10)))


def main() -> None:
    spec = json.loads(sys.argv[1])
    params, base, target = bare.begin(spec)
    net = network(params)
    net(base)  # the head learns its width
    net.requires_grad_(not spec["frozen"])
    chosen = [*bare.blocks(params), "features"][-spec["layers"] :]
    classifier = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), tuple(base.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    x, goal = (images.contiguous().numpy() for images in (base, target))
    labels, num_steps = np.eye(10, dtype=np.float32)[[0] * len(x)], spec["num_steps"]

    def craft() -> np.ndarray:
        if spec["attack"] == "bullseye":
            attack = BullseyePolytopeAttackPyTorch(
                classifier, goal, chosen, max_iter=num_steps, learning_rate=spec["learning_rate"],
                epsilon=spec["radius"], verbose=False,
            )
            return attack.poison(x, labels)[0]
        attack = FeatureCollisionAttack(
            classifier, goal, "features", learning_rate=1.0, max_iter=num_steps, stopping_tol=1e-30, verbose=False
        )
        return attack.poison(x.copy())[0]

    before = net.stem.passes
    craft()
    passes, least = net.stem.passes - before, num_steps * (len(chosen) if spec["attack"] == "bullseye" else 3)
    if passes < least:
        raise RuntimeError(f"expected at least {least} forward passes, counted {passes}: ART stopped early.")
    _served.serve(craft, Path(spec["out"]), passes=passes)


if __name__ == "__main__":
    main()
