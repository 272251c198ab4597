"""float32 data under x64 and strict promotion of dtypes: what isn't float64 stays what it was."""

import jax
import jax.numpy as jnp
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, defenses, losses, scores, threat

KEY = jax.random.key(0)
START = jnp.zeros((4, 3), jnp.float32)


def images():
    x = jax.random.uniform(jax.random.key(1), (6, 4, 4, 1), jnp.float32)
    return mj.dataset(x, jnp.arange(6, dtype=jnp.int32) % 3)


def rows():
    return mj.dataset(jax.random.normal(KEY, (9, 4), jnp.float32), jnp.arange(9, dtype=jnp.int32) % 3)


def linear(params, x, key=None):
    return x.reshape(x.shape[0], -1) @ params


def max_up():
    loss_fn = defenses.max_up(losses.cross_entropy(linear), defenses.cutout(side=2))
    return loss_fn(jnp.ones((16, 3), jnp.float32), images(), KEY)


def prune_trigger():
    trigger = threat.blend(jnp.ones(4, jnp.float32), opacity=0.5)
    params = {"head": {"w": jax.random.normal(KEY, (4, 3), jnp.float32)}}
    prune = defenses.prune_trigger(lambda params, x: x @ params["head"]["w"], lambda params, x: x, label=0, num_steps=4)
    return prune(KEY, params, mj.Known(clean=rows(), trigger=trigger))[0]


def partitions():
    trainer = bilevel.unrolled(losses.cross_entropy(linear), optax.sgd(0.1), 2)
    fit, predict = defenses.partition_aggregation(trainer, linear, num_partitions=3)
    label, info = predict(fit(KEY, START, rows())[0], rows().x)
    assert label.dtype == info["radius"].dtype == info["votes"].dtype == jnp.int32
    return info["radius"]


def roni():
    trainer = bilevel.unrolled(losses.cross_entropy(linear), optax.sgd(0.1), 2)
    scorer = scores.roni(linear, trainer, num_train=4, num_quiz=4, num_trials=2)
    return scorer(KEY, START, rows(), mj.Known(clean=rows()))


def unlearn_trigger():
    trigger = threat.blend(jnp.ones(4, jnp.float32), opacity=0.5)
    trainer = bilevel.unrolled(losses.cross_entropy(linear), optax.sgd(0.1), 2)
    return defenses.unlearn_trigger(trainer)(KEY, START, mj.Known(clean=rows(), trigger=trigger))[0]


features = lambda params, x, key=None: x

CALLS = {
    "spectral": lambda: scores.spectral(features, num_classes=3)(KEY, None, rows(), mj.Known()),
    "activation_clusters": lambda: scores.activation_clusters(features, num_classes=3, num_components=2)(
        KEY, None, rows(), mj.Known()
    ),
    "strip": lambda: scores.strip(linear, num_overlays=4)(KEY, START, rows(), mj.Known(clean=rows())),
    "roni": roni,
    "unlearn_trigger": unlearn_trigger,
    "cutout": lambda: defenses.cutout(side=2)(KEY, images()),
    "max_up": max_up,
    "mixup": lambda: defenses.mixup(num_classes=3)(KEY, images()),
    "cutmix": lambda: defenses.cutmix(num_classes=3, probability=1.0)(KEY, images()),
    "prune_trigger": prune_trigger,
    "partition_aggregation": partitions,
    "gaussian_threshold": lambda: scores.gaussian_threshold(rows().x[:, 0], false_alarms=0.01),
}


@pytest.mark.parametrize("name", CALLS)
def test_x64_changes_neither_whether_it_runs_nor_its_dtypes(name, x64):
    floats = {leaf.dtype for leaf in jax.tree.leaves(CALLS[name]()) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats <= {jnp.dtype(jnp.float32)}
