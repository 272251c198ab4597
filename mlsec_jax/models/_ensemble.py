"""Several networks, of several architectures, as one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from mlsec_jax import checks, tree


def ensemble(fns: Sequence[Callable[..., Any]], *, over: str = "vmap") -> Callable[..., tuple]:
    """One function over a tuple of stacked parameters, an entry for each architecture.

    f(params, x, key)[a][m] = fns[a](params[a][m], x, key of (a, m))

    A loss reduces over the leaves of what it returns, and each leaf keeps the rows as its first axis, so an attack takes
    an ensemble wherever it takes a network.

    Args:
      fns: `apply` or `features` functions `(params, x, key=None)`, one for each architecture.
      over: how the members of one architecture run. "vmap": together, the better choice on an accelerator. "map": one
        after the other, in the memory of one member; on CPU as fast.

    Returns:
      `(params, x, key=None) -> tuple`, an entry for each architecture: a tuple of its members' outputs, `[n, ...]` each
      (pytrees stay pytrees). `params` is a tuple of pytrees whose leaves lead with the members'
      axis; architectures may have different numbers of members.

    >>> import jax.numpy as jnp
    >>> fn = ensemble([lambda w, x, key=None: x @ w])
    >>> [each.shape for each in fn((jnp.ones((2, 3, 5)),), jnp.ones((4, 3)))[0]]
    [(4, 5), (4, 5)]
    """
    if callable(fns) or not len(fns):
        raise ValueError(f"fns: expected a sequence of at least one function, got {fns!r}.")
    checks.one_of("over", over, ("map", "vmap"))
    fns = tuple(fns)

    def ensemble_fn(params: Any, x: Any, key: jax.Array | None = None) -> tuple:
        if not isinstance(params, (tuple, list)) or len(params) != len(fns):
            found = f"a {type(params).__name__}" + (f" of {len(params)}" if hasattr(params, "__len__") else "")
            raise ValueError(f"params: expected a tuple of {len(fns)}, one entry for each function, got {found}.")
        keys = [None] * len(fns) if key is None else list(jax.random.split(key, len(fns)))
        return tuple(_members(fn, own, x, k, over) for fn, own, k in zip(fns, params, keys, strict=True))

    return ensemble_fn


def _members(fn: Callable[..., Any], params: Any, x: Any, key: jax.Array | None, over: str) -> tuple:
    """Every member of one architecture on the same inputs."""
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"params: expected leaves that all lead with the members' axis, got {sorted(counts)}.")
    ((members,),) = counts
    keys = None if key is None else jax.random.split(key, members)
    stacked = tree.each(lambda own, k: fn(own, x, k), params, keys, over=over)
    return tuple(tree.take(stacked, m) for m in range(members))
