"""One softmax model as a dict, a NamedTuple, flax linen, flax nnx, Haiku and Equinox: the same attack, the same poisons."""

from typing import NamedTuple

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses, threat, tree
from mlsec_jax.models import adapt
from tests import problems

KEY = jax.random.key(0)


class Affine(NamedTuple):
    w: jax.Array
    b: jax.Array


def zeros(model, x):
    """The model and its parameters, all zero, as the plain one starts."""
    params = model.init(KEY, x)
    return model.apply, jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if tree.is_float(leaf) else leaf, params)


MAKERS = {
    "namedtuple": lambda x: (
        lambda params, x, key=None: x @ params.w + params.b[None],
        Affine(jnp.zeros((problems.DIM, problems.CLASSES)), jnp.zeros(problems.CLASSES)),
    ),
    "linen": lambda x: zeros(adapt.linen(linen.Dense(problems.CLASSES)), x),
    "nnx": lambda x: zeros(adapt.nnx(lambda rngs: nnx.Linear(problems.DIM, problems.CLASSES, rngs=rngs)), x),
    "haiku": lambda x: zeros(adapt.haiku(lambda x: hk.Linear(problems.CLASSES)(x)), x),
    "equinox": lambda x: zeros(adapt.equinox(lambda key: eqx.nn.Linear(problems.DIM, problems.CLASSES, key=key)), x),
}


def poisons(apply_fn, params, make_trainer):
    problem = problems.make()
    loss_fn = losses.cross_entropy(apply_fn)
    algorithm = attacks.error_specific(
        loss_fn,
        make_trainer(loss_fn),
        threat=threat.append_rows(problem.reserved),
        optimizer=attacks.unit_rows(0.1),
    )
    known = mj.Known(params=params, goal=problem.known.goal)
    run = jax.jit(lambda known: combine.run(algorithm, KEY, problem.train, known, num_steps=2)[0].poison)
    return run(known)


TRAINERS = {
    "exact": lambda loss_fn: bilevel.back_gradient(loss_fn, 0.5, 4, momentum=0.5, reversal="exact"),
    "implicit": lambda loss_fn: bilevel.implicit(losses.regularised(loss_fn, l2=0.1, penalise=None)),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_library_gives_the_same_poisons(trainer):
    problem = problems.make()
    expected = poisons(problem.apply_fn, problem.params, TRAINERS[trainer])
    for name, maker in MAKERS.items():
        ours = poisons(*maker(problem.train.x), TRAINERS[trainer])
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4, err_msg=name)
