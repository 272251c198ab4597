"""What every test runs under: strict promotion of dtypes and ranks; warnings are errors (pyproject).

Most of the suite's time is LLVM's, so programs are compiled without its expensive passes, except in modules marked
`optimised`, which measure time or memory, and everywhere by XLA's former code generator for fusions, which halves the time,
in one piece each: two workers on two cores have no core left for the pieces, and cutting costs a sixth of compilation.
JAX makes an MLIR context for every program that it lowers, at 10 ms each; here 32 programs share one (more slow each other down).
`JAX_DISABLE_MOST_OPTIMIZATIONS=0` runs everything as users do. What a module compiled is kept on disk for the next ones,
of the other worker too: entries appear whole, which JAX's own writing does not promise.
"""

import functools
import itertools
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # processes that tests start inherit it
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # oracles' own threads would wait for the other worker's core

import jax
import pytest
from jax._src import lru_cache

from benchmarks._record import replace_file  # imports no JAX

QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
if QUICK and jax.__version__.startswith("0.10."):  # a release that lacks a flag would abort, at the first compilation
    os.environ["XLA_FLAGS"] = " ".join({*os.environ.get("XLA_FLAGS", "").split(), *FLAGS})
    from jax._src.interpreters import mlir

    made, make = itertools.count(), mlir.make_ir_context
    context = functools.lru_cache(1)(lambda _: make())
    mlir.make_ir_context = lambda: context(next(made) // 32)

jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads where an operation came from
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if "MLSEC_JAX_TESTS_COMPILED" not in os.environ:  # the process that starts the workers
    COMPILED = tempfile.TemporaryDirectory(prefix="mlsec_jax-tests-")
    os.environ["MLSEC_JAX_TESTS_COMPILED"] = COMPILED.name


def _put(cache, key, value):
    """Writes an entry of the compilation cache whole or not at all."""
    replace_file(Path(cache.path) / f"{key}{lru_cache._CACHE_SUFFIX}", value)


lru_cache.LRUCache.put = _put
jax.config.update("jax_compilation_cache_dir", os.environ["MLSEC_JAX_TESTS_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def x64():
    """Float64 inside this test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled(request):
    """Quick compilation; and what was compiled is forgotten, which keeps the memory of a long run flat."""
    jax.config.update("jax_disable_most_optimizations", QUICK and not request.node.get_closest_marker("optimised"))
    yield
    jax.clear_caches()
