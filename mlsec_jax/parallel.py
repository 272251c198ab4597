"""Trials, targets and restarts are one axis, spread over a mesh of devices.

The same call runs on one device, on several, and in several processes joined by `jax.distributed`:

    train = spread(lambda key, x: trainer(key, params, data(x))[0], mesh=mesh())
    gather(train(keys, xs))

Inside a device the axis is one word: `inner="map"` runs its rows one after the other (best on CPU, where batching
over weights gains nothing), `inner="vmap"` together (best on accelerators), an integer so many at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlsec_jax import checks
from mlsec_jax.base import auto_axes


def mesh(devices: int | Sequence[jax.Device] | None = None, axis: str = "trials") -> Mesh:
    """A mesh of one axis.

    Args:
      devices: the devices, how many of `jax.devices()` to take, or None for all (those of every process).
      axis: the axis' name.

    Returns:
      The mesh.

    >>> dict(mesh(1).shape)
    {'trials': 1}
    """
    if devices is None:
        devices = jax.devices()
    elif isinstance(devices, (int, np.integer)):
        checks.between("devices", devices, 1, jax.device_count())
        devices = jax.devices()[:devices]
    return Mesh(np.asarray(devices), (axis,))


def spread(
    fn: Callable[..., Any],
    *,
    mesh: Mesh | None = None,
    inner: str | int = "auto",
    in_axes: int | Sequence[int | None] | None = 0,
) -> Callable[..., Any]:
    """Maps `fn` over the leading axis of its arguments, spread over the devices of a mesh.

        spread(fn)(a, b)[i] = fn(a[i], b[i])

    It can be jitted and differentiated like any function; jit it once, outside. A number of rows that the number of
    devices does not divide is filled up with copies of the last row, and the copies' results are cut off; their
    derivative is zero. Under `inner="map"` each row runs the same program whatever the number of devices and rows,
    and the tests hold it to the same bits on 1, 2 and 8 devices and in 2 processes; under "vmap" and an integer the
    batch's size, hence the last bits, depends on them.

    Args:
      fn: any function of pytrees of arrays (typed keys too) to a pytree of arrays.
      mesh: a mesh of one axis; None for `parallel.mesh()`, all devices.
      inner: inside a device: "map" (`lax.map`), "vmap", an integer (`lax.map` over `vmap`s of that many rows, to bound
        memory), or "auto": "map" on CPU, "vmap" elsewhere.
      in_axes: 0 for arguments that are mapped, None for arguments that every row gets whole; one for all or one each.

    Returns:
      A function of the same arguments, mapped ones with a leading `[n]`, to results with a leading `[n]`.

    >>> spread(lambda x, y: x * y, in_axes=(0, None))(jnp.arange(3.0), jnp.float32(2)).tolist()
    [0.0, 2.0, 4.0]
    """
    _check_inner(inner)
    _check_in_axes(in_axes)

    def mapped(*args):
        devices = _mesh() if mesh is None else auto_axes(mesh)
        axes = _one_each(in_axes, args)
        num_rows = _num_rows(axes, args)
        fill = -num_rows % devices.size
        filled = [arg if axis is None else _fill(arg, fill) for axis, arg in zip(axes, args)]
        word = ("map" if devices.devices.flat[0].platform == "cpu" else "vmap") if inner == "auto" else inner
        rows = PartitionSpec(devices.axis_names)
        out = jax.shard_map(
            lambda *local: _map_rows(fn, word, axes, local),
            mesh=devices,
            in_specs=tuple(PartitionSpec() if axis is None else rows for axis in axes),
            out_specs=rows,
            check_vma=False,  # nothing crosses devices in here; the check would refuse scans that start from constants
        )(*filled)
        return jax.tree.map(lambda leaf: leaf[:num_rows], out) if fill else out

    return mapped


def chunked(
    fn: Callable[..., Any], size: int, *, in_axes: int | Sequence[int | None] | None = 0
) -> Callable[..., Any]:
    """Maps `fn` over the leading axis of its arguments, `size` rows at a time: `vmap` in the memory of `size` rows.

    Args:
      fn: any function of pytrees of arrays.
      size: rows at a time; the last chunk may be smaller.
      in_axes: as in `spread`.

    Returns:
      A function of the same arguments, mapped ones with a leading `[n]`, to results with a leading `[n]`.

    >>> chunked(lambda x: 2 * x, 2)(jnp.arange(3)).tolist()
    [0, 2, 4]
    """
    checks.count("size", size, 1)
    _check_in_axes(in_axes)

    def mapped(*args):
        axes = _one_each(in_axes, args)
        _num_rows(axes, args)
        return _map_rows(fn, size, axes, args)

    return mapped


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Lays the leading axis of every array over the devices of a mesh.

    Args:
      tree: a pytree of arrays `[n, ...]` (for instance `Data`), n a multiple of the number of devices. Under several
        processes each passes the same whole arrays.
      mesh: the mesh.

    Returns:
      The same values, placed with a `NamedSharding`; a jitted function that gets them runs on all devices.

    >>> shard_batch(jnp.arange(4), mesh(1)).sharding.num_devices
    1
    """
    num_rows = _num_rows((0,), (tree,))
    if num_rows % mesh.size:
        raise ValueError(
            f"tree: expected a number of rows that {mesh.size} devices divide, got {num_rows} "
            "(reserve rows of weight 0)."
        )
    return jax.device_put(tree, NamedSharding(auto_axes(mesh), PartitionSpec(mesh.axis_names)))


def gather(tree: Any) -> Any:
    """NumPy copies on this host of arrays that may be spread over devices and processes (then every process calls it).

    Typed keys, which NumPy has not, stay what they are, on one device.

    >>> gather(shard_batch(jnp.arange(4), mesh(1))).tolist()
    [0, 1, 2, 3]
    """

    def whole(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        return np.asarray(leaf) if local else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def _check_inner(inner: str | int) -> None:
    if isinstance(inner, int):
        checks.count("inner", inner, 1)
    else:
        checks.one_of("inner", inner, ("auto", "vmap", "map"))


def _check_in_axes(in_axes: int | Sequence[int | None] | None) -> None:
    for axis in in_axes if isinstance(in_axes, Sequence) else (in_axes,):
        checks.one_of("in_axes", axis, (0, None))


def _one_each(in_axes: int | Sequence[int | None] | None, args: Sequence[Any]) -> tuple[int | None, ...]:
    axes = tuple(in_axes) if isinstance(in_axes, Sequence) else (in_axes,) * len(args)
    if len(axes) != len(args):
        raise ValueError(f"in_axes: expected one entry for each of {len(args)} arguments, got {len(axes)}.")
    return axes


def _num_rows(axes: Sequence[int | None], args: Sequence[Any]) -> int:
    """The one leading size of all mapped arrays."""
    shapes = [np.shape(leaf) for axis, arg in zip(axes, args) if axis == 0 for leaf in jax.tree.leaves(arg)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(f"mapped arguments: expected arrays of one leading size of at least 1, got shapes {shapes}.")
    return shapes[0][0]


def _fill(tree: Any, fill: int) -> Any:
    """Appends `fill` copies of the last row."""
    if not fill:
        return tree
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[-1:]] * fill]), tree)


def _map_rows(fn: Callable[..., Any], inner: str | int, axes: Sequence[int | None], args: Sequence[Any]) -> Any:
    """Maps `fn` over the rows on one device."""

    def one(rows):
        rows = iter(rows)
        return fn(*[arg if axis is None else next(rows) for axis, arg in zip(axes, args)])

    rows = [arg for axis, arg in zip(axes, args) if axis == 0]
    if inner == "vmap":
        return jax.vmap(one)(rows)
    return jax.lax.map(one, rows, batch_size=inner if isinstance(inner, int) else None)


_mesh = mesh  # `spread` has an argument of that name
