"""The Gram-matrix path against the generic implicit trainer, retraining and scikit-learn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import mlsec_jax as mj
from mlsec_jax import bilevel, losses

KEY = jax.random.key(0)
N, D, ROWS = 12, 20, np.array([2, 9])
pytestmark = pytest.mark.usefixtures("x64")
LOSSES = {"logistic": losses.logistic, "squared": losses.squared, "hinge": partial(losses.hinge, temperature=0.5)}


def problem(real):
    """Fewer rows than features; one row is absent and holds NaN."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(N, D)), rng.uniform(0.5, 2.0, N)
    x[4], weight[4] = np.nan, 0.0
    y = rng.normal(size=N) if real else (rng.normal(size=N) > 0).astype(np.int32)
    return mj.dataset(x, y, weight)


def start():
    return {"w": jnp.zeros(D), "b": jnp.zeros(())}


def outer(trained):
    rng = np.random.default_rng(5)
    return jnp.sum(jnp.tanh(bilevel.glm_apply(trained, jnp.asarray(rng.normal(size=(5, D))))))


@pytest.mark.parametrize("name", LOSSES)
def test_optimum_and_derivative_are_those_of_the_implicit_trainer_and_of_retraining(name):
    make, data = LOSSES[name], problem(name == "squared")
    other_rows = bilevel.gram(losses.present(data).x.at[ROWS].set(7.0))  # poisons elsewhere when it was computed

    def value(which, x, weight, l2):
        trainer = {
            "glm": lambda: bilevel.glm(make, l2=l2),
            "cached": lambda: bilevel.glm(make, l2=l2, known_gram=other_rows, rows=ROWS),
            "implicit": lambda: bilevel.implicit(losses.regularised(make(bilevel.glm_apply), l2=l2)),
        }[which]()
        trained, info = trainer(KEY, start(), data._replace(x=x, weight=weight))
        return outer(trained), (trained, info["stationarity"])

    point = (data.x, data.weight, jnp.asarray(0.1))
    run = {}
    for which in ("glm", "cached", "implicit"):
        by = (0, 1) if which == "implicit" else (0, 1, 2)  # `implicit` closes over λ
        run[which] = jax.jit(jax.value_and_grad(partial(value, which), argnums=by, has_aux=True))
    (_, (trained, stationarity)), gradient = run["glm"](*point)
    assert stationarity < 1e-10
    for which in ("cached", "implicit"):
        (_, (peer, _)), peer_gradient = run[which](*point)
        np.testing.assert_allclose(trained["w"], peer["w"], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(trained["b"], peer["b"], rtol=1e-8, atol=1e-9)
        for ours, theirs in zip(gradient, peer_gradient):
            np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9)
    rng, h = np.random.default_rng(1), 1e-5
    present = losses.present(data).x
    for _ in range(2):
        on_weight = np.where(np.asarray(data.weight) > 0, rng.normal(size=N), 0.0)
        move = (jnp.asarray(rng.normal(size=(N, D))), jnp.asarray(on_weight), jnp.ones(()))
        moved = [
            run["glm"](*(p + s * h * v for p, v in zip((present, *point[1:]), move)))[0][0] for s in (-2, -1, 1, 2)
        ]
        difference = (moved[0] - 8 * moved[1] + 8 * moved[2] - moved[3]) / (12 * h)
        exact = sum(float(jnp.vdot(g, v)) for g, v in zip(gradient, move))
        assert abs(exact - difference) <= 1e-6 * abs(difference)


def test_the_optimum_is_that_of_scikit_learn():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 6)), (rng.normal(size=40) > 0).astype(np.int32)
    params = {"w": jnp.zeros(6), "b": jnp.zeros(())}
    fit = jax.jit(lambda rows: bilevel.glm(losses.logistic, l2=1 / (0.7 * 40))(KEY, params, rows)[0])
    trained = fit(mj.dataset(x, y))
    peer = LogisticRegression(C=0.7, tol=1e-12, solver="newton-cholesky").fit(x, y)
    np.testing.assert_allclose(trained["w"], peer.coef_[0], atol=1e-8)
    np.testing.assert_allclose(trained["b"], peer.intercept_[0], atol=1e-8)


def test_a_warm_start_saves_steps_and_a_bad_one_does_no_harm():
    data = problem(False)
    fit = jax.jit(lambda params: bilevel.glm(losses.logistic, l2=1e-3)(KEY, params, data))
    cold, info = fit(start())
    warm, warm_info = fit(cold)
    bad, _ = fit({"w": jnp.full(D, 1e4), "b": jnp.asarray(-1e4)})
    assert int(warm_info["num_steps"]) <= 2 < int(info["num_steps"])
    for trained in (warm, bad):
        np.testing.assert_allclose(trained["w"], cold["w"], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_weight_zero_equals_absence_and_vmap_is_a_loop():
    data = problem(False)
    keep = np.flatnonzero(np.asarray(data.weight))
    fit = lambda rows: bilevel.glm(losses.logistic, l2=0.1)(KEY, start(), rows)[0]
    absent = jax.jit(fit)(data)
    removed = jax.jit(fit)(jax.tree.map(lambda leaf: leaf[keep], data))
    np.testing.assert_allclose(absent["w"], removed["w"], rtol=1e-11, atol=1e-14)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), data)
    many = many._replace(y=many.y.at[1].set(1 - many.y[1]))
    together = jax.jit(jax.vmap(fit))(many)
    np.testing.assert_allclose(together["w"][0], absent["w"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(together["w"][1], -absent["w"], rtol=1e-7, atol=1e-9)


def test_probe_shapes_and_bad_arguments():
    data = problem(False)
    shaped = {"w": jnp.zeros((D, 1)), "b": jnp.zeros(1)}
    trainer = bilevel.glm(losses.logistic, l2=0.1)
    trained, _ = jax.jit(trainer.fit)(KEY, shaped, data)
    assert trained["w"].shape == (D, 1) and trained["b"].shape == (1,)
    report = jax.jit(trainer.probe)(KEY, start(), data, {"w": jnp.ones(D), "b": jnp.ones(())})
    assert report["stationarity"] < 1e-10 and report["residual"] < 1e-10
    with pytest.raises(ValueError, match="l2: expected more than 0"):
        bilevel.glm(losses.logistic, l2=0.0)
    with pytest.raises(ValueError, match="known_gram and rows"):
        bilevel.glm(losses.logistic, l2=0.1, rows=ROWS)
    for rows in ([99], 99, [0.5]):
        with pytest.raises(ValueError, match=r"^rows: expected"):
            bilevel.glm(losses.logistic, l2=0.1, known_gram=bilevel.gram(data.x), rows=rows)(KEY, start(), data)
