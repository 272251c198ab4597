"""What a measured process does: one call for its memory, then one for its time whenever it is asked. No JAX here.

Each estimator runs in a process of its own, so that no other's memory hides its peak, and all of them wait between
calls, so that they are timed in turn on a machine whose load changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20


def _status(field: str) -> int:
    """A field of `/proc/self/status` in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(text.partition(f"{field}:")[2].split()[0])


def rise_of_peak(call: Callable[[], Any]) -> tuple[Any, float]:
    """`call()`, and by how many MiB it lifts the peak of the process's resident memory above where it stood.

    On Linux what the allocator keeps is first returned and the high-water mark is set back; elsewhere an earlier
    peak (a compiler's) can hide some of the rise.
    """
    if sys.platform.startswith("linux"):
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)  # glibc's; other libraries keep little
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        value = call()
        return value, (_status("VmHWM") - before) / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    before = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = call()
    return value, (unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / MIB


def serve(call: Callable[[], np.ndarray], out: Path, **facts: Any) -> None:
    """Calls twice, writes the second's result to `out` and its peak to standard output; then one call a line read.

    Args:
      call: `() -> gradient`, an array that is computed when the call returns.
      out: the `.npy` file of the first call's result.
      **facts: numbers to report beside the peak.
    """
    call()  # loads code and starts threads
    time.sleep(0.3)  # buffers may be given back a moment after the call returns
    value, peak = rise_of_peak(call)
    np.save(out, value)
    print(json.dumps({"peak_mb": peak, **facts}), flush=True)
    for _ in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
        print(json.dumps(times), flush=True)


@contextlib.contextmanager
def _on(cores: Sequence[int] | None) -> Iterator[None]:
    """What is started here runs on these cores only: it inherits them of this thread, which has them for that long.

    Code run between fork and exec would do it too, but a fork of a process with threads may deadlock.
    """
    if cores is None:
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


class Served:
    """The other end: starts the process (on the given cores only), and asks it for one timed call at a time.

    Attributes:
      facts: what the process reported of its first call: `peak_mb` and more.
    """

    def __init__(self, command: Sequence[str], cores: Sequence[int] | None = None):
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": " ".join(flags)}  # one device with all cores
        with _on(cores):
            self._process = subprocess.Popen(
                command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self.facts = self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self.close()
            raise RuntimeError(f"{self._process.args!r}: ended with code {code} and no answer.")
        return json.loads(line)

    def time(self) -> dict[str, float]:
        """`seconds` and `cpu_seconds` of one more call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        with self._process:  # closes its pipes and waits
            pass


def in_turn(
    commands: Mapping[str, Sequence[str]], cores: Sequence[int] | None, turns: int
) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Starts the processes one by one, then asks each of them for one timed call, turn by turn, and ends them.

    Returns:
      `(times, loads)`: `times[who]["seconds" or "cpu_seconds"]`, a number a turn, and the machine's load after each turn.
    """
    processes: dict[str, Served] = {}
    times: dict[str, dict[str, list[float]]] = {who: {"seconds": [], "cpu_seconds": []} for who in commands}
    loads = []
    try:
        for who, line in commands.items():
            processes[who] = Served(line, cores)
        for _ in range(turns):
            for who, process in processes.items():
                for what, value in process.time().items():
                    times[who][what].append(value)
            loads.append(os.getloadavg()[0])
    finally:
        for process in processes.values():
            process.close()
    return times, loads
