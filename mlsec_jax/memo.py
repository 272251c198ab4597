"""Results kept on disk: what a slow function of arrays once gave, such as a pre-trained network, is read from then on."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mlsec_jax import __version__
from mlsec_jax.data import cache_root


def memo(
    fn: Callable[..., Any], *, name: str = "memo", cache_dir: str | os.PathLike[str] | None = None
) -> Callable[..., Any]:
    """The same function, jitted, with its results kept in the user's cache folder.

    A result is known by everything that it depends on: the program that `fn` compiles to (so the network's
    architecture, the recipe and whatever else `fn` closes over), the content of its arguments, the versions of this
    library and of JAX, and the devices. Whenever one of them changes, `fn` runs again. It must be a function of its
    arguments alone, as everything under `jit` must. To look a result up costs the tracing of `fn`, a few seconds for
    a deep network, and the hashing of the arguments.

    Args:
      fn: a function of pytrees of arrays (typed keys too) to a pytree of arrays, without keys.
      name: the first part of the folder's name, for people who look into the cache. It changes no result.
      cache_dir: None for `data.cache_root()`. Single process only.

    Returns:
      A function of the same arguments. A folder appears under its final name only when it is complete, so a process
      killed while it writes leaves nothing that could be taken for a result, and several may race. A cache that
      cannot be written, or was damaged since, costs time, not the result: it warns.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> calls = []
    >>> slow = lambda x: calls.append("traced") or 2 * x
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [memo(slow, cache_dir=folder)(jnp.ones(2)).tolist() for _ in range(2)]
    [[2.0, 2.0], [2.0, 2.0]]
    """
    if not name or any(not (c.isalnum() or c in "._-") for c in name) or name.startswith("."):
        raise ValueError(f"name: expected letters, digits, '.', '_' and '-' only, got {name!r}.")

    @functools.wraps(fn)
    def kept(*args: Any) -> Any:
        if jax.process_count() > 1:
            raise ValueError(f"memo: expected a single process, got {jax.process_count()}.")
        from mlsec_jax import _checkpoint  # orbax takes half a second to import

        traced = jax.jit(fn).trace(*args)
        leaves, structure = jax.tree.flatten(traced.out_info)
        if any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
            raise ValueError("fn: expected a function that returns plain arrays; take jax.random.key_data of its keys.")
        lowered = traced.lower()
        folder = cache_root(cache_dir).absolute() / "memo" / f"{name}-{_digest(lowered.as_text(), args)}"
        read = lambda: jax.tree.unflatten(structure, _checkpoint.load_leaves(folder, leaves))
        if folder.is_dir():
            try:
                return read()
            except Exception as error:  # orbax raises this very class where a file's content is amiss
                reason = str(error).partition("\n")[0]
                warnings.warn(f"{folder} is damaged, and what it held is made again: {reason}.", stacklevel=2)
                shutil.rmtree(folder, ignore_errors=True)
        result = lowered.compile()(*args)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _checkpoint.save_leaves(folder, jax.tree.leaves(result))
        except OSError as error:
            warnings.warn(
                f"the cache cannot be written, so the next call will be as slow as this one: {error}. "
                "Pass cache_dir=, or set MLSEC_JAX_CACHE, to a folder that can.",
                stacklevel=2,
            )
            return result
        return read()  # a first call reads too, so that every call gives the same arrays in the same place

    return kept


def _digest(program: str, args: Any) -> str:
    """Everything a result depends on, as 32 hexadecimal digits."""
    from mlsec_jax import _checkpoint

    arrays = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), args)
    aspects = {
        "program": program,
        "versions": f"mlsec_jax {__version__} jax {jax.__version__}",
        "devices": f"{jax.device_count()} {jax.default_backend()} {jax.devices()[0].device_kind}",
        **_checkpoint.describe("argument", arrays, content=True),
    }
    return hashlib.sha256(repr(sorted(aspects.items())).encode()).hexdigest()[:32]
