"""The few types everything else is made of: values, and the functions that act on them.

Values are pytrees with static shapes (`Data`, `Known`). Methods are plain functions, or named tuples of plain
functions (`Algorithm`, `Threat`, `Trainer`). Whatever acts takes a `key` first and returns `(thing, info)`: `info`
is what a human wants to see, never what the next step needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

Params = Any  # any pytree of arrays
Info = Any  # any pytree of arrays; a dict by convention
Key = jax.Array

# Model functions. `key=None` is evaluation, a key is training (dropout).
ApplyFn = Callable[..., jax.Array]  # (params, x [n, ...], key=None) -> logits [n, c]
LossFn = Callable[..., jax.Array]  # (params, data, key=None) -> losses [n]
OuterFn = Callable[[Params, "Data", Any], jax.Array]  # (params, data, goal) -> scalar, minimised


class Data(NamedTuple):
    """Rows of labelled data, each with a weight.

    Rows are never dropped: a removed row has weight 0, and an appended poison fills a row reserved beforehand
    (`mlsec_jax.threat.reserve`). Law: weight 0 equals absence.

    Attributes:
      x: inputs, a pytree of `[n, ...]` leaves (usually one array).
      y: labels, integer `[n]`, real `[n]` (regression) or soft `[n, c]`.
      weight: `[n]`, non-negative.
    """

    x: Any
    y: jax.Array
    weight: jax.Array

    @property
    def num_rows(self) -> int:
        """The number of physical rows, those of weight 0 included."""
        return self.y.shape[0]


def dataset(x: Any, y: Any, weight: Any = None) -> Data:
    """Makes `Data` from arrays; every row weighs 1 unless told otherwise.

    Args:
      x: inputs `[n, ...]`, or a pytree of them.
      y: labels `[n]` or `[n, c]`.
      weight: `[n]`, or None for ones, in the dtype of the first floating input, at least float32, for half precision can't
        count rows; integers and booleans get that dtype too.

    Returns:
      The `Data`.

    >>> dataset(jnp.zeros((3, 2)), jnp.array([0, 1, 0])).weight.shape
    (3,)
    """
    x = jax.tree.map(jnp.asarray, x)
    y = jnp.asarray(y)
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError("x: expected at least one array, got an empty pytree.")
    for leaf in leaves:
        if leaf.ndim == 0 or y.ndim == 0 or leaf.shape[0] != y.shape[0]:
            raise ValueError(f"x and y: expected the same number of rows, got {leaf.shape} and {y.shape}.")
    floating = [leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    weight = jnp.ones(y.shape[:1], bool) if weight is None else jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        weight = weight.astype(np.promote_types(floating[0], np.float32) if floating else jnp.float32)
    if weight.shape != y.shape[:1]:
        raise ValueError(f"weight: expected shape {y.shape[:1]}, got {weight.shape}.")
    return Data(x, y, weight)


def auto_axes(mesh: Mesh) -> Mesh:
    """The same devices under axes that the compiler lays out, which `jax.make_mesh` gives only when asked.

    >>> auto_axes(jax.make_mesh((1,), ("rows",))).axis_types
    (Auto,)
    """
    return Mesh(mesh.devices, mesh.axis_names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
    """What an actor may see. With the `Threat` it is the threat model, visible at the call site.

    Attacker and defender each have their own. Every field is optional; a method asks for what it needs through
    `require` and fails with one clear sentence. The record is closed: a typo is an error.

    Attributes:
      params: the victim's initial (or trained) parameters.
      clean: trusted clean `Data`.
      holdout: `Data` kept for validation.
      goal: what the attacker wants, as `Data` carrying the labels it desires (or whatever its `outer` reads).
      population: `Data` of the same population, for membership and shadow models.
      shadows: stacked parameters of shadow models.
      surrogates: stacked parameters of the attacker's own models.
      trigger: a backdoor trigger.
      query: `x -> posteriors`, black-box access (static: it is a function, not an array).
    """

    params: Any = None
    clean: Any = None
    holdout: Any = None
    goal: Any = None
    population: Any = None
    shadows: Any = None
    surrogates: Any = None
    trigger: Any = None
    query: Callable | None = dataclasses.field(default=None, metadata={"static": True})

    def require(self, field: str, by: str) -> Any:
        """Returns the field, or says which method needs it.

        >>> Known().require("goal", by="attacks.bilevel")
        Traceback (most recent call last):
        ...
        ValueError: attacks.bilevel needs known.goal, and it is None: pass Known(goal=...).
        """
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"{by} needs known.{field}, and it is None: pass Known({field}=...).")
        return value

    def replace(self, **changes: Any) -> Known:
        """The same record with some fields changed."""
        return dataclasses.replace(self, **changes)


class Algorithm(NamedTuple):
    """Something that improves step by step.

    For a poisoning attack the subject is always the training `Data`, the state holds the poison, and `read`
    embeds it.

    Attributes:
      init: `(key, subject, known) -> state`.
      step: `(key, state, subject, known) -> (state, info)`; the state's type is fixed.
      read: `(state, subject) -> subject'`.
    """

    init: Callable[[Key, Any, Known], Any]
    step: Callable[[Key, Any, Any, Known], tuple[Any, Info]]
    read: Callable[[Any, Any], Any]


class Threat(NamedTuple):
    """What the attacker may touch, and how much. Radii are in the data's own units.

    Attributes:
      init: `(key, data) -> poison`, the starting point.
      project: `(poison, data) -> poison`, the nearest feasible poison. A zero budget gives the input back bit for bit.
      embed: `(poison, data) -> Data`, the training set that the victim sees.
      rows: `[k]`, the rows that the poison's leading axis stands for; None when it has no such axis.
    """

    init: Callable[[Key, Data], Any]
    project: Callable[[Any, Data], Any]
    embed: Callable[[Any, Data], Data]
    rows: Any = None


def _no_probe(key: Key, params: Params, data: Data, cotangent: Params) -> dict[str, jax.Array]:
    """The probe of a trainer whose derivative has nothing to confess: it is exact."""
    del key, params, data, cotangent
    return {}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How the victim learns, and how JAX differentiates through it. It is called like a function of data.

    `trainer(key, params, data) -> (params, info)`; `jax.grad` goes through it to `data` (and, unless the
    constructor says otherwise, to `params`). A plain function of that signature is as good a trainer anywhere in
    the library; this record adds what `bilevel.diagnose` wants to know.

    Attributes:
      fit: `(key, params, data) -> (params, info)`.
      probe: `(key, params, data, cotangent) -> dict`, numbers on the quality of the derivative at `data`:
        `stationarity`, `residual`, `drift`, or an integer `pattern` (active set) that must not change under a
        finite difference.
      batched: `(during) -> Trainer`, the same trainer with a transform applied to each batch; None when it has no
        batches.
    """

    fit: Callable[[Key, Params, Data], tuple[Params, Info]]
    probe: Callable[[Key, Params, Data, Params], dict[str, jax.Array]] = _no_probe
    batched: Callable[[Any], Any] | None = None

    def __call__(self, key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        """Trains: the same as `fit`."""
        return self.fit(key, params, data)


Transform = Callable[[Key, Any, Known], tuple[Any, Info]]  # (key, subject, known) -> (subject', info)
Scorer = Callable[[Key, Params, Data, Known], jax.Array]  # -> scores [n], higher = more suspicious
Inspector = Callable[[Key, Params, Known], Any]  # -> a record with one entry a label
