"""Poisoned ridge, LASSO and elastic net: the closed form of Xiao et al., harm, and feature stability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses, threat
from tests.attacks.linear_models import single

N, D = 20, 5


def problem(seed=0, n=N, d=D, dtype=np.float64):
    rng = np.random.default_rng(seed)
    truth = np.zeros(d)
    truth[: d // 2] = rng.normal(size=d // 2) + np.sign(rng.normal(size=d // 2))
    x = rng.uniform(size=(3 * n, d))
    y = x @ truth + 0.1 * rng.normal(size=3 * n)
    x, y = x.astype(dtype), y.astype(dtype)
    return x[:n], y[:n], x[n:], y[n:]


def attack_of(l1, l2, step_size=0.1):
    return attacks.linear_regression(
        single, l1=l1, l2=l2, threat=threat.append_rows(1), optimizer=attacks.unit_rows(step_size)
    )


def paper_gradient(x, y, xc, yc, xh, yh, w, b, lam, rho):
    """∇_{x_c} W by the (d + 1) system of the paper, restricted to the active set; x holds the poison already."""
    n = len(y)
    on = np.flatnonzero(w) if rho > 0 else np.arange(len(w))
    xs, ws = x[:, on], w[on]
    system = np.block([[xs.T @ xs / n + lam * (1 - rho) * np.eye(len(on)), xs.mean(0)[:, None]], [xs.mean(0)[None], 1]])
    residual = w @ xc + b - yc
    mixed = np.outer(xc[on], w) + residual * np.eye(len(w))[on]
    jacobian = np.linalg.solve(system, -np.vstack([mixed, w[None]]) / n)  # [active + 1, d]
    error = xh @ w + b - yh
    r = rho * np.sign(ws) + (1 - rho) * ws
    return (error @ xh[:, on] / len(yh) + lam * r) @ jacobian[:-1] + error.mean() * jacobian[-1]


@pytest.mark.parametrize("lam, rho", [(0.05, 0.0), (0.02, 1.0), (0.02, 0.5)])
def test_gradient_is_the_papers_closed_form(x64, lam, rho):
    x, y, xh, yh = problem()
    xc, yc = np.full(D, 0.6), np.array([3.0])
    subject = threat.reserve(mj.dataset(x, y), mj.dataset(xc[None], yc))
    trainer = bilevel.implicit(losses.regularised(losses.squared(single), l1=lam * rho, l2=lam * (1 - rho)))
    start = {"w": jnp.zeros(D), "b": jnp.zeros(())}
    known = mj.Known(params=start, goal=mj.dataset(xh, yh))
    attack = attack_of(lam * rho, lam * (1 - rho), 1e-3)

    @jax.jit
    def one_step():
        state = attack.init(jax.random.key(0), subject, known)
        after, info = attack.step(jax.random.key(0), state, subject, known)
        full = threat.append_rows(1).embed(state.poison, subject)
        return after.poison - state.poison, info, trainer(jax.random.key(0), start, full)[0]

    moved, info, params = one_step()
    w, b = np.asarray(params["w"]), float(params["b"])
    joined, labels = np.vstack([x, xc[None]]), np.append(y, yc)
    expected = paper_gradient(joined, labels, xc, yc[0], xh, yh, w, b, lam, rho)
    assert rho == 0 or 0 < np.count_nonzero(w) < D
    np.testing.assert_allclose(info["gradient_norm"], np.linalg.norm(expected), rtol=1e-6)
    np.testing.assert_allclose(moved[0], 1e-3 * expected / np.linalg.norm(expected), rtol=1e-5, atol=1e-10)
    value = np.mean((xh @ w + b - yh) ** 2) / 2 + lam * (rho * np.abs(w).sum() + (1 - rho) / 2 * w @ w)
    np.testing.assert_allclose(-info["outer"], value, rtol=1e-9)


def kuncheva(supports, k, d):
    """The mean pairwise consistency `(r d - k²) / (k (d - k))` of top-k supports; 1 = the same, 0 = chance."""
    pairs = [(a, b) for i, a in enumerate(supports) for b in supports[:i]]
    return np.mean([(len(a & b) * d - k * k) / (k * (d - k)) for a, b in pairs])


@pytest.mark.parametrize("l1, l2", [(0.02, 0.0), (0.0, 0.02)])
def test_poisons_raise_the_error_above_the_start(l1, l2):
    x, y, xh, yh = problem(1, n=40, d=8, dtype=np.float32)
    subject = threat.reserve(mj.dataset(x, y), mj.dataset(x[:4], 4 - y[:4]))
    attack = attacks.linear_regression(
        single, l1=l1, l2=l2, threat=threat.append_rows(4), optimizer=attacks.unit_rows(0.3)
    )
    known = mj.Known(params={"w": jnp.zeros(8), "b": jnp.zeros(())}, goal=mj.dataset(xh, yh))
    _, infos = jax.jit(lambda k: combine.run(attack, jax.random.key(0), subject, k, num_steps=15))(known)
    assert infos["outer"][-1] < 1.2 * infos["outer"][0] < 0


def test_poisons_unsettle_what_lasso_selects(x64):
    """Kuncheva's index of the top-3 support between clean and poisoned fits falls with the number of poisons."""
    d, k = 10, 3
    objective = losses.regularised(losses.squared(single), l1=0.03)
    trainer = bilevel.implicit(objective)
    attack = attacks.linear_regression(single, l1=0.03, threat=threat.append_rows(4), optimizer=attacks.unit_rows(0.3))
    start = {"w": jnp.zeros(d), "b": jnp.zeros(())}

    @jax.jit
    def supports(x, y, goal):
        subject = threat.reserve(mj.dataset(x, y), mj.dataset(x[:4], y.max() + y.min() - y[:4]))
        state, _ = combine.run(attack, jax.random.key(0), subject, mj.Known(params=start, goal=goal), num_steps=10)
        return [trainer(jax.random.key(0), start, data)[0]["w"] for data in (subject, attack.read(state, subject))]

    stability = []
    for seed in range(3):
        x, y, xh, yh = problem(seed, n=40, d=d)
        tops = [set(np.argsort(-np.abs(np.asarray(w)))[:k]) for w in supports(x, y, mj.dataset(xh, yh))]
        stability.append(kuncheva(tops, k, d))
    assert kuncheva([{0, 1, 2}] * 2, k, d) == 1.0
    assert np.mean(stability) < 0.9, stability
