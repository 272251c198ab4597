"""The host's driver of an `Algorithm`: jitted chunks, a progress bar, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlsec_jax import checks
from mlsec_jax.base import Algorithm, Info, Key


def drive(
    algorithm: Algorithm,
    key: Key,
    subject: Any,
    known: Any,
    *,
    num_steps: int,
    chunk: int = 64,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    name: str = "",
    keep: int = 3,
    save_seconds: float = 10.0,
    exact: bool = True,
    progress: bool = False,
) -> tuple[Any, Info]:
    """Runs an algorithm from the host in jitted chunks, with checkpoints to resume from.

        init_key, step_key = split(key)
        state_0 = init(init_key, subject, known)
        state_{k+1}, info_k = step(fold_in(step_key, k), state_k, subject, known)

    It is `combine.run` for long jobs. `init` and one chunk are compiled once each: a chunk is a loop whose number of
    turns is an operand, so the last, shorter one and one that starts anywhere are the same program. Hence any
    `chunk` gives the same bits, and a run killed at any moment and started again with the same arguments ends with
    the bits of an uninterrupted one, infos included. The state is donated from chunk to chunk.

    Args:
      algorithm: any `Algorithm`. Subject and known are operands of its compiled functions.
      key: a typed or raw key; states and infos may hold keys too.
      subject: what `algorithm` acts on, for a poisoning attack `Data` with `[n, ...]` leaves.
      known: `Known`.
      num_steps: the steps in all, those of earlier sessions included; a finished run may be continued by more.
      chunk: steps between two looks of the host (bar, infos, checkpoint).
      checkpoint_dir: a folder for this run alone; it continues from the newest checkpoint there. Single process only.
      name: what you call the run; part of its fingerprint, and the bar's label.
      keep: how many checkpoints stay. Infos always stay.
      save_seconds: least time between two checkpoints; one is also made after `init` and at the end.
      exact: whether a checkpoint made by another program (a step with other hyper-parameters or code, another JAX
        version or device count) is refused. False continues it: the old steps stay, and the bits are not promised.
      progress: whether to draw a bar.

    Returns:
      `(state, infos)`; `infos` are NumPy arrays with a leading `[num_steps]` axis (JAX keys where the info held keys).

    Raises:
      ValueError: before computing, what `algorithm.init` says of bad data.
      OSError: before computing, if the folder cannot be written.
      ValueError: before computing, if the folder holds a checkpoint of another run (name, key, subject, known, the
        state's structure or, when `exact`, the program), one past `num_steps` or one that cannot be read. No checkpoint
        is touched.

    >>> import jax.numpy as jnp
    >>> from mlsec_jax.base import Known
    >>> halve = Algorithm(
    ...     init=lambda key, subject, known: subject,
    ...     step=lambda key, state, subject, known: (state / 2, {"before": state}),
    ...     read=lambda state, subject: state,
    ... )
    >>> state, infos = drive(halve, jax.random.key(0), jnp.float32(8), Known(), num_steps=3, chunk=2)
    >>> float(state), infos["before"].tolist()
    (1.0, [8.0, 4.0, 2.0])
    """
    checks.count("num_steps", num_steps)
    checks.count("chunk", chunk, 1)
    checks.count("keep", keep, 1)
    checks.at_least("save_seconds", save_seconds, 0)
    if checkpoint_dir is not None:
        if jax.process_count() > 1:
            raise ValueError(f"checkpoint_dir: expected a single process, got {jax.process_count()}.")
        from mlsec_jax import _checkpoint  # orbax takes half a second to import: only those who save pay for it

        folder = _checkpoint.writable(checkpoint_dir)

    subject, known = jax.device_put((subject, known))
    jax.eval_shape(lambda key: algorithm.init(key, subject, known), key)  # the host border: compiled, init sees no values
    plan = _plan(algorithm, key, subject, known, chunk)
    state: list[jax.Array] | None = None
    done = 0
    stretches: list[list[np.ndarray]] = []  # a stretch: the infos between two checkpoints
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint_dir is not None:
            fingerprint = _fingerprint(name, key, plan, subject, known)
            free = () if exact else ("program",)
            store = stack.enter_context(contextlib.closing(_checkpoint.Store(folder, fingerprint, free, keep)))
            if store.latest_step is not None:
                if store.latest_step > num_steps:
                    raise ValueError(
                        f"num_steps: expected at least {store.latest_step}, the step of the checkpoint in {folder}, "
                        f"got {num_steps}."
                    )
                done = store.latest_step
                state, stretches = store.load(done, plan.state, plan.info)
        if state is None:
            state = plan.init(subject, known)
            if store is not None:
                store.save(0, state, 0, [])

        saved, saved_at, unsaved = done, time.monotonic(), []
        bar = stack.enter_context(_bar(progress))
        task = bar.add_task(name or "drive", total=num_steps, completed=done, figures="")
        while done < num_steps:
            count = min(chunk, num_steps - done)
            state, infos = plan.advance(state, np.int32(done), np.int32(count), subject, known)
            unsaved.append([np.asarray(leaf)[:count] for leaf in infos])
            done += count
            bar.update(task, completed=done, figures=plan.figures(unsaved[-1]))
            if done == num_steps or (store is not None and time.monotonic() - saved_at >= save_seconds):
                stretches.append([np.concatenate(leaf) for leaf in zip(*unsaved)])
                if store is not None:
                    store.save(done, state, saved, stretches[-1])
                saved, saved_at, unsaved = done, time.monotonic(), []

    history = [np.concatenate(leaf) for leaf in zip(*stretches)]
    if not stretches:
        history = [np.zeros((0, *leaf.shape), leaf.dtype) for leaf in plan.info]
    return _whole(plan.state_like, state), _whole(plan.info_like, history)


class _Plan(NamedTuple):
    """The two compiled programs of a run. They pass states and infos as lists of plain arrays, keys as key data."""

    init: Callable[..., list[jax.Array]]  # (subject, known) -> state
    advance: Callable[..., tuple[list[jax.Array], list[jax.Array]]]  # (state, start, count, subject, known)
    state: list[jax.ShapeDtypeStruct]  # with shardings
    info: list[jax.ShapeDtypeStruct]
    state_like: Any  # the pytrees that the algorithm sees
    info_like: Any
    program: Callable[[], str]  # the text of what init and step compute

    def figures(self, infos: list[np.ndarray]) -> str:
        """The scalars of the last step's info, for the bar."""
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.info_like)]
        return " ".join(f"{name}={float(leaf[-1]):.4g}" for name, leaf in zip(names, infos) if leaf.ndim == 1)


def _plan(algorithm: Algorithm, key: Key, subject: Any, known: Any, chunk: int) -> _Plan:
    """Traces and compiles `init`; makes the jitted chunk."""
    init_key, step_key = jax.random.split(key)
    init_fn, step_fn = jax.jit(algorithm.init), jax.jit(algorithm.step)
    shapes = jax.eval_shape(lambda *args: args, init_key, subject, known)
    state_like = jax.eval_shape(lambda *args: _strong(init_fn(*args)), *shapes)
    info_like = jax.eval_shape(lambda state, args: step_fn(args[0], state, *args[1:])[1], state_like, shapes)
    info = jax.eval_shape(_plain, info_like)

    init = jax.jit(lambda *args: _plain(_strong(init_fn(*args)))).lower(init_key, subject, known).compile()
    state = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(jax.eval_shape(_plain, state_like), init.output_shardings)
    ]
    # A state spread over devices stays where init put it, so that every chunk is the same program.
    spread = any(len(leaf.sharding.device_set) > 1 for leaf in state)
    out_shardings = ([leaf.sharding for leaf in state], None) if spread else None

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def advance(state, step_key, start, count, subject, known):
        def turn(i, carry):
            state, infos = carry
            step_k = jax.random.fold_in(step_key, start + i)
            state, now = step_fn(step_k, _whole(state_like, state), subject, known)
            infos = [jax.lax.dynamic_update_index_in_dim(b, a, i, 0) for b, a in zip(infos, _plain(_strong(now)))]
            return _plain(_strong(state)), infos

        room = [jnp.zeros((chunk, *leaf.shape), leaf.dtype) for leaf in info]
        return jax.lax.fori_loop(0, count, turn, (state, room))

    def program() -> str:
        init_text = init_fn.lower(*shapes).as_text()
        return init_text + step_fn.lower(shapes[0], state_like, *shapes[1:]).as_text()

    return _Plan(
        init=lambda subject, known: init(init_key, subject, known),
        advance=lambda state, start, count, subject, known: advance(state, step_key, start, count, subject, known),
        state=state, info=info, state_like=state_like, info_like=info_like, program=program,
    )  # fmt: skip


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _strong(tree: Any) -> Any:
    """The same arrays without weak types, which an array on disk does not have."""

    def strong(leaf):
        leaf = jnp.asarray(leaf)
        return leaf if _is_key(leaf) else jax.lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(strong, tree)


def _plain(tree: Any) -> list[jax.Array]:
    """The leaves, typed keys as their key data."""
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


def _whole(like: Any, leaves: list[Any]) -> Any:
    """The inverse of `_plain`; leaves may have further leading axes."""

    def whole(aval, leaf):
        if not _is_key(aval):
            return leaf
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(jax.lax.empty((), aval.dtype)))

    return jax.tree.map(whole, like, jax.tree.unflatten(jax.tree.structure(like), leaves))


def _fingerprint(name: str, key: Key, plan: _Plan, subject: Any, known: Any) -> dict[str, str]:
    """What a run is, one string an aspect: two runs with equal ones go through the same bits."""
    from mlsec_jax import _checkpoint

    devices = plan.state[0].sharding.device_set if plan.state else ()
    digest = hashlib.sha256(plan.program().encode()).hexdigest()
    return {
        "name": name,
        "key": f"{key.dtype} {np.asarray(_plain(key)[0]).tolist()}",
        **_checkpoint.describe("state", plan.state_like),
        **_checkpoint.describe("info", plan.info_like),
        **_checkpoint.describe("subject", subject, content=True),
        **_checkpoint.describe("known", known, content=True),
        "program": f"{digest} jax {jax.__version__} on {len(devices)} {jax.default_backend()}",
    }


def _bar(shown: bool) -> Progress:
    text = functools.partial(TextColumn, markup=False)  # a run may be called "a [b]"
    columns = (text("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, text("{task.fields[figures]}"), disable=not shown)
