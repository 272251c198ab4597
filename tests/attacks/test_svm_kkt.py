"""The SVM attack on two Gaussians (the paper's artificial data): it climbs, stays in the box, and refuses bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import attacks, bilevel, combine, losses, threat
from mlsec_jax.base import Known, dataset


def gaussians(seed, n):
    """Two classes around (∓1.5, 0), deviation 0.6."""
    rng = np.random.default_rng(seed)
    y = (np.arange(2 * n) >= n).astype(np.int32)
    x = 0.6 * rng.normal(size=(2 * n, 2)) + np.stack([np.where(y == 1, 1.5, -1.5), np.zeros(2 * n)], axis=1)
    return dataset(x, y)


def setting(num_poisons):
    train, goal = gaussians(0, 25), gaussians(1, 50)
    start = dataset(train.x[25 : 25 + num_poisons], jnp.zeros(num_poisons, jnp.int32))  # flipped
    return threat.reserve(train, start), Known(goal=goal), threat.append_rows(num_poisons, lo=-5.0, hi=5.0)


@pytest.mark.parametrize("kernel", [bilevel.linear(), bilevel.rbf(0.5)], ids=["linear", "rbf"])
def test_the_attack_raises_the_validation_loss_and_stays_in_the_box(kernel, x64):
    data, known, reach = setting(2)
    attack = attacks.svm_kkt(kernel=kernel, threat=reach, step_size=0.2)
    state, infos = jax.jit(lambda: combine.run(attack, jax.random.key(0), data, known, num_steps=25))()
    outer = infos["outer"]
    assert float(outer[-1]) < 1.25 * float(outer[0]) < 0  # a loss: it falls
    assert float(jnp.max(infos["train"]["stationarity"])) < 1e-11
    assert float(jnp.max(jnp.abs(state.poison))) <= 5.0 and int(jnp.min(infos["alive"])) >= 1
    poisoned = attack.read(state, data)
    np.testing.assert_array_equal(poisoned.x[:50], data.x[:50])
    np.testing.assert_array_equal(poisoned.weight, 1)


def test_greedy_moves_one_point_at_a_time_and_the_outer_loss_is_a_slot():
    data, known, reach = setting(2)
    outer = losses.goal_loss(losses.hinge(bilevel.svm_apply(bilevel.linear())))
    all_zeros = known.replace(goal=known.goal._replace(y=jnp.zeros(100, jnp.int32)))
    attack = attacks.svm_kkt(threat=reach, step_size=0.2, order=attacks.greedy(4), outer=outer)
    state, infos = jax.jit(lambda: combine.run(attack, jax.random.key(0), data, all_zeros, num_steps=4))()
    np.testing.assert_array_equal(state.poison[1], data.x[-1])
    assert bool(jnp.any(state.poison[0] != data.x[-2])) and float(infos["outer"][-1]) < float(infos["outer"][0])


def test_bad_input_gets_one_clear_sentence():
    data, _, reach = setting(1)
    attack = attacks.svm_kkt(threat=reach)
    with pytest.raises(ValueError, match=r"svm_kkt needs known\.goal"):
        attack.init(jax.random.key(0), data, Known())
    with pytest.raises(ValueError, match="step_size: expected more than 0"):
        attacks.svm_kkt(threat=reach, step_size=0.0)
