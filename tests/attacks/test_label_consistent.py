"""Label-consistent poisons: the closed form on a linear model, the stamp, the four corners; better than the trigger alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses, threat

KEY = jax.random.key(0)
WHITE = threat.patch(jnp.ones((1, 1, 1)))
apply_fn = lambda params, x, key=None: jnp.stack([jnp.zeros(len(x)), x.reshape(len(x), -1) @ params], axis=1)
LOSS = losses.cross_entropy(apply_fn)


def crafted(data, params, rows, trigger=WHITE, radius=0.5, num_steps=30):
    reach = threat.perturb_rows(rows, radius=radius, norm="l2", lo=-jnp.inf, hi=jnp.inf)
    attack = attacks.label_consistent(LOSS, trigger, threat=reach, optimizer=attacks.unit_rows(0.2))
    made, info = combine.iterate(attack, num_steps)(KEY, data, mj.Known(params=params))
    return made, info


def test_on_a_linear_model_it_moves_by_the_radius_against_the_weights_and_stamps_what_it_made():
    params = jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)
    data = mj.dataset(jnp.full((3, 3, 3, 1), 0.4), jnp.array([1, 0, 1]))
    made, info = crafted(data, params, jnp.array([0, 1]))
    unit = np.asarray(params / jnp.linalg.norm(params)).reshape(3, 3, 1)
    for row, sign in ((0, -1), (1, 1)):
        moved = 0.4 + sign * 0.5 * unit
        moved[-1, -1] = 1  # the trigger at full strength, outside the ball
        np.testing.assert_allclose(made.x[row], moved, atol=1e-4)
    assert (made.x[2] == data.x[2]).all() and (made.y == data.y).all()
    assert (jnp.diff(info["outer"]) < 1e-6).all()


def test_four_corners_are_mirrored_alike():
    pattern = jnp.asarray(np.random.default_rng(1).random((2, 3, 2)), jnp.float32)
    trigger = threat.corners(pattern, mask=jnp.array([[1.0, 0.5, 1.0], [0.0, 1.0, 1.0]]))
    x = jnp.asarray(np.random.default_rng(2).random((2, 8, 9, 2)), jnp.float32)
    stamped = trigger(None, x)
    np.testing.assert_allclose(trigger(None, x[:, :, ::-1]), stamped[:, :, ::-1], rtol=1e-6)
    np.testing.assert_allclose(trigger(None, x[:, ::-1]), stamped[:, ::-1], rtol=1e-6)
    one = threat.patch(pattern, mask=jnp.array([[1.0, 0.5, 1.0], [0.0, 1.0, 1.0]]))(None, x)
    np.testing.assert_allclose(stamped[:, 6:, 6:], one[:, 6:, 6:], rtol=1e-6)
    assert (stamped[:, 2:6] == x[:, 2:6]).all() and (stamped[:, :, 3:6] == x[:, :, 3:6]).all()
    with pytest.raises(ValueError, match=r"inside images|that fits"):
        trigger(None, x[:, :1])


def test_it_beats_the_trigger_alone_at_the_same_budget():
    rng = np.random.default_rng(0)
    y = np.arange(300) % 2
    x = rng.normal(size=(300, 3, 3, 1)).astype(np.float32) * 0.3
    x[:, :2] += np.where(y == 1, 0.5, -0.5)[:, None, None, None]
    x[:, -1, -1] = 0
    data, rows = mj.dataset(x, y), jnp.asarray(np.flatnonzero(y == 1)[:30])
    train = jax.jit(bilevel.unrolled(LOSS, optax.sgd(0.3), 150))
    clean, _ = train(KEY, jnp.zeros(9), data)
    stamp = lambda x: WHITE(None, x)
    success = {}
    for radius in (0.0, 3.0):
        made, _ = crafted(data, clean, rows, radius=radius)
        victim, _ = train(KEY, jnp.zeros(9), made)
        margin = lambda x, victim=victim: np.asarray(apply_fn(victim, x)[:, 1])
        success[radius] = np.mean(margin(stamp(data.x[y == 0])) - margin(data.x[y == 0]))
        assert np.mean((margin(data.x) > 0) == y) > 0.95
    assert success[3.0] > 2 * success[0.0] > 0
