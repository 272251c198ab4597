"""A row of the registry, and the pieces that rows of several rooms are made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import bilevel, channels, losses, threat
from tests import problems


@dataclasses.dataclass(frozen=True)
class Row:
    """A method under law.

    Attributes:
      name: `room.method`.
      kind: attack, trainer, threat, transform (of data), batch (transform of a batch), repair (of parameters),
        ensemble (of victims), scorer or inspector.
      build: `(problem, budget) -> method`; budget is a float hyper-parameter (radius, rate…) that may be a tracer.
      problem: how the shared problem is turned into the method's own.
      zero: `problem -> method` that may change nothing; None where the idea has no meaning.
      project: `problem -> threat` whose set the attack must stay in; None where there is none.
      full_batch: whether weight 0 equals absence to rounding.
      lowers: whether the attack's reported `outer` must fall.
      targeted: whether another goal must give another result.
      budget: the default of that hyper-parameter.
      read: `(problem, params) -> tree`, what of a trained model is compared (a kernel machine's parameters are rows).
    """

    name: str
    kind: str
    build: Callable[[Any, Any], Any]
    problem: Callable[[Any], Any] = lambda problem: problem
    zero: Callable[[Any], Any] | None = None
    project: Callable[[Any], Any] | None = None
    full_batch: bool = True
    lowers: bool = True
    targeted: bool = True
    budget: float = 0.3
    read: Callable[[Any, Any], Any] = lambda problem, params: params
    translation_invariant: bool = False


MOMENTUM = optax.sgd(0.5, momentum=0.9)


def perturb(problem, radius=0.3, norm="linf"):
    return threat.perturb_rows(problem.touched, radius=radius, norm=norm)


def unrolled(problem):
    return bilevel.unrolled(problem.loss_fn, MOMENTUM, 5)


def seen(problem):
    """The problem in a small tanh network with weights, as clean-label attacks need one whose features move."""
    width = problem.train.x.shape[1]
    weights = jnp.sin(jnp.arange(width * 6, dtype=problem.train.x.dtype)).reshape(width, 6)
    params = {"hidden": weights, "head": 0.5 * jnp.cos(weights[:, :3].T.repeat(2, axis=0)[:, :3])}
    apply_fn = lambda p, x, key=None: jnp.tanh(x @ p["hidden"]) @ p["head"]
    return problem._replace(params=params, known=problem.known.replace(params=params), apply_fn=apply_fn,
                            loss_fn=losses.cross_entropy(apply_fn))  # fmt: skip


def features(params, x, key=None):
    return jnp.tanh(x @ params["hidden"])


TRIGGERS = {  # on the rows of the shared problem, which are no images
    "blend": lambda opacity: threat.blend(jnp.ones(problems.DIM), opacity=opacity),
    "additive": lambda radius: threat.additive(jnp.full(problems.DIM, 0.1), radius=radius),
}


def logits(problem):
    """The model's outputs as the channels of a layer."""
    return channels.layer("", lambda params, x: jax.nn.relu(problem.apply_fn(params, x)))


def trainer(name, make, **options):
    return Row(name, "trainer", lambda problem, rate: make(problem, rate), **options)


def objective(problem, l2):
    return losses.regularised(problem.loss_fn, l2=l2, penalise=None)
