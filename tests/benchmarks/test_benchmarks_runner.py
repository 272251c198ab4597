"""The runner, with a benchmark made up here: records, plots, resuming, the report, and what it refuses."""

import base64
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from benchmarks import _machine, _record, _report, _run
from benchmarks._record import Paper, Result, UsageError

DEVICE = "1 x cpu"


@pytest.fixture
def fake(monkeypatch):
    """Registers functions as benchmarks called `fake`, for one test."""
    monkeypatch.setattr(_record, "_registered", {})
    return lambda function, **options: _record.benchmark(function, name="fake", **options)


def run(out, size="small", seed=0, **options):
    return _run.run("fake", size=size, seed=seed, out=out, device=DEVICE, **options)


def plot(context, name="curve"):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1])
    context.save_figure(figure, name)
    assert not plt.get_fignums()


def test_record_holds_exactly_the_promised_fields(fake, tmp_path):
    import jax

    def function(size, seed, context):
        assert (size, context.size, context.seed, context.out) == ("full", "full", 3, tmp_path)
        assert (jax.random.key_data(context.key) == jax.random.key_data(jax.random.key(seed))).all()
        plot(context)
        figures = {"error_clean": np.float32(0.25), "n_splits": 10, "params": jax.numpy.asarray(7850)}
        return Result(figures, ["10 splits, not 100"], {"error_clean": Paper(0.2, "Fig. 7")})

    fake(function)
    record = run(tmp_path, "full", 3)
    stored = json.loads((tmp_path / "fake.json").read_text())
    assert stored == record and set(stored) == {*_record.FIELDS, *_record.STARTUP}
    assert stored["figures"] == {"error_clean": 0.25, "n_splits": 10, "params": 7850}
    assert stored["paper"] == {"error_clean": {"value": 0.2, "source": "Fig. 7"}}
    assert (stored["benchmark"], stored["size"], stored["seed"], stored["device"]) == ("fake", "full", 3, DEVICE)
    assert stored["versions"]["jax"] == jax.__version__ and stored["seconds"] >= 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake.curve.png", "fake.json"]
    assert (tmp_path / "fake.curve.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "plain").write_text("")  # records are as readable as any file written here
    assert (tmp_path / "fake.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_records_from_before_startup_was_measured_are_still_read(fake, tmp_path):
    fake(lambda size, seed, context: Result({"x": 1}))
    record = {key: value for key, value in run(tmp_path).items() if key not in _record.STARTUP}
    (tmp_path / "fake.json").write_text(json.dumps(record))
    assert _record.read_all(tmp_path) == [record]


def test_compiling_counts_every_second_once():
    from jax import monitoring

    event = "/jax/core/compile/backend_compile_duration"
    with _machine.compiling() as seconds:
        assert seconds() == 0
        for start, end in [(10.0, 14.0), (11.0, 12.0), (13.0, 15.0), (20.0, 20.5)]:  # whole, nested, overlapping, apart
            monitoring.record_event_time_span(event, start, end, fun_name="f")
        monitoring.record_event_time_span("/jax/other", 30.0, 40.0)
        assert seconds() == 5.5
    monitoring.record_event_time_span(event, 50.0, 60.0, fun_name="f")
    assert seconds() == 5.5


def test_a_record_says_what_starting_and_compiling_took(fake, tmp_path):
    import jax

    program = jax.jit(lambda x: jax.numpy.cos(x) @ x)
    fake(lambda size, seed, context: Result({"x": program(jax.numpy.ones(3)).item()}))
    began = time.perf_counter()
    first = _run.run("fake", size="small", seed=0, out=tmp_path, device=DEVICE, started=began - 100)
    again = run(tmp_path)
    assert 100 <= first["seconds_starting"] < 100 + time.perf_counter() - began and again["seconds_starting"] < 10
    assert 0 < first["seconds_compiling"] <= first["seconds"] + 1e-3
    assert again["seconds_compiling"] < first["seconds_compiling"]  # in one process nothing is traced twice


@pytest.mark.parametrize(
    "result, message",
    [
        (Result({"a": float("nan")}), r"figures\['a'\]: expected a finite number"),
        (Result({"a": np.inf}), r"figures\['a'\]: expected a finite number"),
        (Result({"a": "0.5"}), r"figures\['a'\]: expected a finite number"),
        (Result({"a": np.ones(2)}), r"figures\['a'\]: expected a finite number"),
        (Result({"a": True}), r"figures\['a'\]: expected a finite number"),
        (Result({}), "figures: expected at least one"),
        (Result({"a b": 1}), "figures: expected keys of letters"),
        (Result({"a": 1}, paper={"b": Paper(1, "Table 1")}), "paper: expected keys that are figures too"),
        (Result({"a": 1}, paper={"a": Paper(1, "")}), "expected a source"),
        (Result({"a": 1}, paper={"a": Paper(float("nan"), "Table 1")}), r"paper\['a'\]: expected a finite"),
        (Result({"a": 1}, reductions="fewer splits"), "reductions: expected a list"),
    ],
)
def test_results_are_validated(fake, tmp_path, result, message):
    fake(lambda size, seed, context: result)
    with pytest.raises(ValueError, match=message):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


class Interrupted(BaseException):
    """As a kill between two items."""


def test_an_interrupted_run_goes_on_where_it_stopped(fake, tmp_path):
    computed, stop_at = [], 2

    def function(size, seed, context):
        def item(i):
            if i == stop_at:
                raise Interrupted
            computed.append(i)
            return {"error": np.float32(i / 7), "curve": np.arange(3) * i, "note": f"split {i}"}

        found = [context.once(f"split-{i}", lambda i=i: item(i)) for i in context.progress(range(4), "splits")]
        assert [type(value["error"]) for value in found] == [float] * 4 and found[3]["note"] == "split 3"
        np.testing.assert_array_equal(found[2]["curve"], [0, 2, 4])
        return Result({"error": np.mean([value["error"] for value in found])})

    fake(function)
    with pytest.raises(Interrupted):
        run(tmp_path)
    assert computed == [0, 1] and not (tmp_path / "fake.json").exists()
    stop_at = None
    with pytest.raises(Interrupted):  # other settings share nothing: they stop at their own item
        stop_at = 0
        run(tmp_path, seed=1)
    stop_at = None
    record = run(tmp_path)
    assert computed == [0, 1, 2, 3]
    fresh = run(tmp_path / "fresh")
    assert record["figures"] == fresh["figures"] and computed == [0, 1, 2, 3, 0, 1, 2, 3]
    run(tmp_path)  # a finished run leaves nothing to take over
    assert len(computed) == 12
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["fake.json"]


def test_networks_in_bfloat16_only_where_the_benchmark_heeds_it(fake, tmp_path):
    seen = fake(lambda size, seed, context: Result({"half": int(context.bfloat16)}))
    with pytest.raises(UsageError, match="--bf16: expected benchmarks that heed it, got fake"):
        run(tmp_path, bfloat16=True)
    fake(seen, bfloat16=True)
    record = run(tmp_path, bfloat16=True)
    assert record["device"] == f"{DEVICE}, networks in bfloat16" and record["figures"] == {"half": 1}
    assert run(tmp_path)["figures"] == {"half": 0}


def test_items_of_other_code_are_not_taken_over(fake, tmp_path, monkeypatch):
    computed = []

    def function(size, seed, context):
        context.once("a", lambda: {"x": computed.append(1) or 1})
        raise Interrupted

    fake(function)
    for stamp in ("one", "one", "two"):
        monkeypatch.setattr(_machine, "fingerprint", lambda device, stamp=stamp: stamp)
        with pytest.raises(Interrupted):
            run(tmp_path)
    assert len(computed) == 2


def test_restored_items_count_their_time(fake, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(_run.time, "perf_counter", lambda: next(clock))
    fail = True

    def function(size, seed, context):
        context.once("a", lambda: {"x": 1})
        if fail:
            raise Interrupted
        return Result({"x": 1})

    fake(function)
    with pytest.raises(Interrupted):
        run(tmp_path)
    fail = False
    assert run(tmp_path)["seconds"] == 20  # ten here, ten for the item there


def test_items_must_be_plain(fake, tmp_path):
    fake(lambda size, seed, context: context.once("a", lambda: {"x": object()}))
    with pytest.raises(ValueError, match="expected numbers, strings or arrays"):
        run(tmp_path)
    fake(lambda size, seed, context: context.once("../a", lambda: {"x": 1}))
    with pytest.raises(ValueError, match="item: expected letters"):
        run(tmp_path)


def test_plots_of_an_earlier_run_go(fake, tmp_path):
    name = "old"

    def function(size, seed, context):
        plot(context, name)
        return Result({"x": 1})

    fake(function)
    run(tmp_path)
    (tmp_path / "fake_too.old.png").write_bytes(b"another benchmark's")
    name = "new"
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["fake.new.png", "fake_too.old.png"]


def test_unwritable_folder_is_refused_before_computing(fake, tmp_path):
    fake(lambda size, seed, context: pytest.fail("computed"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out: cannot write to .*file"):
        run(tmp_path / "file" / "runs")


def test_unknown_names_list_the_known(fake):
    fake(lambda size, seed, context: Result({"x": 1}))
    with pytest.raises(UsageError, match=r"unknown benchmark nonesuch; there are: .*fake"):
        _record.find("nonesuch")


def test_every_benchmark_says_what_it_shows():
    assert all(summary.endswith(".") for summary in _record.summaries().values())


class Page(HTMLParser):
    """Collects text and images; fails on tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.images, self.links = [], "", [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag == "img":
            self.images.append(attrs["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_page_that_needs_nothing_beside_itself(fake, tmp_path):
    def function(size, seed, context):
        plot(context)
        paper = {"error_poisoned": Paper(0.5, "Fig. 7 <b>")}
        return Result({"error_poisoned": 0.61234567, "params": 450_000}, ["half & half"], paper)

    fake(function)
    run(tmp_path)
    html = _report.page(_record.read_all(tmp_path), tmp_path)
    page = Page(html)
    expected = ("0.6123", "0.5", "Fig. 7 <b>", "450,000", "half & half", "size small", "seed 0", DEVICE, "jax")
    for text in expected:
        assert text in page.text, text
    (image,) = page.images
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == (tmp_path / "fake.curve.png").read_bytes()
    assert all(link.startswith(("data:", "#")) for link in page.links) and "url(" not in html and "@import" not in html


def test_report_refuses_what_is_no_record(tmp_path):
    with pytest.raises(UsageError, match="no record in"):
        _record.read_all(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match=r"other\.json is not a benchmark's record: it lacks benchmark"):
        _record.read_all(tmp_path)


@pytest.mark.parametrize(
    "flags, devices, cores, expected",
    [
        ("", None, 2, "--xla_force_host_platform_device_count=2"),
        ("", None, 1, ""),
        ("", 8, 1, "--xla_force_host_platform_device_count=8"),
        ("--a=1 --xla_force_host_platform_device_count=4", None, 2, "--a=1 --xla_force_host_platform_device_count=4"),
        ("--a=1 --xla_force_host_platform_device_count=4", 3, 2, "--a=1 --xla_force_host_platform_device_count=3"),
    ],
)
def test_host_devices(monkeypatch, flags, devices, cores, expected):
    monkeypatch.setattr(_machine, "_cores", lambda: cores)
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
    _machine.choose("gpu", devices)
    assert os.environ.get("XLA_FLAGS", "") == expected
    assert "JAX_PLATFORMS" not in os.environ
    _machine.choose("cpu", devices)
    assert os.environ["JAX_PLATFORMS"] == "cpu"


FAKE = """
import os, signal, sys
from benchmarks._record import Paper, Result, benchmark

@benchmark(name="fake")
def run(size, seed, context):
    "A made-up benchmark."
    import jax, jax.numpy as jnp
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
    value = jax.jit(lambda x: jnp.sin(x) @ x.T)(jax.random.normal(context.key, (8, 8))).sum()
    computed = []

    def item(i):
        if os.environ.get("KILL_AT") == str(i):
            os.kill(os.getpid(), signal.SIGKILL)
        computed.append(i)
        return {"i": i}

    total = sum(context.once(f"item-{i}", lambda i=i: item(i))["i"] for i in range(3))
    figures = {"value": value, "devices": jax.device_count(), "hits": sum(hits)}
    figures |= {"computed": len(computed), "total": total}
    return Result(figures, ["tiny"], {"value": Paper(1, "here")})

assert "jax" not in sys.modules
from benchmarks.__main__ import app
assert "jax" not in sys.modules
app()
"""


def cli(*arguments, cache, **environment):
    environment = {**os.environ, "MLSEC_JAX_CACHE": str(cache), "XLA_FLAGS": "", "JAX_PLATFORMS": "", **environment}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", textwrap.dedent(FAKE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)


def test_command_line(tmp_path):
    out, cache = tmp_path / "runs", tmp_path / "cache"
    first = cli("run", "fake", "--out", out, "--device", "cpu", "--devices", 2, "--seed", 5, cache=cache)
    assert first.returncode == 0, first.stderr
    assert re.search(r"figure.*paper.*ours", first.stdout) and "reduced: tiny" in first.stdout
    record = json.loads((out / "fake.json").read_text())
    assert record["seed"] == 5 and record["size"] == "small" and record["figures"]["devices"] == 2
    assert re.fullmatch(r"2 x cpu \(.+, \d+ cores\)", record["device"])
    assert list((cache / "jax").iterdir())
    assert record["seconds_starting"] > 0.1  # imports JAX
    assert 0 < record["seconds_compiling"] <= record["seconds"]
    second = cli("run", "fake", "--out", out, "--device", "cpu", "--devices", 2, "--seed", 5, cache=cache)
    again = json.loads((out / "fake.json").read_text())
    assert "WARNING" not in second.stderr.upper(), second.stderr
    assert second.returncode == 0 and again["figures"]["value"] == record["figures"]["value"]
    assert record["figures"]["hits"] == 0 < again["figures"]["hits"]  # what the first compiled, the second reads
    assert cli("report", "--out", out, cache=cache).returncode == 0 and "fake" in (out / "report.html").read_text()


def test_command_line_refuses_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    runs = tmp_path / "runs"
    for arguments, message in [
        (["run", "nonesuch", "--out", runs], "unknown benchmark nonesuch; there are: .*fake"),
        (["run", "fake", "--out", tmp_path / "file" / "x"], "--out: cannot write to"),
        (["report", "--out", runs], "no record in"),
    ]:
        done = cli(*arguments, cache=tmp_path)
        assert done.returncode == 2 and re.search(message, done.stderr), (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
    listed = cli("list", cache=tmp_path)
    assert listed.returncode == 0 and re.search(r"fake\s+A made-up benchmark\.", listed.stdout)


def test_a_killed_command_goes_on_where_it_stopped(tmp_path):
    command = ("run", "fake", "--out", tmp_path / "runs", "--device", "cpu")
    assert cli(*command, cache=tmp_path, KILL_AT="2").returncode == -9
    assert not (tmp_path / "runs" / "fake.json").exists()
    assert cli(*command, cache=tmp_path).returncode == 0
    figures = json.loads((tmp_path / "runs" / "fake.json").read_text())["figures"]
    assert (figures["computed"], figures["total"]) == (1, 3)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    done = cli("run", "fake", "--out", tmp_path, "--device", "tpu", cache=tmp_path)
    assert done.returncode == 2 and "--device tpu: JAX finds none here" in done.stderr, done.stderr
