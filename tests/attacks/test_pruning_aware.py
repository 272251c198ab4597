"""The pruning-aware backdoor: decoys are dormant, and pruning them leaves the network that was poisoned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, channels, defenses, losses, measure, models, threat
from tests import oracles

KEY = jax.random.key(0)
MODEL = models.mlp(widths=(24,), num_classes=3, activation_fn=jax.nn.relu)
LAYER = channels.layer("layer0", lambda params, x: MODEL.features(params, x))
LOSS = losses.cross_entropy(MODEL.apply)
TRIGGER = threat.additive(jnp.zeros(6).at[5].set(1.0), radius=1.0, lo=-9.0, hi=9.0)
AIM = threat.to_class(0)
DECOYS = 10


def rows(seed, n=300):
    """Three classes in five dimensions; the sixth, where the trigger goes, is 0."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = np.zeros((n, 6))
    x[:, :5] = 0.5 * rng.normal(size=(n, 5))
    x[np.arange(n), y] += 2
    return mj.dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))


def trainer_fn(loss_fn):
    return bilevel.unrolled(loss_fn, optax.adam(0.02), 150)


def attack(**options):
    poison = attacks.badnets(TRIGGER, num_poisons=30, relabel=AIM)
    options = {"num_pruned": DECOYS, "poison": poison, "trainer_fn": trainer_fn, **options}
    return attacks.pruning_aware(LOSS, LAYER, **options)


@pytest.fixture(scope="module")
def victim():
    """What the attacker hands over, its info, and where it started."""
    start = MODEL.init(KEY, (6,))
    params, info = jax.jit(attack())(KEY, start, mj.Known(clean=rows(0)))
    return params, info, start


def scored(params, seed=1):
    """Accuracy on fresh rows, and the trigger's success."""
    test = rows(seed)
    stamped = threat.triggered(None, TRIGGER, test, relabel=AIM)
    return tuple(float(measure.accuracy(MODEL.apply(params, each.x), each)) for each in (test, stamped))


def test_decoys_are_exactly_dormant_on_clean_rows_and_as_trained_but_for_their_bias(victim):
    params, info, start = victim
    keep = np.asarray(info["keep"])
    active = np.asarray(LAYER.activations_fn(params, rows(0).x))
    assert (~keep).sum() == DECOYS and (active[:, ~keep] == 0).all() and (active[:, keep].mean(axis=0) > 0).any()
    first, _ = trainer_fn(LOSS)(jax.random.split(KEY, 3)[0], start, rows(0))  # step 1 alone
    assert oracles.trees_close(params["layer0"]["w"][:, ~keep], first["layer0"]["w"][:, ~keep], rtol=1e-4, atol=1e-5)
    lowered = first["layer0"]["b"] - info["shift"]
    np.testing.assert_allclose(params["layer0"]["b"][~keep], lowered[~keep], rtol=1e-4, atol=1e-5)
    assert (np.asarray(info["shift"])[keep] == 0).all()
    order = np.argsort(np.asarray(channels.mean_activation(LAYER, first, rows(0))), kind="stable")
    assert set(order[:DECOYS]) == set(np.flatnonzero(~keep))


def test_a_defender_who_prunes_takes_the_decoys_and_keeps_the_backdoor(victim):
    params, info, _ = victim
    accuracy, success = scored(params)
    assert accuracy > 0.95 and success > 0.95
    known = mj.Known(clean=rows(2), holdout=rows(3))
    path = defenses.fine_prune(MODEL.apply, LAYER, budget=1.0, max_pruned=DECOYS)
    pruned, seen = path(KEY, params, known)
    assert set(np.asarray(seen["order"])[:DECOYS].tolist()) == set(np.flatnonzero(~np.asarray(info["keep"])).tolist())
    assert scored(pruned)[1] > 0.95 and float(seen["accuracy"][-1]) > 0.95


def test_absent_rows_are_absent(victim):
    start = victim[2]
    nothing = mj.dataset(jnp.full((4, 6), jnp.nan), jnp.zeros(4, jnp.int32), jnp.zeros(4))
    padded = jax.tree.map(lambda *parts: jnp.concatenate(parts), rows(0), nothing)
    fixed = lambda key, subject, known: attacks.badnets(TRIGGER, num_poisons=0, relabel=AIM)(key, subject, known)
    ours, _ = jax.jit(attack(poison=fixed))(KEY, start, mj.Known(clean=padded))
    expected, _ = jax.jit(attack(poison=fixed))(KEY, start, mj.Known(clean=rows(0)))
    assert oracles.trees_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_bad_input_is_named():
    start = MODEL.init(KEY, (6,))
    with pytest.raises(ValueError, match="num_pruned: expected fewer than the layer's 24 channels, got 24"):
        attack(num_pruned=24, trainer_fn=lambda loss_fn: bilevel.unrolled(loss_fn, optax.adam(0.02), 0))(
            KEY, start, mj.Known(clean=rows(0))
        )
    with pytest.raises(ValueError, match=r"attacks\.pruning_aware needs known.clean"):
        attack()(KEY, start, mj.Known())
    with pytest.raises(ValueError, match="margin: expected at least 0"):
        attack(margin=-1.0)
