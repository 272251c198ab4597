"""The crafting benchmark counts as the literature does, starts whom it can, and both programs of ours compute the same."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.speed import _crafting_worker, crafting
from benchmarks.speed.crafting import Setting


def problem(tmp_path, width):
    path = tmp_path / f"w{width}.npz"
    _crafting_worker.write({"write": str(path), "width": width, "seed": 0, "targets": 3})
    return path


def spec(path, **changes):
    base = {"attack": "bullseye", "poisons": 3, "width": 8, "num_steps": 2, "layers": 2, "targets": 1, "devices": 1}
    return base | {"problem": str(path), "out": str(path.with_suffix(".npy")), "radius": 0.1, "learning_rate": 0.01} | changes


def test_flops_are_those_of_resnet18():
    leaves = {"params/stem/w": (3, 3, 3, 64)}
    for stage in range(4):
        size = 64 * 2**stage
        for block in range(2):
            first = size // 2 if stage and not block else size
            leaves[f"params/stage{stage}_block{block}/conv0/w"] = (3, 3, first, size)
            leaves[f"params/stage{stage}_block{block}/conv1/w"] = (3, 3, size, size)
        if stage:
            leaves[f"params/stage{stage}_block0/shortcut/w"] = (1, 1, size // 2, size)
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in leaves.items()}
    assert crafting.flops(arrays) / 4 == pytest.approx(0.5559e9, rel=1e-3)  # multiply-adds of one forward pass


def test_the_problem_is_that_of_the_network(tmp_path):
    arrays = dict(np.load(problem(tmp_path, 8)))
    assert arrays["base"].shape == (20, 32, 32, 3) and arrays["target"].shape == (3, 32, 32, 3)
    shapes = jax.eval_shape(lambda key: _crafting_worker.network(8).init(key, (32, 32, 3)), jax.random.key(0))
    assert jax.tree.map(np.shape, _crafting_worker.nested(arrays)) == jax.tree.map(lambda leaf: leaf.shape, shapes)


@pytest.mark.slow  # compiles three programs of a ResNet-18
def test_a_target_gets_the_same_poisons_alone_and_among_others(tmp_path):
    path = problem(tmp_path, 8)
    alone, among = (_crafting_worker.call(spec(path, targets=number))() for number in (1, 3))
    np.testing.assert_allclose(among[0], alone, atol=2e-3)  # Adam's signs
    assert 0 < np.abs(alone - np.load(path)["base"][:3]).max() <= 0.1 + 1e-6
    assert np.abs(among[1] - among[0]).mean() > 1e-3


def test_peers_without_an_interpreter_are_left_out(monkeypatch):
    setting = Setting("bullseye", 5, 16, 1, ("pass", "art", "targets_4"))
    monkeypatch.delenv("MLSEC_JAX_ART_PYTHON", raising=False)
    monkeypatch.setenv("MLSEC_JAX_PEERS_PYTHON", "python-with-torch")
    found = crafting.contestants(setting, spec(crafting.Path("p.npz")), "all")
    assert set(found) == {"matmul", "ours", "spread", "torch", "pass", "targets_4"}
    assert found["torch"][0] == "python-with-torch" and found["torch"][1].endswith("peers/craft_with_torch.py")
    assert json.loads(found["targets_4"][3])["targets"] == 4 and json.loads(found["pass"][3])["attack"] == "pass"


def test_gates_ask_more_of_the_narrow_network():
    found = {"bullseye_5_w16": {"over_torch": 1.2, "over_art": 0.2}, "bullseye_5_w64": {"over_torch": 1.2}}
    assert crafting.gates(found) == {
        "bullseye_5_w16.over_torch": False,
        "bullseye_5_w16.over_art": True,
        "bullseye_5_w64.over_torch": True,
    }


def test_different_features_are_refused(tmp_path):
    setting = Setting("collision", 1, 8, 1)
    for who, value in (("ours", 1.0), ("torch", 1.001)):
        for figure in ("features", "slopes"):
            np.save(tmp_path / f"x-{who}.{figure}.npy", np.full(3, value))
    with pytest.raises(RuntimeError, match="expected equal features"):
        crafting.agreement(setting, {"out": str(tmp_path / "x")}, ["ours", "torch"])


@pytest.mark.slow
@pytest.mark.skipif("MLSEC_JAX_PEERS_PYTHON" not in os.environ, reason="names the interpreter that has PyTorch")
def test_figures_of_a_tiny_setting(tmp_path):
    arguments = ["--cores", "one", "--only", "collision_1_w16", "--turns", "1", "--scale", "0.02", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks.speed.crafting", *arguments], check=True)
    found = json.loads((tmp_path / "crafting.json").read_text())["one"]["collision_1_w16"]
    assert found["features_apart"] < 1e-4 and found["slopes_apart"] < 1e-3
    assert 0 < found["of_matmul"] < 1.2 and found["over_torch"] > 0
