"""The transfer benchmark's own pieces, on a linear learner: who shares what, and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from benchmarks import transfer
from mlsec_jax import models


@pytest.fixture(scope="module")
def rows():
    x = jax.random.uniform(jax.random.key(1), (260, 4, 4, 1))
    return mj.dataset(x, (x.mean((1, 2, 3)) > 0.5).astype(jnp.int32))


def test_attacker_and_victim_share_the_start_alone(rows):
    parts = transfer.split(jax.random.key(0), rows, (30, 30))
    k = transfer.POINTS
    assert np.array_equal(parts.own.x[-k:], parts.victim.x[-k:])
    assert np.array_equal(parts.own.y[-k:], parts.victim.y[-k:])
    assert not parts.own.weight[-k:].any() and not parts.victim.weight[-k:].any()
    groups = [set(map(bytes, np.asarray(part.x))) for part in (*parts[2:], parts.own._replace(x=parts.own.x[:-k]))]
    victim = set(map(bytes, np.asarray(parts.victim.x[:-k])))
    assert all(not group & victim for group in groups)


def test_craft_and_judge(rows, monkeypatch):
    monkeypatch.setattr(transfer, "STEPS", 3)
    monkeypatch.setattr(transfer, "DRAWS", 2)
    learner = transfer.Learner(models.softmax_regression(num_classes=2), 0.1)
    key = jax.random.key(0)
    made = jax.jit(transfer.craft(learner, rows, (30, 30)))(key)
    assert made["poisons"].shape == made["own_gradient"].shape == (transfer.POINTS, 4, 4, 1)
    assert float(made["variance"]) > 0 and not np.array_equal(made["own_gradient"], made["victim_gradient"])
    errors = jax.jit(transfer.judge(learner, rows, (30, 30)))(key, made["poisons"][None])
    assert errors.shape == (3,) and bool(jnp.all((errors >= 0) & (errors <= 1)))
    start = transfer.split(jax.random.split(key, 4)[0], rows, (30, 30)).victim.x[None, -transfer.POINTS :]
    again = jax.jit(transfer.judge(learner, rows, (30, 30)))(key, start)
    assert again[2] == again[1] == errors[1]
