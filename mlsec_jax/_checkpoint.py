"""What is written through orbax: the checkpoints of `drive`, and the results that `memo` keeps.

In the checkpoint folder of `drive`, `state/` is orbax's, `infos/` holds one file for each saved stretch of steps.

A checkpoint is committed by orbax, which never lets a half-written one be found, after the infos that lead to it are
in place; infos are replaced as whole files. So whenever the process dies, the newest checkpoint and the chain of
infos from step 0 up to it are complete. Each stretch is written once: the time spent saving grows linearly in steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


def writable(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if need be, after a write in it has succeeded; else one clear `OSError`."""
    path = Path(folder).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"checkpoint_dir: expected a folder that can be written, got {path} ({error}).") from error
    return path


def _bytes(array: Any) -> np.ndarray:
    """The array as bytes: hashes and npz files know NumPy's own dtypes only."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def describe(prefix: str, tree: Any, content: bool = False) -> dict[str, str]:
    """One entry a leaf: its dtype and shape, and with `content` the SHA-256 of its bytes."""
    entries = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        text = f"{leaf.dtype}{list(leaf.shape)}"
        if content:
            leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            text += " " + hashlib.sha256(_bytes(leaf).data).hexdigest()
        entries[prefix + jax.tree_util.keystr(path)] = text
    return entries


@contextlib.contextmanager
def _readable(path: Path, doomed: str = "it") -> Iterator[None]:
    """One error for all that reading a damaged file can raise, among it orbax's bare `Exception`."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"checkpoint_dir: expected a checkpoint that can be read, got a {type(error).__name__} from {path}. If it is "
            f"damaged, delete {doomed}: the run then goes on from the newest checkpoint left, or from the start, and "
            "ends with the same bits."
        ) from error


class Store:
    """The checkpoints of one run, in one folder.

    Args:
      folder: a folder from `writable`. One run has one folder.
      fingerprint: what the run is, as one string an aspect. A folder whose newest checkpoint has another one is
        refused before anything in it is touched.
      free: aspects in which they may differ.
      keep: how many checkpoints stay.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, str], free: Sequence[str], keep: int):
        self._folder, self._state, self._infos = folder, folder / "state", folder / "infos"
        self._fingerprint = fingerprint
        if self._state.exists():
            with self._open(create=False) as manager:
                self._refuse_another(manager, free)
        self._infos.mkdir(exist_ok=True)
        self._manager = self._open(create=True, max_to_keep=keep, cleanup_tmp_directories=True)

    def _open(self, **options: Any) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
        return ocp.CheckpointManager(self._state, options=options)

    def _refuse_another(self, manager: ocp.CheckpointManager, free: Sequence[str]) -> None:
        step = manager.latest_step()
        if step is None:
            return
        with _readable(self._state / str(step)):
            run = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
            there = dict(run["fingerprint"])
        here = self._fingerprint
        aspects = [name for name in here | there if there.get(name) != here.get(name) and name not in free]
        if not aspects:
            return
        first = aspects[0]
        hint = " (exact=False continues under another program)" if aspects == ["program"] else ""
        raise ValueError(
            f"checkpoint_dir: expected a checkpoint of this run, found one of another at step {step} in "
            f"{self._folder}: they differ in {', '.join(aspects)} ({first}: {there.get(first)} there, "
            f"{here.get(first)} here). Nothing there was touched: pass another folder, or the arguments it was made "
            f"with{hint}."
        )

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, None if there is none yet."""
        return self._manager.latest_step()

    def load(
        self, step: int, state: Sequence[jax.ShapeDtypeStruct], info: Sequence[jax.ShapeDtypeStruct]
    ) -> tuple[list[jax.Array], list[list[np.ndarray]]]:
        """The state's leaves at `step`, and the infos of all steps before it.

        Args:
          step: a checkpoint's step.
          state: the leaves' shapes, dtypes and shardings.
          info: the shapes and dtypes of one step's info leaves.

        Returns:
          `(leaves, stretches)`; a stretch is a list of info leaves, each `[steps of the stretch, ...]`.
        """
        filled = {str(i): leaf for i, leaf in enumerate(state) if leaf.size}
        leaves: dict[str, jax.Array] = {}
        if filled:
            with _readable(self._state / str(step)):
                leaves = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(filled))).state
        empty = {str(i): np.zeros(leaf.shape, leaf.dtype) for i, leaf in enumerate(state) if not leaf.size}
        leaves |= {i: jax.device_put(zeros, state[int(i)].sharding) for i, zeros in empty.items()}
        stretches, at = [], 0
        while at < step:
            path = self._infos / f"{at:010d}.npz"
            with _readable(path, f"every step after {at} in {self._state}"), open(path, "rb") as npz, np.load(npz) as file:
                stop = int(file["stop"])
                stretches.append(
                    [file[str(i)].view(a.dtype).reshape((stop - at, *a.shape)) for i, a in enumerate(info)]
                )
            at = stop
        return [leaves[str(i)] for i in range(len(state))], stretches

    def save(self, step: int, state: Sequence[jax.Array], start: int, infos: Sequence[np.ndarray]) -> None:
        """Writes the state at `step`, and the infos of the steps from `start` up to it."""
        if step > start:
            arrays: dict[str, Any] = {str(i): _bytes(leaf) for i, leaf in enumerate(infos)}
            half = self._infos / "half-written.npz"
            with open(half, "wb") as file:
                np.savez(file, stop=np.int64(step), **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, self._infos / f"{start:010d}.npz")
        items = {"run": ocp.args.JsonSave({"step": step, "fingerprint": self._fingerprint})}
        filled = {str(i): leaf for i, leaf in enumerate(state) if leaf.size}  # orbax refuses arrays of size 0
        if filled:
            items["state"] = ocp.args.StandardSave(filled)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def close(self) -> None:
        """Lets go of orbax's threads."""
        self._manager.close()


def save_leaves(folder: Path, leaves: Sequence[jax.Array]) -> None:
    """Writes arrays as one folder, which appears whole or not at all; one that is there already stays."""
    filled: dict[str, Any] = {str(i): leaf for i, leaf in enumerate(leaves) if leaf.size}
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    with ocp.StandardCheckpointer() as writer:
        writer.save(half, filled or {"nothing": np.zeros(1)}, force=True)
    try:
        os.rename(half, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(half)  # another process was faster


def load_leaves(folder: Path, like: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """The arrays of `save_leaves`, committed to no device: they follow what they are computed with."""
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    there = {
        str(i): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)
        for i, leaf in enumerate(like)
        if math.prod(leaf.shape)
    }
    filled: dict[str, jax.Array] = {}
    if there:
        with ocp.StandardCheckpointer() as reader:
            filled = reader.restore(folder, there)
    empty = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
    return [jnp.asarray(np.asarray(filled.get(str(i), empty(leaf)))) for i, leaf in enumerate(like)]
