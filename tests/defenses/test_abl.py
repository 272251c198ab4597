"""Anti-backdoor learning: its gradients in closed form, the isolated rows, and a backdoor that is forgotten."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, defenses, losses

KEY = jax.random.key(0)
HALF = lambda params, data, key=None: (data.x[:, 0] - params) ** 2 / 2  # the gradient at params is -(x - params)
ONE = mj.dataset(jnp.array([[2.0], [4.0]]), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(("level", "sign"), [(4.9, 1), (5.1, -1)])
def test_flooding_turns_round_at_its_level(level, sign):
    """The mean loss at 0 is (2 + 8) / 2 = 5, its slope -3: that of LGA and of flooding, in closed form and by JAX."""
    ours = defenses.flooding(level)(KEY, HALF, jnp.float32(0), ONE)
    np.testing.assert_allclose(ours, -3 * sign)
    mean = lambda p: losses.empirical(HALF)(p, ONE)
    for whole in (lambda p: jnp.sign(mean(p) - level) * mean(p), lambda p: jnp.abs(mean(p) - level) + level):
        np.testing.assert_allclose(ours, jax.grad(whole)(jnp.float32(0)))


def test_unlearning_ascends_with_a_clip_and_stops():
    grad_fn = lambda **options: defenses.unlearning(**options)(KEY, HALF, jnp.float32(0), ONE)
    np.testing.assert_allclose(grad_fn(until=6.0, clip_norm=jnp.inf), 3)
    np.testing.assert_allclose(grad_fn(until=6.0, clip_norm=0.5), 0.5)
    assert grad_fn(until=5.0) == 0
    at_rest = mj.dataset(jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32))
    assert defenses.unlearning(until=1.0)(KEY, HALF, jnp.float32(0), at_rest) == 0  # no direction, no NaN


def backdoored(num_rows=400, num_poisons=20, dim=6):
    """Two noisy Gaussian classes; the poisons are of class 0, labelled 1, and carry a strong feature of their own."""
    rng = np.random.default_rng(0)
    y = np.arange(num_rows) % 2
    x = 0.3 * rng.normal(size=(num_rows, dim)).astype(np.float32)
    x[:, 0] += np.where(y == 1, 0.5, -0.5)
    x[:, -1] = 0
    poisons = np.flatnonzero(y == 0)[:num_poisons]
    x[poisons, -1], y[poisons] = 8.0, 1
    return mj.dataset(x, y), poisons


def apply_fn(params, x, key=None):
    return x @ params["w"] + params["b"][None]


def test_the_poisons_are_isolated_and_forgotten():
    data, poisons = backdoored()
    loss_fn = losses.cross_entropy(apply_fn)
    fit = lambda num_steps, rate=0.1, **slots: bilevel.unrolled(loss_fn, optax.sgd(rate), num_steps, **slots)
    params = {"w": jnp.zeros((6, 2)), "b": jnp.zeros(2)}
    trainer = defenses.abl(
        loss_fn,
        isolate=fit(30, grad_fn=defenses.flooding(0.5)),
        refine=fit(100),
        unlearn=fit(100, 0.05, grad_fn=defenses.unlearning(until=2.0, clip_norm=1.0)),
        num_isolated=10,
    )
    trained, info = jax.jit(trainer)(KEY, params, data)
    isolated = np.flatnonzero(info["isolated"])
    assert isolated.size == 10 and np.isin(isolated, poisons).all()
    assert info["score"][isolated].min() >= np.delete(info["score"], isolated).max()
    assert info["isolate"]["loss"] > 0.3  # ordinary rows were not learned
    clean, _ = backdoored(num_poisons=0)
    stamped = clean.x[clean.y == 0].at[:, -1].set(8.0)
    took = lambda params: float(jnp.mean(jnp.argmax(apply_fn(params, stamped), axis=1) == 1))
    right = lambda params: float(jnp.mean(jnp.argmax(apply_fn(params, clean.x), axis=1) == clean.y))
    control, _ = jax.jit(fit(130))(KEY, params, data)
    assert took(control) > 0.95 and took(trained) < 0.05
    assert right(trained) > right(control) - 0.03


def test_absent_rows_have_the_least_score():
    pieces = {name: bilevel.unrolled(HALF, optax.sgd(0.1), 1) for name in ("isolate", "refine", "unlearn")}
    data = ONE._replace(weight=jnp.array([1.0, 0.0]))
    score = defenses.abl(HALF, **pieces, num_isolated=1)(KEY, jnp.float32(0), data)[1]["score"]
    assert jnp.isfinite(score[0]) and score[1] == -jnp.inf


def test_bad_input_is_named():
    pieces = {name: bilevel.unrolled(HALF, optax.sgd(0.1), 1) for name in ("isolate", "refine", "unlearn")}
    with pytest.raises(ValueError, match="num_isolated: expected an integer"):
        defenses.abl(HALF, **pieces, num_isolated=0)
    with pytest.raises(ValueError, match="num_isolated: expected at most the 2 rows"):
        defenses.abl(HALF, **pieces, num_isolated=3)(KEY, jnp.float32(0), ONE)
    with pytest.raises(ValueError, match="clip_norm"):
        defenses.unlearning(until=1.0, clip_norm=0.0)
