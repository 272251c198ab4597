"""Clean-label poisons by a bare PyTorch loop, in an environment without JAX: `python craft_with_torch.py SPEC`.

What one writes who wants it fast: frozen parameters, channels last, the optimiser on the poisons alone. The network,
its weights and the images are those of `benchmarks/speed/_crafting_worker.py`.
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

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks import _served

GROUPS = 8


def conv_norm(params: dict[str, torch.Tensor], name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """A convolution, padded as SAME is in JAX, and its group normalisation."""
    kernel = params[f"{name}/w"]
    side = kernel.shape[2]
    if side == 1 or stride == 1:
        x = F.conv2d(x, kernel, stride=stride, padding=side // 2)
    else:
        x = F.conv2d(F.pad(x, (0, 1, 0, 1)), kernel, stride=stride)
    return F.group_norm(x, GROUPS, params[f"{name}/scale"], params[f"{name}/b"])


def stem(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return F.relu(conv_norm(params, "stem", x))


def block(params: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """One residual block; one with a shortcut of its own halves the sides."""
    stride = 2 if f"{name}/shortcut/w" in params else 1
    inner = F.relu(conv_norm(params, f"{name}/conv0", x, stride))
    inner = conv_norm(params, f"{name}/conv1", inner)
    return F.relu(inner + (conv_norm(params, f"{name}/shortcut", x, stride) if stride == 2 else x))


def blocks(params: dict[str, torch.Tensor]) -> list[str]:
    """The names of the blocks, in order."""
    return list(dict.fromkeys(name.partition("/")[0] for name in params if name.startswith("stage")))


def pool(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


def layers(params: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """What every block gives, and last the features `[n, d]`."""
    x, outs = stem(params, x), []
    for name in blocks(params):
        x = block(params, name, x)
        outs.append(x)
    return [*outs, pool(x)]


def images(array: np.ndarray) -> torch.Tensor:
    """`[n, h, w, c]` as `[n, c, h, w]`, laid out with the channels last."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def load(path: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """`(parameters, base images, target images)`."""
    arrays = dict(np.load(path))
    params = {}
    for name, value in arrays.items():
        if name.startswith("params/") and "/head/" not in name:
            leaf = torch.from_numpy(value)
            leaf = leaf.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf
            params[name.removeprefix("params/")] = leaf
    return params, images(arrays["base"]), images(arrays["target"])


def bullseye(layers_fn: Callable, base: torch.Tensor, target: torch.Tensor, spec: dict) -> torch.Tensor:
    """Adam on the relative distance of the mean feature, on average over the layers; projected on the box and the ball."""
    with torch.no_grad():
        aims = [layer[0] for layer in layers_fn(target)]
    low, high = (base - spec["radius"]).clamp(min=0), (base + spec["radius"]).clamp(max=1)
    poison = base.clone().requires_grad_()
    optimizer = torch.optim.Adam([poison], lr=spec["learning_rate"])
    for _ in range(spec["num_steps"]):
        optimizer.zero_grad()
        pairs = zip(aims, layers_fn(poison))
        loss = sum((aim - layer.mean(0)).norm() / aim.norm() for aim, layer in pairs) / len(aims)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            poison.clamp_(low, high)
    return poison.detach()


def collision(layers_fn: Callable, base: torch.Tensor, target: torch.Tensor, spec: dict) -> torch.Tensor:
    """Steps of constant size on each poison's relative squared distance; projected on the box and the ball."""
    with torch.no_grad():
        aim = layers_fn(target)[-1]
    low, high = (base - spec["radius"]).clamp(min=0), (base + spec["radius"]).clamp(max=1)
    poison, size = base.clone().requires_grad_(), (aim**2).sum()
    for _ in range(spec["num_steps"]):
        loss = ((layers_fn(poison)[-1] - aim) ** 2).sum() / size
        (slope,) = torch.autograd.grad(loss, poison)
        with torch.no_grad():
            poison.sub_(slope).clamp_(low, high)
    return poison.detach()


def begin(spec: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """As many threads as cores; what `load` returns, cut to size; writes features and a gradient at the starting points."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    params, base, target = load(spec["problem"])
    base, target = base[: spec["poisons"]], target[:1]
    start = base.clone().requires_grad_()
    found = layers(params, start)[-1]
    ((found**2).sum() / 2).backward()
    np.save(Path(spec["out"]).with_suffix(".features.npy"), found.detach().numpy())
    np.save(Path(spec["out"]).with_suffix(".slopes.npy"), start.grad.permute(0, 2, 3, 1).numpy())
    return params, base, target


def main() -> None:
    spec = json.loads(sys.argv[1])
    params, base, target = begin(spec)
    attack = {"bullseye": bullseye, "collision": collision}[spec["attack"]]
    craft = lambda: attack(lambda x: layers(params, x)[-spec["layers"] :], base, target, spec)
    _served.serve(lambda: craft().permute(0, 2, 3, 1).contiguous().numpy(), Path(spec["out"]))


if __name__ == "__main__":
    main()
