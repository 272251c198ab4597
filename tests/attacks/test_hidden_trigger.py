"""The hidden trigger: its pairings against brute force, SciPy and the published code's loop; collisions; hidden indeed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

import mlsec_jax as mj
from mlsec_jax import attacks, combine, threat
from mlsec_jax.attacks import _hidden_trigger

RNG = np.random.default_rng(0)
PATCH = threat.patch(jnp.ones((2, 2, 1)), at=None)
FEATURES = lambda params, x, key=None: x.reshape(len(x), -1) @ params
IMAGES = mj.dataset(jnp.asarray(0.2 + 0.6 * RNG.random((6, 6, 6, 1)), jnp.float32), jnp.array([0, 0, 0, 0, 1, 1]))
SOURCES = mj.dataset(jnp.asarray(RNG.random((5, 6, 6, 1)), jnp.float32), jnp.zeros(5, jnp.int32))
KNOWN = mj.Known(params=jnp.asarray(RNG.normal(size=(36, 4)), jnp.float32), goal=SOURCES)
ROWS = jnp.arange(4)


def crafted(radius=0.1, num_steps=40, known=KNOWN, key=0, **options):
    reach = threat.perturb_rows(ROWS, radius=radius)
    attack = attacks.hidden_trigger(FEATURES, PATCH, threat=reach, optimizer=optax.adam(0.02), **options)
    state, info = jax.jit(lambda key: combine.run(attack, key, IMAGES, known, num_steps=num_steps))(jax.random.key(key))
    return attack.read(state, IMAGES), info, state


def by_hand(cost):
    """Saha et al.'s description, as a person would do it."""
    left, partner = {*range(cost.shape[1])}, {}
    while len(partner) < len(cost):
        pairs = itertools.product(set(range(len(cost))) - set(partner), left)
        i, j = min(pairs, key=lambda pair: cost[pair])
        partner[i] = j
        left.remove(j)
    return [partner[i] for i in range(len(cost))]


def published(cost):
    """The loop of the published code: rows of its matrix are sources."""
    dist, partner = cost.T.copy(), np.arange(len(cost))
    for _ in range(len(cost)):
        row, column = np.unravel_index(np.argmin(dist), dist.shape)
        partner[column] = row
        dist[row, column] = 1e5
    return partner


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (4, 7)])
def test_pairings_are_those_of_slow_code(shape):
    greedy, optimal = jax.jit(_hidden_trigger._greedy), jax.jit(_hidden_trigger._optimal)
    apart = 0
    for _ in range(10):
        cost = RNG.random(shape).astype(np.float32)
        np.testing.assert_array_equal(greedy(cost), by_hand(cost))
        found = np.asarray(optimal(cost))
        rows, columns = linear_sum_assignment(cost)
        assert len(set(found)) == shape[0]
        np.testing.assert_allclose(cost[np.arange(shape[0]), found].sum(), cost[rows, columns].sum(), rtol=1e-5)
        apart += not np.array_equal(found, by_hand(cost))
        if shape[0] == shape[1]:
            np.testing.assert_array_equal(_hidden_trigger._faithful(jnp.asarray(cost)), published(cost))
    assert apart > 0 or shape == (1, 1)  # there is something to choose


@pytest.mark.parametrize("options", [{}, {"pairing": "optimal"}, {"redraw": True}], ids=str)
def test_features_meet_within_the_budget_and_the_pairs_are_one_to_one(options):
    poisoned, info, _ = crafted(num_steps=60, **options)
    assert float(info["outer"][-1]) < 0.5 * float(info["outer"][0])
    assert float(jnp.max(jnp.abs(poisoned.x - IMAGES.x))) <= 0.1 + 1e-6
    assert (poisoned.x[4:] == IMAGES.x[4:]).all() and (poisoned.y == IMAGES.y).all()
    assert all(len(set(step)) == 4 for step in np.asarray(info["source"]).tolist())
    np.testing.assert_allclose(info["distance"].sum(axis=1), info["outer"], rtol=1e-5)


def test_without_a_budget_poisons_meet_patched_sources_and_the_place_is_random():
    _, info, state = crafted(radius=jnp.inf, num_steps=400)
    aim = np.asarray(state.aim[0])
    unpatched = np.asarray(FEATURES(KNOWN.params, SOURCES.x))
    assert (np.abs(aim - unpatched).max(axis=1) > 0.1).all()
    assert float(info["outer"][-1]) < 1e-2 * float(info["outer"][0])
    assert not np.allclose(aim, crafted(num_steps=1, key=1)[2].aim[0])


def test_the_trigger_is_in_no_poison():
    """No 2x2 block of any poison is anywhere near the white patch, though the features were moved towards it."""
    poisoned, _, _ = crafted(num_steps=60)
    blocks = jax.lax.reduce_window(poisoned.x, jnp.inf, jax.lax.min, (1, 2, 2, 1), (1, 1, 1, 1), "valid")
    clean = jax.lax.reduce_window(IMAGES.x, jnp.inf, jax.lax.min, (1, 2, 2, 1), (1, 1, 1, 1), "valid")
    assert float(jnp.max(blocks)) < 0.95 and float(jnp.max(blocks - clean)) <= 0.1 + 1e-6


def test_the_published_pairing_loses_sources():
    known = KNOWN.replace(goal=jax.tree.map(lambda leaf: leaf[:4], SOURCES))
    _, _, state = crafted(known=known, pairing="faithful")
    kept = np.unique(np.asarray(state.aim[0]).round(3), axis=0)
    assert len(kept) < 4


def test_an_absent_source_is_nobodys_partner():
    absent = SOURCES._replace(weight=jnp.array([1.0, 1, 0, 1, 1]), x=SOURCES.x.at[2].set(jnp.nan))
    for pairing in ("greedy", "optimal"):
        poisoned, info, _ = crafted(known=KNOWN.replace(goal=absent), pairing=pairing)
        assert not (info["source"] == 2).any() and bool(jnp.isfinite(poisoned.x).all())


def test_bad_input_is_named():
    reach = threat.perturb_rows(ROWS, radius=0.1)
    make = lambda **options: attacks.hidden_trigger(FEATURES, PATCH, threat=reach, optimizer=optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match="pairing: expected one of"):
        make(pairing="best")
    with pytest.raises(ValueError, match="redraw"):
        make(pairing="faithful", redraw=True)
    few = KNOWN.replace(goal=jax.tree.map(lambda leaf: leaf[:3], SOURCES))
    with pytest.raises(ValueError, match=r"known\.goal: expected at least 4 sources"):
        make().init(jax.random.key(0), IMAGES, few)
    with pytest.raises(ValueError, match=r"known\.goal: expected exactly 4 sources"):
        make(pairing="faithful").init(jax.random.key(0), IMAGES, KNOWN)
