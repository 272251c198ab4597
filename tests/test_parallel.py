"""One axis over devices and processes, same bits. `python tests/test_parallel.py OUT [PORT RANK]` is one process."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import models, parallel
from mlsec_jax.base import Algorithm, Data, Known
from mlsec_jax.drive import drive
from mlsec_jax.parallel import chunked, gather, shard_batch, spread

# NumPy, because no JAX call may come before `jax.distributed.initialize`.
DATA = Data(
    x=np.sin(np.arange(60, dtype=np.float32)).reshape(12, 5),
    y=np.cos(np.arange(12, dtype=np.float32)),
    weight=np.linspace(0.5, 1.5, 12, dtype=np.float32),
)


def train(key, options, data):
    """A small network trained from its own start: `(params, losses)`."""
    first, second = jax.random.split(key)
    params = {"a": 0.3 * jax.random.normal(first, (5, 7)), "b": 0.3 * jax.random.normal(second, (7,))}

    def loss(params):
        return jnp.mean(data.weight * jnp.square(jnp.tanh(data.x @ params["a"]) @ params["b"] - data.y))

    def step(params, _):
        value, grad = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - options["rate"] * g, params, grad), value

    return jax.lax.scan(step, params, length=5)


train_one = jax.jit(train)


def rows(n):
    return jax.random.split(jax.random.key(2), n), {"rate": jnp.linspace(0.1, 0.5, n)}


def sharded_descent():
    """Eight restarts as one `Algorithm` whose state is spread over the devices."""

    def init(key, subject, known):
        del known
        return shard_axis(jax.vmap(lambda k: jax.random.normal(k, (5,)))(jax.random.split(key, 8)))

    def shard_axis(x):
        return jax.lax.with_sharding_constraint(x, jax.NamedSharding(parallel.mesh(), jax.P("trials")))

    def row(key, x, data):
        grad = jax.grad(lambda x: jnp.mean(jnp.square(data.x @ x - data.y)))(x)
        return x - 0.1 * grad + 0.01 * jax.random.normal(key, x.shape), {"norm": jnp.sum(jnp.square(x))}

    def step(key, state, subject, known):
        del known
        return spread(row, in_axes=(0, 0, None))(jax.random.split(key, 8), state, subject)

    return Algorithm(init, step, lambda state, subject: state)


def results():
    """Name -> result. `close` ones depend on a batch's size or a sum's order; the others have to be equal to the last
    bit however many devices and processes there are."""
    keys, options = rows(5)

    def total(options, data):
        out = spread(train, in_axes=(0, 0, None))(keys, options, data)
        return jnp.sum(out[1]), out

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (close_total, out), (grad, close_grad) = both(options, DATA)
    yield from {"train5": out, "grad": grad, "close_total": close_total, "close_grad": close_grad}.items()
    yield "train8", jax.jit(spread(train, in_axes=(0, 0, None)))(*rows(8), DATA)
    yield "close_vmap", jax.jit(spread(train, in_axes=(0, 0, None), inner="vmap"))(keys, options, DATA)
    made = jax.make_mesh((jax.device_count(),), ("rows",))
    assert gather(spread(lambda key: key)(keys)).is_fully_addressable
    yield "made_mesh", jax.jit(spread(train, in_axes=(0, 0, None), mesh=made))(keys, options, DATA)
    yield "shard_batch", shard_batch(DATA, parallel.mesh(min(2, jax.device_count())))


def named(pairs):
    """Name -> array, by leaf."""
    return {f"{name}/{i}": leaf for name, tree in pairs for i, leaf in enumerate(jax.tree.leaves(gather(tree)))}


def sharded_drive():
    """A sharded state goes through death and resume unchanged, and stays sharded."""
    args = (sharded_descent(), jax.random.key(4), DATA, Known())
    whole = drive(*args, num_steps=9, chunk=5)
    with tempfile.TemporaryDirectory() as folder:
        drive(*args, num_steps=4, chunk=2, checkpoint_dir=folder)
        resumed = drive(*args, num_steps=9, chunk=5, checkpoint_dir=folder)
    for state, infos in (whole, resumed):
        assert len(state.sharding.device_set) == jax.device_count()
        assert state.addressable_shards[0].data.shape == (8 // jax.device_count(), 5)
        assert infos["norm"].shape == (9, 8)
    np.testing.assert_array_equal(whole[0], resumed[0])
    np.testing.assert_array_equal(whole[1]["norm"], resumed[1]["norm"])
    yield "drive", whole


def load(path):
    with np.load(path) as file:
        return dict(file)


def launch(out, devices, port=None, rank=None):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(parallel.__file__).parent.parent),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    words = [] if port is None else [str(port), str(rank)]
    return subprocess.Popen([sys.executable, "-W", "error", __file__, str(out), *words], env=environment)


def test_same_bits_on_1_2_8_devices_and_in_2_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [launch(tmp_path / f"{n}.npz", n) for n in (1, 2, 8)]
    processes += [launch(tmp_path / f"rank{rank}.npz", 1, port, rank) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=150) for process in processes] == [0] * 5
    finally:
        for process in processes:
            process.kill()
    expected = load(tmp_path / "1.npz")
    assert expected["devices"] == 1
    for name, devices, count in (("2", 2, 1), ("8", 8, 1), ("rank0", 2, 2), ("rank1", 2, 2)):
        got = load(tmp_path / f"{name}.npz")
        assert (got["devices"], got["processes"]) == (devices, count)
        for entry in set(expected) - {"devices", "processes"}:
            if entry.startswith("drive") and count > 1:
                continue  # checkpoints are for a single process
            if entry.startswith("close"):
                np.testing.assert_allclose(got[entry], expected[entry], rtol=1e-4, atol=1e-6, err_msg=entry)
            else:
                np.testing.assert_array_equal(got[entry], expected[entry], err_msg=f"{name} {entry}")


@pytest.mark.parametrize("inner", ["auto", "vmap", 2])
def test_spread_is_a_loop(inner):
    keys, options = rows(5)
    got = jax.jit(spread(train, in_axes=(0, 0, None), inner=inner))(keys, options, DATA)
    loop = [train_one(keys[i], {"rate": options["rate"][i]}, DATA) for i in range(5)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), got, expected)


def test_a_mesh_of_jaxs_own_is_as_good():
    """`jax.make_mesh` makes axes explicit unless told otherwise."""
    made = jax.make_mesh((1,), ("rows",))
    assert made.axis_types == (jax.sharding.AxisType.Explicit,)
    x = jnp.arange(128.0).reshape(2, 8, 8, 1)
    np.testing.assert_array_equal(spread(jnp.sin, mesh=made, inner="map")(x), spread(jnp.sin, inner="map")(x))
    np.testing.assert_array_equal(models.max_pool(shard_batch(x, made)), models.max_pool(x))


def test_devices_are_counted_in_numpys_integers_too():
    assert parallel.mesh(np.int64(1)) == parallel.mesh(1)


def test_gather_keeps_typed_keys():
    keys, _ = rows(4)
    got = gather({"keys": shard_batch(keys, parallel.mesh(1))})["keys"]
    assert got.dtype == keys.dtype and bool(jnp.all(got == keys))


def test_chunked_is_vmap():
    keys, options = rows(5)
    draw = lambda key, options, data: options["rate"] * jax.random.normal(key, (3,)) + data.x[:3, 0]
    expected = jax.vmap(draw, in_axes=(0, 0, None))(keys, options, DATA)
    np.testing.assert_allclose(chunked(draw, 2, in_axes=(0, 0, None))(keys, options, DATA), expected, rtol=1e-6)


def test_inner_map_holds_one_row_in_memory():
    def wide(x):
        return jnp.sum(jnp.sort(jnp.broadcast_to(x, (1000,)) * jnp.arange(1000.0)))

    def room(fn):
        return jax.jit(fn).lower(jnp.arange(512.0)).compile().memory_analysis().temp_size_in_bytes

    assert room(spread(wide, inner="map")) < room(chunked(wide, 8)) < room(spread(wide, inner="vmap")) / 10


def test_one_clear_error():
    keys, options = rows(4)
    whole = spread(train, in_axes=(0, 0, None))
    with pytest.raises(ValueError, match=r"one leading size of at least 1, got shapes \[\(4,\), \(3,\)\]"):
        whole(keys, {"rate": jnp.ones(3)}, DATA)
    with pytest.raises(ValueError, match=r"got shapes \[\(\)\]"):
        spread(jnp.sin)(1.0)
    with pytest.raises(ValueError, match=r"got shapes \[\(0,\)\]"):
        chunked(jnp.sin, 2)(jnp.ones(0))
    with pytest.raises(ValueError, match="in_axes: expected one entry for each of 2 arguments, got 3"):
        whole(keys, options)
    with pytest.raises(ValueError, match="in_axes: expected one of 0, None, got 1"):
        spread(jnp.sin, in_axes=1)
    with pytest.raises(ValueError, match="inner: expected one of 'auto', 'vmap', 'map', got 'scan'"):
        spread(jnp.sin, inner="scan")
    with pytest.raises(ValueError, match="inner: expected an integer of at least 1, got 0"):
        spread(jnp.sin, inner=0)
    with pytest.raises(ValueError, match="size: expected an integer of at least 1"):
        chunked(jnp.sin, 0)
    with pytest.raises(ValueError, match="devices: expected between 1 and"):
        parallel.mesh(10_000)


if __name__ == "__main__":
    out, *joined = sys.argv[1:]
    if joined:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{joined[0]}", num_processes=2, process_id=int(joined[1]))
    entries = named(results())
    if joined:
        with pytest.raises(ValueError, match="checkpoint_dir: expected a single process, got 2"):
            drive(sharded_descent(), jax.random.key(4), DATA, Known(), num_steps=1, checkpoint_dir=f"{out}.d")
    else:
        entries |= named(sharded_drive())
    if jax.device_count() > 1:
        with pytest.raises(ValueError, match="devices divide, got 11"):
            shard_batch(jnp.ones(11), parallel.mesh(2))
    np.savez(out, devices=jax.device_count(), processes=jax.process_count(), **entries)
