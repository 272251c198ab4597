"""The certified benchmark's adversaries keep to their budgets and land where they aim; both programs of the speed one agree."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from benchmarks import certified
from benchmarks.speed import _partitions_worker, partitions

SIZE = certified.Size(60, 6, 8, 20, 3, (2, 4))


def setting():
    rng = np.random.default_rng(0)
    y = np.arange(84) % 3
    x = np.clip(0.2 * rng.uniform(size=(84, 9)) + 0.6 * np.eye(3, 9)[y], 0, 1).astype(np.float32)
    weight = jnp.asarray(np.arange(64) < 60, jnp.float32)
    rows = mj.dataset(jnp.asarray(x[:64]), jnp.asarray(y[:64], jnp.int32), weight)
    return rows, mj.dataset(jnp.asarray(x[64:]), jnp.asarray(y[64:], jnp.int32))


@pytest.mark.parametrize("name", ["dpa", "ssdpa", "bag", "smooth"])
def test_adversaries_keep_to_their_budget(name):
    rows, tests = setting()
    victim = certified.victims(SIZE, 60, 3, 9)[name]
    models = victim.fit(jax.random.key(0), victim.start, rows)
    aim = certified.aims(name, victim, models, tests, 1)[0]
    assert aim.label == int(tests.y[0]) != aim.rival
    for budget in SIZE.budgets:
        poisoned = certified.attack(name, victim, models, rows, aim, budget, 0)
        changed = np.asarray(jnp.any(poisoned.x != rows.x, axis=1) | (poisoned.y != rows.y) | (poisoned.weight != rows.weight))
        assert 0 < changed.sum() <= budget
        assert (np.asarray(poisoned.y)[changed] == aim.rival).all()
        if name in ("dpa", "ssdpa"):  # each change falls into a partition of its own, and one that votes for the target
            where = {row: k for k, own in enumerate(victim.dealt(poisoned)) for row in own if row >= 0}
            hit = [where[row] for row in np.flatnonzero(changed)]
            assert len(set(hit)) == len(hit) and np.isfinite(aim.margin[hit]).all()


def test_both_programs_train_the_same_models(tmp_path):
    problem = tmp_path / "problem.npz"
    partitions.write(problem, 3, 0)
    logits = {}
    for plain in (False, True):
        spec = {"kind": "mlp", "partitions": 3, "num_steps": 4, "problem": str(problem), "plain": plain}
        spec |= {"learning_rate": 0.05, "momentum": 0.9, "dealt": str(tmp_path / "dealt.npz"), "out": str(tmp_path / "o.npy")}
        logits[plain] = _partitions_worker.call(json.loads(json.dumps(spec)))()
    np.testing.assert_allclose(logits[False], logits[True], atol=1e-4)
    assert int((np.load(tmp_path / "dealt.npz")["weight"] > 0).sum()) == 150


def test_the_peer_is_left_out_without_its_interpreter(monkeypatch):
    monkeypatch.delenv(partitions.PEER, raising=False)
    assert partitions.command("torch", {}) is None
    assert partitions.command("ours_plain", {})[-1] == '{"plain": true}'
