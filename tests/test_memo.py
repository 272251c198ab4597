"""`memo`: a result is read back exactly where everything is the same, and made again where anything is not."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax.memo import memo

X = jnp.arange(4.0)
KEY = jax.random.key(0)


@pytest.fixture
def folders(tmp_path):
    """How many results the cache holds."""
    return lambda: len(list((tmp_path / "memo").iterdir()))


def noisy(key, x):
    """A function of a key whose result is awkward to store."""
    return {
        "x": x + jax.random.normal(key, x.shape),
        "half": (x[:2].astype(jnp.bfloat16), None),
        "empty": jnp.zeros((0, 3)),
        "count": jnp.int32(3),
        "scalar": 2.0,
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.dtype == v.dtype and u.weak_type == v.weak_type and u.sharding == v.sharding
        assert u.shape == v.shape and np.asarray(u).tobytes() == np.asarray(v).tobytes()


def test_the_second_call_computes_nothing_and_gives_the_same_arrays(tmp_path, folders):
    ran = []

    def told(key, x):
        jax.debug.callback(lambda: ran.append(1))
        return noisy(key, x)

    first = memo(told, cache_dir=tmp_path)(KEY, X)
    jax.effects_barrier()
    assert len(ran) == 1 and folders() == 1
    same(first, memo(told, cache_dir=tmp_path)(KEY, X))
    jax.effects_barrier()
    assert len(ran) == 1 and folders() == 1
    expected = jax.jit(noisy)(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, first, expected)
    assert memo(lambda x: {}, cache_dir=tmp_path)(X) == {}


def test_whatever_a_result_depends_on_makes_another(tmp_path, folders):
    big = np.arange(5000, dtype=np.float32)
    calls = [
        (lambda x: 2 * x, (X,)),
        (lambda x: 3 * x, (X,)),  # another number in the program
        (lambda x: x + big[:4], (X,)),  # another closed-over array, at the same place of the program
        (lambda x: x + (big + 1)[:4], (X,)),
        (lambda x: x + jnp.sum(jnp.asarray(big)), (X,)),
        (lambda x: x + jnp.sum(jnp.asarray(big + 1)), (X,)),
        (lambda x: 2 * x, (X.at[3].set(7.0),)),  # another content
        (lambda x: 2 * x, (X.astype(jnp.bfloat16),)),
        (lambda k: jax.random.normal(k), (KEY,)),
        (lambda k: jax.random.normal(k), (jax.random.key(1),)),
    ]
    for done, (fn, args) in enumerate(calls):
        np.testing.assert_array_equal(memo(fn, cache_dir=tmp_path)(*args), jax.jit(fn)(*args))
        assert folders() == done + 1
    for fn, args in calls:
        np.testing.assert_array_equal(memo(fn, cache_dir=tmp_path)(*args), jax.jit(fn)(*args))
    assert folders() == len(calls)
    np.testing.assert_array_equal(memo(lambda x, t: t * x, cache_dir=tmp_path)(X, 2.0), 2 * X)  # a Python number


def test_another_process_finds_it_and_a_half_written_one_is_never_taken(tmp_path, folders):
    code = (
        "import sys, jax.numpy as jnp\nfrom mlsec_jax.memo import memo\n"
        "print(memo(lambda x: jnp.tanh(x) * 2, name='tanh', cache_dir=sys.argv[1])(jnp.arange(4.0)).tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    run = lambda: subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True, check=True
    ).stdout
    first = run()
    (folder,) = (tmp_path / "memo").iterdir()
    assert folder.name.startswith("tanh-")
    half = folder.with_name(f".{folder.name}.123")  # what a killed process leaves
    folder.rename(half)
    (half / "_METADATA").unlink()
    assert run() == first and folders() == 2


def test_a_cache_that_cannot_be_written_warns_and_gives_the_result(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        np.testing.assert_array_equal(memo(lambda x: 2 * x, cache_dir=blocked)(X), 2 * X)


@pytest.mark.parametrize("file", ["manifest.ocdbt", "_METADATA"])
def test_a_damaged_result_is_made_again(tmp_path, folders, file):
    twice = memo(lambda x: 2 * x, cache_dir=tmp_path)
    first = twice(X)
    (folder,) = (tmp_path / "memo").iterdir()
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=f"{folder} is damaged, and what it held is made again"):
        same(first, twice(X))
    same(first, twice(X))  # in silence
    assert folders() == 1


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="name: expected letters"):
        memo(lambda x: x, name="../up")
    with pytest.raises(ValueError, match="expected a function that returns plain arrays"):
        memo(jax.random.split, cache_dir=tmp_path)(KEY)


def test_what_is_read_goes_where_it_is_used(tmp_path):
    """A kept result may be spread over a mesh like any other array: it is committed to no device."""
    read = memo(lambda x: 2 * x, cache_dir=tmp_path)
    for result in (read(X), read(X)):
        assert not result.committed
