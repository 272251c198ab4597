"""The availability benchmark's own pieces: its smooth error, its splits, and what it does without Spambase."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from benchmarks import availability
from benchmarks.availability import Problem, Setting
from mlsec_jax import data


def test_smooth_error_tends_to_minus_the_error():
    params = {"head": {"w": jnp.ones((1, 1)), "b": jnp.zeros(1)}}
    goal = mj.dataset(jnp.array([[2.0], [-1.0], [3.0], [9.0]]), jnp.array([1, 1, 0, 0]), jnp.array([1.0, 1, 1, 0]))
    values = [float(availability.smooth_error(t)(params, None, goal)) for t in (1.0, 0.01)]
    assert values[0] == pytest.approx(-np.mean(1 / (1 + np.exp([2.0, -1.0, -3.0]))), rel=1e-6)
    assert values[1] == pytest.approx(-2 / 3, rel=1e-6)
    assert float(availability.error(params, goal)) == pytest.approx(2 / 3, rel=1e-6)


@pytest.mark.parametrize("as_published", [False, True])
def test_two_poisons_of_a_blob(as_published):
    key = jax.random.key(0)
    x = jax.random.uniform(key, (60, 3))
    rows = mj.dataset(x, (x[:, 0] > 0.5).astype(jnp.int32))
    problem = Problem("", rows, (20, 20, 20), 2, (1, 2), 0.5, 0.3)
    setting = Setting(0.5, 20, as_published, 6)
    found = jax.jit(availability.attack_one(problem, setting, (2,) if as_published else (1, 2)))(key)
    num_budgets = 1 if as_published else 2
    assert found["poisoned"].shape == (num_budgets, 2) and found["clean"].shape == (2,)
    assert found["poisons"].shape == (2, 3)
    assert float(found["poisons"].min()) >= 0 and float(found["poisons"].max()) <= 1
    figures = availability.figures_of(
        problem._replace(budgets=(2,) if as_published else (1, 2)),
        {name: np.asarray(value)[None] for name, value in found.items()},
    )
    assert figures["poison_fraction"] == 2 / 22
    assert figures["error_poisoned"] == pytest.approx(float(found["poisoned"][-1, 0]))


def test_without_spambase_small_says_so_and_full_raises(monkeypatch):
    monkeypatch.delenv("MLSEC_JAX_DATA", raising=False)
    images = np.zeros((6, 28, 28), np.uint8), np.array([1, 7, 1, 7, 1, 7])
    monkeypatch.setattr(data, "mnist5k", lambda: images)
    monkeypatch.setattr(data, "load", lambda name, split: images)
    problems, reductions = availability.load("small")
    assert [problem.prefix for problem in problems] == [""]
    assert "MLSEC_JAX_DATA" in reductions[-1] and not any("rounds them" in text for text in reductions)
    with pytest.raises(FileNotFoundError, match="MLSEC_JAX_DATA"):
        availability.load("full")
