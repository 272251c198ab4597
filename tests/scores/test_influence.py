"""Influence scores: the closed form on ridge, and leave-one-out retraining on logistic regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, losses, scores


def single(params, x, key=None):
    return x @ params["w"] + params["b"]


def problem(binary, n=24, d=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n + 40, d))
    y = x @ np.array([1.0, -1.0, 0.5]) + 0.7 * rng.normal(size=n + 40)
    y = (y > 0).astype(np.int32) if binary else y
    return mj.dataset(x[:n], y[:n]), mj.dataset(x[n:], y[n:])


START = lambda: {"w": jnp.zeros(3), "b": jnp.zeros(())}


def test_ridge_closed_form(x64):
    """`-∇L(holdout)ᵀ H⁻¹ (∇ℓ_i - ∇mean ℓ)`, assembled in NumPy."""
    train, holdout = problem(False)
    train = train._replace(weight=jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, 24)).at[3].set(0))
    loss_fn, lam = losses.squared(single), 0.1
    trainer = bilevel.implicit(losses.regularised(loss_fn, l2=lam))
    score = scores.influence(loss_fn, trainer)

    @jax.jit
    def both(train):
        params = trainer(None, START(), train)[0]
        return params, score(jax.random.key(0), params, train, mj.Known(holdout=holdout))

    params, ours = both(train)
    theta = np.append(np.asarray(params["w"]), params["b"])
    bar = lambda data: np.column_stack([np.asarray(data.x), np.ones(data.num_rows)])
    each = (bar(train) @ theta - np.asarray(train.y))[:, None] * bar(train)
    w = np.asarray(train.weight) / np.asarray(train.weight).sum()
    hessian = (bar(train) * w[:, None]).T @ bar(train) + lam * np.diag([1, 1, 1, 0])
    held_out = bar(holdout).T @ (bar(holdout) @ theta - np.asarray(holdout.y)) / 40
    expected = -(each - w @ each) @ np.linalg.solve(hessian, held_out)
    expected[3] = 0
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("trained", [True, False])
def test_leave_one_out_retraining(x64, trained):
    train, holdout = problem(True)
    loss_fn = losses.logistic(single)
    trainer = bilevel.implicit(losses.regularised(loss_fn, l2=0.3))
    held_out = lambda params: losses.empirical(loss_fn)(params, holdout)
    fit = jax.jit(lambda weight: held_out(trainer(None, START(), train._replace(weight=weight))[0]))
    whole = float(fit(train.weight))
    left_out = np.array([float(fit(train.weight.at[i].set(0))) - whole for i in range(24)])
    params = trainer(None, START(), train)[0] if trained else START()
    scorer = jax.jit(scores.influence(loss_fn, trainer))
    score = scorer(jax.random.key(0), params, train, mj.Known(holdout=holdout))
    assert np.corrcoef(-np.asarray(score) / 24, left_out)[0, 1] > 0.97
    assert np.sign(score[np.argmin(left_out)]) == 1  # leaving it out lowers the loss most: the most harmful row
    np.testing.assert_allclose(-np.asarray(score) / 24, left_out, atol=0.35 * np.abs(left_out).max())


def test_a_mislabelled_row_scores_highest_and_needs_a_holdout(x64):
    train, holdout = problem(True)
    loss_fn = losses.logistic(single)
    margin = np.asarray(train.x @ jnp.array([1.0, -1.0, 0.5]))
    row = int(np.argmax(np.abs(margin)))
    train = train._replace(y=train.y.at[row].set(1 - train.y[row]))
    trainer = bilevel.implicit(losses.regularised(loss_fn, l2=0.05))
    score = jax.jit(scores.influence(loss_fn, trainer))
    assert int(jnp.argmax(score(jax.random.key(0), START(), train, mj.Known(holdout=holdout)))) == row
    with pytest.raises(ValueError, match=r"known\.holdout"):
        score(jax.random.key(0), START(), train, mj.Known())
