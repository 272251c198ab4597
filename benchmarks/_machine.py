"""The machine a benchmark runs on: chosen before JAX starts, named in the record."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._record import UsageError

_HOST_DEVICES = "--xla_force_host_platform_device_count"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "jaxopt", "numpy", "scikit-learn", "torch")


def choose(device: str | None, devices: int | None) -> None:
    """Sets the platform and the number of host devices. To be called before anything imports JAX.

    Two host devices use both cores where one would leave one idle, so that is the default where there are two cores;
    it changes nothing on an accelerator.

    Args:
      device: `cpu`, `gpu`, `tpu`, or None for JAX's own choice.
      devices: how many host devices the CPU is split into, or None for the default.
    """
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif device is not None:
        os.environ.pop("JAX_PLATFORMS", None)  # JAX prefers an accelerator by itself; `start` checks that it has one
    os.environ["MPLBACKEND"] = "Agg"
    flags = os.environ.get("XLA_FLAGS", "").split()
    if devices is None and not any(flag.startswith(_HOST_DEVICES) for flag in flags) and _cores() >= 2:
        devices = 2
    if devices is not None:
        flags = [flag for flag in flags if not flag.startswith(_HOST_DEVICES)] + [f"{_HOST_DEVICES}={devices}"]
        os.environ["XLA_FLAGS"] = " ".join(flags)


def start(device: str | None) -> str:
    """Starts JAX with its persistent compilation cache; returns the device's name for the record."""
    import jax

    from mlsec_jax import data

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(data.cache_root() / "jax")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    found = jax.devices()
    if device is not None and found[0].platform != device:
        raise UsageError(f"--device {device}: JAX finds none here, only {found[0].platform}.")
    name = f"{len(found)} x {found[0].device_kind}"
    return f"{name} ({_cpu_model()}, {_cores()} cores)" if found[0].platform == "cpu" else name


@contextmanager
def compiling() -> Iterator[Callable[[], float]]:
    """Inside it JAX's work on programs is timed: `seconds()` is what went by while some was being traced, lowered,
    and compiled or read from the persistent cache (a compilation's span holds its look-up).

    Spans can nest (a constant compiled while another program is traced) and overlap (threads), so their union counts.
    Only this process is seen.
    """
    from jax import monitoring

    spans: list[tuple[float, float]] = []

    def note(event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((start_time, end_time))

    def seconds() -> float:
        total, reached = 0.0, 0.0
        for start, end in sorted(spans):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total

    monitoring.register_event_time_span_listener(note)
    try:
        yield seconds
    finally:
        monitoring.unregister_event_time_span_listener(note)


def versions() -> dict[str, str]:
    """Versions of Python, the library and what it computes with, where installed."""
    import mlsec_jax

    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    found = {name: installed[name] for name in _PACKAGES if name in installed}
    return {"python": platform.python_version(), "mlsec_jax": mlsec_jax.__version__, **found}


def fingerprint(device: str) -> str:
    """A digest of all that a finished item depends on but its seed: sources, versions, device, prepared data."""
    import mlsec_jax

    digest = hashlib.sha256(repr((device, sorted(versions().items()), _prepared())).encode())
    for package in (Path(mlsec_jax.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _prepared() -> list[tuple]:
    """The folders of data sets and tables, and what lies there by name, size and time: no content is read."""
    from mlsec_jax import data

    found: list[tuple] = []
    for root, patterns in (
        (data.tfds_root(), ("*/*/dataset_info.json", "*/*/*/dataset_info.json")),
        (data.tables_root(), ("*.npz", "*.json")),
    ):
        if root is not None:
            folder = root.resolve()
            files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
            stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
            found += [(str(folder),), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
    return found


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
