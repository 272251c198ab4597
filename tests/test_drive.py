"""`drive`: any chunking and any death give the bits of one scan. `python tests/test_drive.py DIR OUT` is the victim."""

import hashlib
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import combine
from mlsec_jax import drive as driver
from mlsec_jax.base import Algorithm, Known
from mlsec_jax.drive import drive

SUBJECT = jax.random.normal(jax.random.key(5), (20, 4))
KNOWN = Known(goal=jnp.sin(jnp.arange(20.0)))
KILLED = dict(num_steps=160, chunk=4, save_seconds=0.0)


def noisy_descent(learning_rate=0.1, before_step=lambda: None):
    """Noisy gradient descent on a quadratic; its state holds what is awkward to store."""

    def init(key, subject, known):
        del known
        return {
            "x": jax.random.normal(key, subject.shape[1:]),
            "key": jax.random.split(key, 2),
            "raw": jax.random.PRNGKey(7),
            "half": jnp.ones((3,), jnp.bfloat16),
            "none": jnp.zeros((0, 2)),
            "count": 0,
            "same": (subject, subject),
        }

    def step(key, state, subject, known):
        before_step()
        value, grad = jax.value_and_grad(lambda x: jnp.mean(jnp.square(subject @ x - known.goal)))(state["x"])
        noise = jax.random.normal(key, grad.shape) + jax.random.normal(state["key"][0], grad.shape)
        state = {
            **state,
            "x": state["x"] - learning_rate * (grad + 0.1 * noise),
            "key": jax.vmap(lambda k: jax.random.fold_in(k, 1))(state["key"]),
            "half": state["half"] * value.astype(jnp.bfloat16),
            "count": state["count"] + 1,
        }
        return state, {"value": value, "key": key, "half": state["half"]}

    return Algorithm(init, step, lambda state, subject: state["x"])


def bits(tree):
    """Every leaf's dtype, shape and bytes."""

    def one(leaf):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        plain = np.asarray(jax.random.key_data(leaf) if typed else leaf)
        return str(leaf.dtype), plain.shape, plain.tobytes()

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def contents(folder):
    """Path -> digest of every file below the folder."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("make_key", "chunks"), [(jax.random.key, (1, 4, 64)), (jax.random.PRNGKey, (4,))])
def test_any_chunking_is_one_scan(make_key, chunks):
    scan = jax.jit(combine.run, static_argnums=0, static_argnames="num_steps")
    expected = scan(noisy_descent(), make_key(3), SUBJECT, KNOWN, num_steps=11)
    for chunk in chunks:
        got = drive(noisy_descent(), make_key(3), SUBJECT, KNOWN, num_steps=11, chunk=chunk)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        assert bits(got) == bits(expected)


def test_traced_and_compiled_once(caplog):
    calls = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        algorithm = noisy_descent(before_step=lambda: calls.append(1))
        drive(algorithm, jax.random.key(0), SUBJECT, KNOWN, num_steps=11, chunk=4)
    assert len(calls) == 1
    compiled = re.findall(r"Compiling jit\((\w+)\)", caplog.text)
    assert compiled.count("advance") == 1


def test_no_steps():
    state, infos = drive(noisy_descent(), jax.random.key(0), SUBJECT, KNOWN, num_steps=0)
    assert state["count"] == 0
    assert infos["value"].shape == (0,)
    assert infos["key"].shape == (0,)


def test_state_is_donated_and_nothing_else_is_lost():
    subject = jnp.copy(SUBJECT)
    plan = driver._plan(noisy_descent(), jax.random.key(0), subject, KNOWN, 4)
    before = plan.init(subject, KNOWN)
    plan.advance(before, np.int32(0), np.int32(4), subject, KNOWN)
    assert all(leaf.is_deleted() for leaf in before if leaf.size)
    assert bits(subject) == bits(SUBJECT)  # the state holds it twice


def test_resume_and_continue(tmp_path):
    key, args = jax.random.key(3), (SUBJECT, KNOWN)
    expected = drive(noisy_descent(), key, *args, num_steps=23)
    drive(noisy_descent(), key, *args, num_steps=9, chunk=2, checkpoint_dir=tmp_path, save_seconds=0)
    assert sorted(os.listdir(tmp_path / "state"), key=int) == ["6", "8", "9"]
    got = drive(noisy_descent(), key, *args, num_steps=23, chunk=5, checkpoint_dir=tmp_path, keep=1)
    assert bits(got) == bits(expected)
    assert os.listdir(tmp_path / "state") == ["23"]
    got = drive(noisy_descent(), key, *args, num_steps=23, checkpoint_dir=tmp_path)  # nothing is left to do
    assert bits(got) == bits(expected)
    with pytest.raises(ValueError, match="num_steps: expected at least 23"):
        drive(noisy_descent(), key, *args, num_steps=22, checkpoint_dir=tmp_path)


def test_a_checkpoint_of_another_run_is_refused_and_untouched(tmp_path):
    mine = dict(algorithm=noisy_descent(), key=jax.random.key(3), subject=SUBJECT, known=KNOWN, name="a", num_steps=4)
    drive(**mine, checkpoint_dir=tmp_path)
    before = contents(tmp_path)
    longer = noisy_descent()
    longer = longer._replace(init=lambda *args: {**noisy_descent().init(*args), "more": 0})
    for aspect, other in {
        r"name \(name: a there, b here\)": dict(name="b"),
        "key": dict(key=jax.random.key(4)),
        "subject": dict(subject=SUBJECT.at[7, 2].add(1e-6)),
        r"known\.goal": dict(known=Known(goal=KNOWN.goal + 1)),
        r"known\.clean": dict(known=KNOWN.replace(clean=jnp.ones(3))),
        r"state\['more'\]": dict(algorithm=longer),
        "program": dict(algorithm=noisy_descent(learning_rate=0.2)),
    }.items():
        with pytest.raises(ValueError, match=f"found one of another at step 4 .* differ in .*{aspect}.*Nothing there"):
            drive(**{**mine, **other, "num_steps": 8}, checkpoint_dir=tmp_path)
        assert contents(tmp_path) == before

    other = {**mine, "algorithm": noisy_descent(learning_rate=0.2), "num_steps": 8}
    state, infos = drive(**other, checkpoint_dir=tmp_path, exact=False)
    assert state["count"] == 8
    assert bits(infos["value"][:4]) == bits(drive(**mine)[1]["value"])


@pytest.mark.parametrize(
    "file, doomed",
    [("state/9/run/metadata", "9"), ("state/9/state/manifest.ocdbt", "9"), ("infos/0000000006.npz", "8 9")],
)
def test_a_damaged_checkpoint_is_named_and_the_remedy_ends_with_the_same_bits(tmp_path, file, doomed):
    run = lambda steps: drive(
        noisy_descent(), jax.random.key(3), SUBJECT, KNOWN, num_steps=steps, chunk=2, checkpoint_dir=tmp_path, save_seconds=0
    )
    run(9)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
    damaged = file if file.startswith("infos") else "state/9"
    after = f"every step after 6 in {tmp_path / 'state'}" if file.startswith("infos") else "it"
    with pytest.raises(ValueError, match=f"checkpoint_dir: .* from {tmp_path / damaged}.*delete {after}: .*same bits"):
        run(11)
    for step in doomed.split():
        shutil.rmtree(tmp_path / "state" / step)
    assert bits(run(11)) == bits(drive(noisy_descent(), jax.random.key(3), SUBJECT, KNOWN, num_steps=11))


@pytest.mark.parametrize("folder", ["file/below", "/proc/mlsec_jax"])
def test_an_unwritable_folder_is_refused_before_computing(tmp_path, folder):
    (tmp_path / "file").write_text("")
    algorithm = Algorithm(*[lambda *args: pytest.fail("computed")] * 3)
    with pytest.raises(OSError, match="checkpoint_dir: expected a folder that can be written"):
        drive(algorithm, jax.random.key(0), SUBJECT, KNOWN, num_steps=1, checkpoint_dir=tmp_path / folder)


def test_bad_counts():
    for bad in (dict(num_steps=-1), dict(chunk=0), dict(keep=0), dict(save_seconds=-1.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            drive(noisy_descent(), jax.random.key(0), SUBJECT, KNOWN, **{"num_steps": 1, **bad})


def test_the_bar_is_drawn_on_demand_only(capsys):
    drive(noisy_descent(), jax.random.key(0), SUBJECT, KNOWN, num_steps=3)
    assert capsys.readouterr() == ("", "")
    drive(noisy_descent(), jax.random.key(0), SUBJECT, KNOWN, num_steps=3, progress=True, name="mine [/b]")
    assert re.search(r"mine \[/b\] .* 3/3", capsys.readouterr().out)


def newest(folder):
    """The newest committed step, -1 if there is none."""
    return max((int(path.name) for path in Path(folder).glob("state/*") if path.name.isdigit()), default=-1)


def test_killed_at_random_moments(tmp_path):
    moment = random.Random(0)
    victim = [sys.executable, __file__, tmp_path / "run", tmp_path / "out.npz"]
    environment = {**os.environ, "PYTHONPATH": str(Path(driver.__file__).parent.parent)}
    reached = [-1]
    for _ in range(3):
        process = subprocess.Popen(victim, env=environment)
        deadline = time.monotonic() + 60
        while newest(tmp_path / "run") <= reached[-1] and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.15))  # most of its time goes into saving
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        reached.append(newest(tmp_path / "run"))
    assert -1 < reached[1] < reached[2] < reached[3] < KILLED["num_steps"]
    subprocess.run(victim, env=environment, check=True, timeout=120)

    state, infos = drive(noisy_descent(), jax.random.key(3), SUBJECT, KNOWN, **KILLED)
    with np.load(tmp_path / "out.npz") as out:
        assert out["bits"].tolist() == [repr(leaf) for leaf in bits((state, infos))]


if __name__ == "__main__":
    result = drive(noisy_descent(), jax.random.key(3), SUBJECT, KNOWN, checkpoint_dir=sys.argv[1], **KILLED)
    np.savez(sys.argv[2], bits=np.array([repr(leaf) for leaf in bits(result)]))
