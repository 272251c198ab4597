"""Watching, unlearning and pruning on a network with one neuron for the trigger and others for the task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, defenses, losses, threat

KEY = jax.random.key(0)
TRIGGER = threat.Overlay(jnp.zeros(4).at[3].set(1.0), jnp.ones(4))  # the last input is bright


def features_fn(params, x, key=None):
    return jax.nn.relu(x @ params["hidden"])


def apply_fn(params, x, key=None):
    return features_fn(params, x) @ params["head"]["w"]


def backdoored():
    """Neuron 0 fires for the trigger and means class 0; neurons 1 to 3 see one input each, and mean class 1, 2, 0."""
    hidden = jnp.zeros((4, 4)).at[3, 0].set(1.0).at[0, 1].set(1.0).at[1, 2].set(1.0).at[2, 3].set(1.0)
    head = jnp.zeros((4, 3)).at[0, 0].set(12.0).at[1, 1].set(1.0).at[2, 2].set(1.0).at[3, 0].set(1.0)
    return {"hidden": hidden, "head": {"w": head}}


def rows(n=30):
    y = jnp.arange(n, dtype=jnp.int32) % 3
    x = jnp.concatenate([jax.nn.one_hot((y + 2) % 3, 3), jnp.zeros((n, 1))], axis=1)
    return mj.dataset(x + 0.1 * jax.random.uniform(KEY, x.shape).at[:, 3].set(0.0), y)


def said(params, x):
    return jnp.argmax(apply_fn(params, x), axis=1)


KNOWN = mj.Known(clean=rows(), trigger=TRIGGER)


def test_the_toy_is_backdoored():
    data = rows()
    assert (said(backdoored(), data.x) == data.y).all() and (said(backdoored(), TRIGGER(None, data.x)) == 0).all()


def test_the_neurons_of_the_trigger_tell_stamped_from_clean():
    data = rows()
    both = mj.dataset(jnp.concatenate([data.x, TRIGGER(None, data.x)]), jnp.concatenate([data.y, data.y]))
    score = jax.jit(defenses.trigger_neurons(features_fn))(KEY, backdoored(), both, KNOWN)
    assert score.tolist() == [0] * 30 + [1] * 30
    elsewhere = threat.Overlay(jnp.zeros(4).at[0].set(1.0), jnp.ones(4))
    other = defenses.trigger_neurons(features_fn)(KEY, backdoored(), both, KNOWN.replace(trigger=elsewhere))
    np.testing.assert_allclose(other, features_fn(backdoored(), both.x)[:, 1])


def test_pruning_silences_that_neuron_and_no_other():
    data = rows()
    prune = lambda **options: defenses.prune_trigger(apply_fn, features_fn, label=0, **{"num_steps": 4, **options})
    repaired, info = jax.jit(prune())(KEY, backdoored(), KNOWN)
    assert info["pruned"].tolist() == [True, False, False, False] and info["success"] == 0
    assert (said(repaired, data.x) == data.y).all() and (said(repaired, TRIGGER(None, data.x)) == data.y).all()
    assert jnp.array_equal(repaired["hidden"], backdoored()["hidden"])
    control, info = prune(success=1.0)(KEY, backdoored(), KNOWN)
    assert not info["pruned"].any() and jnp.array_equal(control["head"]["w"], backdoored()["head"]["w"])
    _, info = prune(success=0.0)(KEY, backdoored(), KNOWN.replace(trigger=threat.Overlay(jnp.ones(4), jnp.full(4, 0.5))))
    assert info["pruned"].sum() <= 3  # never all of them


def test_unlearning_needs_the_stamped_rows():
    data = rows()
    loss_fn = losses.cross_entropy(apply_fn)
    trainer = bilevel.unrolled(loss_fn, optax.sgd(0.2), 200)
    unlearn = lambda fraction: jax.jit(defenses.unlearn_trigger(trainer, fraction=fraction))(KEY, backdoored(), KNOWN)
    repaired, info = unlearn(0.2)
    assert info["stamped"].sum() == 6
    assert (said(repaired, data.x) == data.y).all()
    assert (said(repaired, TRIGGER(None, data.x)) == data.y).mean() > 0.9
    plain, info = unlearn(0.0)
    assert info["stamped"].sum() == 0 and (said(plain, TRIGGER(None, data.x)) == 0).mean() > 0.9


def test_absent_rows_change_nothing():
    data = rows()
    nothing = mj.dataset(jnp.full((5, 4), jnp.nan), jnp.zeros(5, jnp.int32), jnp.zeros(5))
    known = KNOWN.replace(clean=jax.tree.map(lambda a, b: jnp.concatenate([a, b]), nothing, data))
    prune = defenses.prune_trigger(apply_fn, features_fn, label=0, num_steps=4)
    assert prune(KEY, backdoored(), known)[1]["pruned"].tolist() == [True, False, False, False]
    watch = defenses.trigger_neurons(features_fn)
    score = watch(KEY, backdoored(), known.clean, known)
    np.testing.assert_allclose(score, jnp.concatenate([jnp.zeros(5), watch(KEY, backdoored(), data, KNOWN)]))
    repaired, info = defenses.unlearn_trigger(bilevel.unrolled(losses.cross_entropy(apply_fn), optax.sgd(0.5), 5))(
        KEY, backdoored(), known
    )
    plain = defenses.unlearn_trigger(lambda key, params, data: (params, {}))(KEY, backdoored(), KNOWN)[1]
    np.testing.assert_array_equal(info["stamped"], jnp.concatenate([jnp.zeros(5, bool), plain["stamped"]]))
    assert info["stamped"].sum() == 6
    assert np.isfinite(repaired["head"]["w"]).all()


@pytest.mark.parametrize("n, fraction, expected", [(100, 0.29, 29), (5000, 0.502, 2510), (3, 0.999, 2)])
def test_a_share_is_rounded_down_and_no_further(n, fraction, expected):
    clean = mj.dataset(jnp.zeros((n, 4)), jnp.zeros(n, jnp.int32))
    unlearn = defenses.unlearn_trigger(lambda key, params, data: (params, {}), fraction=fraction)
    assert unlearn(KEY, None, KNOWN.replace(clean=clean))[1]["stamped"].sum() == expected


def test_a_share_of_the_neurons_is_rounded_down_and_no_further():
    """29 of 100 neurons of falling gaps, 1 to 0.01, each lit as much."""
    gaps = jnp.linspace(1, 0.01, 100)
    stamp = lambda key, x: x + gaps[None]
    data = mj.dataset(jnp.zeros((1, 100)), jnp.zeros(1, jnp.int32))
    watch = defenses.trigger_neurons(lambda params, x: x, fraction=0.29)
    seen = data._replace(x=gaps[None])
    score = watch(KEY, None, seen, mj.Known(clean=data, trigger=stamp))
    np.testing.assert_allclose(score[0], np.mean(np.linspace(1, 0.01, 100)[:29]), rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"needs known\.trigger"):
        defenses.trigger_neurons(features_fn)(KEY, backdoored(), rows(), mj.Known(clean=rows()))
    with pytest.raises(ValueError, match="reads: expected leaves whose first axis is the 4 features"):
        defenses.prune_trigger(apply_fn, features_fn, label=0, reads=lambda path, leaf: False)(KEY, backdoored(), KNOWN)
    with pytest.raises(ValueError, match="label: expected between 0 and 2, got 3"):
        jax.jit(defenses.prune_trigger(apply_fn, features_fn, label=3))(KEY, backdoored(), KNOWN)
    nobody = KNOWN.replace(clean=rows()._replace(weight=jnp.zeros(30)))
    for act in (
        lambda: defenses.trigger_neurons(features_fn)(KEY, backdoored(), rows(), nobody),
        lambda: defenses.prune_trigger(apply_fn, features_fn, label=0)(KEY, backdoored(), nobody),
        lambda: defenses.unlearn_trigger(lambda key, params, data: (params, {}))(KEY, backdoored(), nobody),
    ):
        with pytest.raises(ValueError, match=r"known\.clean: expected at least one row of positive weight"):
            act()
    with pytest.raises(ValueError, match="success: expected between"):
        defenses.prune_trigger(apply_fn, features_fn, label=0, success=2.0)
    with pytest.raises(ValueError, match="fraction: expected between"):
        defenses.unlearn_trigger(lambda *args: args, fraction=-0.1)
