"""The trainers of the bilevel room, once each."""

import jax.numpy as jnp
import optax

from mlsec_jax import bilevel, losses
from tests import problems
from tests.registry._row import objective, trainer


def _machine(problem):
    """The binary problem with a kernel machine, whose parameters are the rows themselves."""
    problem = problems.binary(problem)
    apply_fn = bilevel.svm_apply(bilevel.linear())
    num_rows, dtype = problem.train.num_rows, problem.train.x.dtype
    params = bilevel.SVMParams(jnp.zeros(num_rows, dtype), jnp.zeros((), dtype), jnp.zeros_like(problem.train.x))
    return problem._replace(params=params, apply_fn=apply_fn, loss_fn=losses.hinge(apply_fn, temperature=0.1))


ROWS = [
    trainer("bilevel.unrolled", lambda p, rate: bilevel.unrolled(p.loss_fn, optax.sgd(rate), 5, remat="sqrt")),
    trainer("bilevel.truncated", lambda p, rate: bilevel.truncated(p.loss_fn, optax.sgd(rate), 5, last=2)),
    trainer("bilevel.forward", lambda p, rate: bilevel.forward(p.loss_fn, optax.sgd(rate), 5, rows=p.reserved)),
    trainer("bilevel.back_gradient", lambda p, rate: bilevel.back_gradient(p.loss_fn, rate, 5, reversal="fixed_point")),
    trainer(
        "bilevel.back_gradient(exact)",
        lambda p, rate: bilevel.back_gradient(p.loss_fn, rate, 5, momentum=0.5, reversal="exact"),
    ),
    trainer(
        "bilevel.kkt_svm",
        lambda p, C: bilevel.kkt_svm(C=C),
        problem=_machine,
        read=lambda p, params: p.apply_fn(params, p.known.goal.x),
    ),
    trainer(
        "bilevel.glm",
        lambda p, l2: bilevel.glm(losses.logistic, l2=l2),
        problem=problems.binary,
    ),
    trainer("bilevel.implicit", lambda p, l2: bilevel.implicit(objective(p, l2))),
]
