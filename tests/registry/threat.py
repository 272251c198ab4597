"""The threats, once each."""

import jax.numpy as jnp

from mlsec_jax import losses, threat
from tests import problems
from tests.registry._row import TRIGGERS, Row, perturb

ROWS = [
    Row(
        "threat.append_rows",
        "threat",
        lambda problem, hi: threat.append_rows(problem.reserved, hi=hi),
        zero=lambda problem: threat.append_rows(0),
        budget=0.9,
    ),
    Row(
        "threat.perturb_rows", "threat", lambda problem, r: perturb(problem, r), zero=lambda problem: perturb(problem, 0.0)
    ),
    Row(
        "threat.perturb_rows(l2)",
        "threat",
        lambda problem, r: perturb(problem, r, "l2"),
        zero=lambda problem: perturb(problem, 0.0, "l2"),
    ),
    Row(
        "threat.flip_labels",
        "threat",
        lambda problem, budget: threat.flip_labels(problem.touched, budget=budget),
        problem=lambda p: p._replace(train=p.train._replace(y=losses.soft_labels(p.train.y, problems.CLASSES))),
        zero=lambda problem: threat.flip_labels(problem.touched, budget=0.0),
    ),
    Row(
        "threat.reweigh",
        "threat",
        lambda problem, r: threat.reweigh(problem.touched, radius=r),
        zero=lambda problem: threat.reweigh(problem.touched, radius=0.0),
    ),
    *(
        Row(
            f"threat.backdoor({name})",
            "threat",
            lambda problem, budget, make=make: threat.backdoor(
                make(budget), problem.touched, relabel=threat.to_next(problems.CLASSES)
            ),
            zero=lambda problem, make=make: threat.backdoor(
                make(0.3), jnp.zeros(0, jnp.int32), relabel=threat.to_class(1)
            ),
        )
        for name, make in TRIGGERS.items()
    ),
]
