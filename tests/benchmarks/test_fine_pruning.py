"""The benchmark of fine-pruning: who sees which rows, where the glasses go, which learning rate is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from benchmarks import fine_pruning
from mlsec_jax import channels, models

LINEAR = models.softmax_regression(num_classes=2)


def task(holdout):
    """A linear task of two classes that only its holdout matters to."""
    layer = channels.layer("head", lambda params, x: LINEAR.apply(params, x))
    known = mj.Known(clean=holdout, holdout=holdout)
    recipe = fine_pruning.Recipe(1, 2, (0.1, 0.2, 0.3))
    return fine_pruning.Task(LINEAR, layer, 2, holdout, known, holdout, None, recipe, recipe, ())


def test_the_largest_rate_within_the_budget_is_taken():
    rows = mj.dataset(jnp.array([[-1.0], [1.0]]), jnp.array([0, 1]))
    right = {"head": {"w": jnp.array([[-1.0, 1.0]]), "b": jnp.zeros(2)}}
    tuned = lambda rate: jax.tree.map(lambda leaf: jnp.where(rate < 0.25, leaf, -leaf), right)
    _, rate = fine_pruning.largest_rate(task(rows), right, tuned)
    assert float(rate) == pytest.approx(0.2)
    wrong = lambda rate: jax.tree.map(lambda leaf: -leaf + 0 * rate, right)
    assert float(fine_pruning.largest_rate(task(rows), right, wrong)[1]) == pytest.approx(0.1)


def test_defenders_rank_and_stop_on_different_rows():
    rows = mj.dataset(jnp.arange(5.0)[:, None], jnp.zeros(5, jnp.int32))
    known = fine_pruning.defenders(rows, 4)
    assert known.clean.x.ravel().tolist() == [0, 1, 2, 3] and known.holdout.x.ravel().tolist() == [4]


@pytest.mark.parametrize("side", [1, 2, 4])
def test_glasses_darken_the_eyes_and_nothing_else(side):
    white = jnp.ones((1, 112 // side, 92 // side, 1))
    worn = np.asarray(fine_pruning.glasses(side)(None, white))[0, :, :, 0]
    assert worn.mean() == pytest.approx(1 - (2 * 12 * 20 + 3 * 12) / (112 * 92), abs=1e-6)
    assert (worn[: 44 // side] == 1).all() and (worn[56 // side :] == 1).all()


def test_faces_are_split_by_image(monkeypatch, tmp_path):
    monkeypatch.setenv("MLSEC_JAX_DATA", str(tmp_path))
    assert fine_pruning.faces(fine_pruning.SIZES["small"]) is None
    labels = np.repeat(np.arange(40), 10).astype(np.uint8)
    number = np.tile(np.arange(10), 40).astype(np.uint8)
    images = np.broadcast_to(number[:, None, None], (400, 112, 92))
    np.savez(tmp_path / "att_faces.npz", images=images, labels=labels)
    found = fine_pruning.faces(fine_pruning.SIZES["small"])
    parts = (found.train, found.known.clean, found.known.holdout, found.test)
    seen = [sorted({round(255 * v) for v in part.x[:, 0, 0, 0].tolist()}) for part in parts]
    assert seen == [[0, 1, 2, 3], [4, 5, 6], [7], [8, 9]]
    assert all(sorted(set(part.y.tolist())) == list(range(40)) for part in parts)


def test_rows_are_operands_of_what_is_compiled():
    rows = mj.dataset(jnp.array([[-1.0], [1.0]]), jnp.array([0, 1]))
    count = lambda task, by: by * (jnp.sum(task.known.clean.x) + task.test.x.shape[0])
    assert float(fine_pruning.with_rows(task(rows), count)(3.0)) == 6
