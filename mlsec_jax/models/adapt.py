"""Networks of Flax linen, Flax nnx, Haiku and Equinox as a `Model`: pure functions over a pytree of parameters.

Every adapter gives parameters of one form,

    {"params": what is trained, "state": what is not (batch-norm statistics; may be empty)},

so that stacked ensembles carry a state for each member. The state is frozen: `apply` reads it through
`stop_gradient` and never updates it, with a key or without. Trainers, solvers and clipping act on what
`trainable=adapt.trainable` chooses; without it a penalty would shrink the statistics too.

The libraries are imported when an adapter is called; Haiku and Equinox are optional. Their convolutions are XLA's own,
whose gradients are 3 to 100 times slower inside a loop on CPU. Flax takes another one:
`nn.Conv(..., conv_general_dilated=adapt.loop_safe_conv)`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mlsec_jax import checks
from mlsec_jax.base import Params
from mlsec_jax.models._conv import grouped_conv
from mlsec_jax.models._model import Model, row_spec

FlagsFn = Callable[[bool], dict[str, Any]]


def trainable(path: str, leaf: Any) -> bool:
    """Chooses the trained leaves of an adapted network: `unrolled(..., trainable=adapt.trainable)`.

    >>> trainable("params/Dense_0/kernel", None), trainable("state/batch_stats/mean", None)
    (True, False)
    """
    del leaf
    return path.split("/", 1)[0] == "params"


def linen(module: Any, *, flags_fn: FlagsFn | None = None, features_method: Any = None) -> Model:
    """Adapts a `flax.linen` module.

    Args:
      module: the module; it is called on a batch `[n, ...]`.
      flags_fn: `train -> keyword arguments` of the call, such as `lambda train: {"deterministic": not train}`. Batch
        norm must use its running averages in both cases (flax raises if it tries to update them).
      features_method: the module's method (or its name) that computes the features. Without it `features` raises.

    Returns:
      A `Model`; `state` holds every collection but "params". A trained network's parameters are
      `{"params": variables["params"], "state": the other collections}`.

    >>> import flax.linen as nn
    >>> model = linen(nn.Dense(3))
    >>> model.apply(model.init(jax.random.key(0), jnp.ones((2, 5))), jnp.ones((2, 5))).shape
    (2, 3)
    """
    flags = flags_fn or _no_flags

    def init(key: jax.Array, x: Any) -> Params:
        variables = dict(module.init({"params": key, "dropout": key}, _example(x), **flags(False)))
        return {"params": variables.pop("params", {}), "state": variables}

    def call(params: Params, x: jax.Array, key: jax.Array | None, method: Any) -> Any:
        checks.floating("x", x)
        variables = {"params": params["params"], **lax.stop_gradient(params["state"])}
        rngs = None if key is None else {"dropout": key}
        return module.apply(variables, x, method=method, rngs=rngs, **flags(key is not None))

    return _model(init, call, features_method, "features_method")


def nnx(create_fn: Callable[[Any], Any], *, features_method: str | None = None) -> Model:
    """Adapts a `flax.nnx` module.

    `deterministic` is switched off when a key is given, and `use_running_average` is on always.

    Args:
      create_fn: `rngs -> module`, the module's constructor.
      features_method: name of the method that computes the features. Without it `features` raises.

    Returns:
      A `Model`; `params` and `state` are `nnx.State`s. `adapt.nnx_params` takes those of a trained module.

    >>> from flax import nnx as flax_nnx
    >>> model = nnx(lambda rngs: flax_nnx.Linear(5, 3, rngs=rngs))
    >>> model.apply(model.init(jax.random.key(0), jnp.ones((2, 5))), jnp.ones((2, 5))).shape
    (2, 3)
    """
    flax_nnx = _library("flax.nnx", "nnx")
    graph, _, streams, _ = flax_nnx.split(create_fn(flax_nnx.Rngs(0)), flax_nnx.Param, flax_nnx.RngState, ...)

    def init(key: jax.Array, x: Any) -> Params:
        del x
        return nnx_params(create_fn(flax_nnx.Rngs(key)))

    def call(params: Params, x: jax.Array, key: jax.Array | None, method: str | None) -> Any:
        checks.floating("x", x)
        # Copies: the merged module's counters advance, and must not do so in the captured ones.
        own_streams = jax.tree.map(jnp.copy, streams)
        module = flax_nnx.merge(graph, params["params"], own_streams, lax.stop_gradient(params["state"]))
        module.set_attributes(deterministic=key is None, use_running_average=True, raise_if_not_found=False)
        if key is not None:
            flax_nnx.reseed(module, default=key, dropout=key)
        return getattr(module, method or "__call__")(x)

    return _model(init, call, features_method, "features_method")


def nnx_params(module: Any) -> Params:
    """The parameters of a `flax.nnx` module, trained or not, as `adapt.nnx` wants them."""
    flax_nnx = _library("flax.nnx", "nnx")
    _, params, _, state = flax_nnx.split(module, flax_nnx.Param, flax_nnx.RngState, ...)
    return {"params": params, "state": state}


def haiku(
    forward_fn: Callable[..., Any],
    *,
    flags_fn: FlagsFn | None = None,
    features_fn: Callable[..., Any] | None = None,
    init_flags: dict[str, Any] | None = None,
) -> Model:
    """Adapts a Haiku function.

    Args:
      forward_fn: `(x, **flags) -> logits`, what one would give to `hk.transform`.
      flags_fn: `train -> flags`, such as `lambda train: {"dropout": train}`. Batch norm must be called with
        `is_training=False` in both cases: a call that changes the state raises.
      features_fn: like `forward_fn`, for the features, with modules of the same names. Without it `features` raises.
      init_flags: the flags of `init`, whose default is `flags_fn(False)`. Batch norm wants `{"is_training": True}` here
        and False from `flags_fn`, since Haiku creates its statistics, at zero, in training alone.

    Returns:
      A `Model`. A trained network's parameters are `{"params": params, "state": state}` of Haiku's own.
    """
    hk = _library("haiku", "haiku")
    flags = flags_fn or _no_flags
    functions: dict[Any, Any] = {None: hk.transform_with_state(forward_fn)}
    if features_fn is not None:
        functions[features_fn] = hk.transform_with_state(features_fn)

    def init(key: jax.Array, x: Any) -> Params:
        params, state = functions[None].init(key, _example(x), **(flags(False) if init_flags is None else init_flags))
        return {"params": params, "state": state}

    def call(params: Params, x: jax.Array, key: jax.Array | None, method: Any) -> Any:
        checks.floating("x", x)
        frozen = lax.stop_gradient(params["state"])
        out, state = functions[method].apply(params["params"], frozen, key, x, **flags(key is not None))
        if any(a is not b for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(frozen), strict=True)):
            raise ValueError("forward_fn: expected a frozen state; call its batch norm with is_training=False.")
        return out

    return _model(init, call, features_fn, "features_fn")


def equinox(create_fn: Callable[[jax.Array], Any], *, features_method: str | None = None) -> Model:
    """Adapts an Equinox module, which is called on one row: `module(row, key=...)`.

    Args:
      create_fn: `key -> module`, or `key -> (module, state)` as `eqx.nn.make_with_state` gives. A stateful module is
        called as `module(row, state, key=...)`; its batch norm stays in inference mode.
      features_method: name of the method that computes the features, with the same arguments. Without it `features`
        raises.

    Returns:
      A `Model`. `adapt.equinox_params` takes the parameters of a trained module.
    """
    eqx = _library("equinox", "equinox")
    template = create_fn(jax.random.key(0))
    stateful = isinstance(template, tuple)
    static = eqx.partition(template[0] if stateful else template, eqx.is_inexact_array)[1]

    def init(key: jax.Array, x: Any) -> Params:
        del x
        created = create_fn(key)
        return equinox_params(*created) if stateful else equinox_params(created)

    def call(params: Params, x: jax.Array, key: jax.Array | None, method: str | None) -> Any:
        checks.floating("x", x)
        module = _set_inference(eqx, eqx.combine(params["params"], static), key is None)
        state = lax.stop_gradient(params["state"])
        keys = None if key is None else jax.random.split(key, x.shape[0])

        def one(row: jax.Array, key: jax.Array | None) -> Any:
            function = getattr(module, method or "__call__")
            return function(row, state, key=key)[0] if stateful else function(row, key=key)

        return jax.vmap(one)(x, keys)

    return _model(init, call, features_method, "features_method")


def equinox_params(module: Any, state: Any = None) -> Params:
    """The parameters of an Equinox module (and its state), trained or not, as `adapt.equinox` wants them."""
    eqx = _library("equinox", "equinox")
    return {"params": eqx.filter(module, eqx.is_inexact_array), "state": {} if state is None else state}


def _set_inference(eqx: Any, module: Any, inference: bool) -> Any:
    """Sets the `inference` flag of every submodule that has one; of batch norm always to True."""
    has_flag = lambda node: hasattr(node, "inference")
    flagged = lambda tree: [n for n in jax.tree.leaves(tree, is_leaf=has_flag) if has_flag(n)]
    if not flagged(module):
        return module
    where = lambda tree: [node.inference for node in flagged(tree)]
    values = [inference or isinstance(node, eqx.nn.BatchNorm) for node in flagged(module)]
    return eqx.tree_at(where, module, values)


def loop_safe_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`models.conv` with the arguments of `lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=...)`.

    Takes what Flax's layers ask for: channels last, one or two spatial directions, any stride, padding, dilation and
    feature groups. Whatever else is asked for raises.

    Args:
      lhs: inputs `[n, h, w, c]` or `[n, w, c]`.
      rhs: kernel `[kh, kw, c / groups, o]` or `[kw, c / groups, o]`.
      window_strides: strides, one a direction.
      padding: "SAME", "VALID" or pairs.
      lhs_dilation: dilation of the inputs.
      rhs_dilation: dilation of the kernel.
      dimension_numbers: None, or those of channels-last.
      feature_group_count: groups of channels.
      batch_group_count: 1.
      precision: None.
      preferred_element_type: None, or the inputs' dtype.
      out_sharding: None; rows are sharded like those of the inputs.
    """
    space = lhs.ndim - 2
    if space not in (1, 2):
        raise ValueError(f"lhs: expected one or two spatial directions, got shape {lhs.shape}.")
    last = lax.ConvDimensionNumbers(
        (0, space + 1, *range(1, space + 1)), (space + 1, space, *range(space)), (0, space + 1, *range(1, space + 1))
    )
    labels = (("NWC", "WIO", "NWC"), ("NHWC", "HWIO", "NHWC"))[space - 1]
    if dimension_numbers is not None and dimension_numbers not in (last, labels):
        raise ValueError(f"dimension_numbers: expected {labels}, got {dimension_numbers}.")
    for name, value, allowed in (
        ("batch_group_count", batch_group_count, (1,)),
        ("precision", precision, (None,)),
        ("out_sharding", out_sharding, (None,)),
        ("preferred_element_type", preferred_element_type, (None, lhs.dtype)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}.")
    options = [tuple(window_strides), tuple(lhs_dilation or (1,) * space), tuple(rhs_dilation or (1,) * space)]
    if not isinstance(padding, str):
        padding = tuple(tuple(pair) for pair in padding)
    if space == 1:
        lhs, rhs = lhs[:, None], rhs[None]
        options = [(1, *option) for option in options]
        padding = padding if isinstance(padding, str) else ((0, 0), *padding)
    groups = feature_group_count
    x = jnp.moveaxis(lhs.reshape(*lhs.shape[:3], groups, -1), 3, 0)
    kernel = jnp.moveaxis(rhs.reshape(*rhs.shape[:3], groups, -1), 3, 0)
    stride, input_dilation, kernel_dilation = options
    out = grouped_conv(
        x,
        kernel,
        stride=stride,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
    )
    out = jnp.moveaxis(out, 0, 3).reshape(*out.shape[1:4], -1)
    return out[:, 0] if space == 1 else out


def _example(x: Any) -> jax.Array:
    """A batch of zeros like the one given, or of one row of the given shape."""
    shape, dtype = row_spec(x)
    return jnp.zeros((1 if isinstance(x, tuple) else x.shape[0], *shape), dtype)


def _no_flags(train: bool) -> dict[str, Any]:
    """A module that is called the same way in training and in evaluation."""
    del train
    return {}


def _model(init: Callable, call: Callable, features: Any, option: str) -> Model:
    """A `Model` of one call; its features need the option that says how to compute them."""

    def apply(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return call(params, x, key, None)

    def features_fn(params: Params, x: jax.Array, key: jax.Array | None = None) -> Any:
        if features is None:
            raise ValueError(f"features: this network was adapted without any: pass {option}= to the adapter.")
        return call(params, x, key, features)

    return Model(init, apply, features_fn)


def _library(module: str, name: str) -> Any:
    """Imports an optional library, or says which adapter wanted it."""
    if importlib.util.find_spec(module.split(".", maxsplit=1)[0]) is None:
        raise ImportError(f"adapt.{name} needs {module}, which is not installed.")
    return importlib.import_module(module)
