"""Functions made pure: what they close over becomes an operand, so that a custom derivative rule sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from mlsec_jax import checks
from mlsec_jax.base import Params

GradFn = Callable[[Params, jax.Array, Any], Params]  # (params, step, args) -> gradient, a pytree like params


def hoist(grad_fn: GradFn, params: Params, args: Any) -> tuple[GradFn, list[Any]]:
    """The gradient as a function of `(params, step, (args, hoisted))`, with the tracers it closes over in `hoisted`."""
    closed, shape = jax.make_jaxpr(grad_fn, return_shape=True)(params, jnp.int32(0), args)
    treedef = jax.tree.structure(shape)
    is_open = [not checks.is_concrete(const) for const in closed.consts]

    def pure_fn(params: Params, step: jax.Array, both: Any) -> Params:
        args, hoisted = both
        fresh = iter(hoisted)
        consts = [next(fresh) if opened else const for opened, const in zip(is_open, closed.consts)]
        run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(closed.jaxpr, consts))
        return jax.tree.unflatten(treedef, run(*jax.tree.leaves((params, step, args))))

    return pure_fn, [const for opened, const in zip(is_open, closed.consts) if opened]
