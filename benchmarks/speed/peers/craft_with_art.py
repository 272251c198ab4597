"""Clean-label poisons by ART 1.20.1, in its own environment: `python craft_with_art.py SPEC`.

The attacks are as they come, on a `PyTorchClassifier` of the network that `craft_with_torch.py` describes. With
`"frozen": true` its parameters ask for no gradients, which ART leaves to its user.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # ART's progress bars; read when torch imports tqdm

import craft_with_torch as bare  # beside this file
import numpy as np
import torch
from torch import nn

from art.attacks.poisoning import BullseyePolytopeAttackPyTorch, FeatureCollisionAttack
from art.estimators.classification import PyTorchClassifier

from benchmarks import _served


class Body(nn.Module):
    """The network up to its features, as a module; counts its forward passes."""

    def __init__(self, params: dict[str, torch.Tensor]):
        super().__init__()
        self.leaves = nn.ParameterDict({name: nn.Parameter(leaf) for name, leaf in params.items()})
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return bare.features(dict(self.leaves.items()), x)


def main() -> None:
    spec = json.loads(sys.argv[1])
    params, base, target = bare.begin(spec)
    body = Body(params)
    with torch.no_grad():
        width = body(base).shape[1]
    net = nn.Sequential(OrderedDict(features=body, head=nn.Linear(width, 10)))
    net.requires_grad_(not spec.get("frozen", False))
    classifier = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), tuple(base.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    x, goal = (images.contiguous().numpy() for images in (base, target))
    labels, num_steps = np.eye(10, dtype=np.float32)[[0] * len(x)], spec["num_steps"]

    def craft() -> np.ndarray:
        if spec["attack"] == "bullseye":
            attack = BullseyePolytopeAttackPyTorch(
                classifier, goal, ["features"], max_iter=num_steps, learning_rate=spec["learning_rate"],
                epsilon=spec["radius"], verbose=False,
            )
            return attack.poison(x, labels)[0]
        attack = FeatureCollisionAttack(
            classifier, goal, "features", learning_rate=1.0, max_iter=num_steps, stopping_tol=1e-30, verbose=False
        )
        return attack.poison(x.copy())[0]

    before = body.passes
    craft()
    passes, least = body.passes - before, num_steps * (1 if spec["attack"] == "bullseye" else 3)
    if passes < least:
        raise RuntimeError(f"expected at least {least} forward passes, counted {passes}: ART stopped early.")
    _served.serve(craft, Path(spec["out"]), passes=passes)


if __name__ == "__main__":
    main()
