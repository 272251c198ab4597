"""What the clean-label benchmarks share: trials that survive a stop, intervals, rounding."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import _clean_label
from benchmarks._run import Context
from mlsec_jax import measure, models


def context(folder):
    return Context("benchmark", "small", 0, folder, "code", Console(file=io.StringIO()))


def test_trials_go_on_where_they_were_stopped(tmp_path):
    fn = lambda x, y: {"sum": x + y, "twice": 2 * x}
    x, y = jnp.arange(3 * jax.device_count(), dtype=jnp.float32), jnp.float32(1)
    stopped = context(tmp_path)
    once, computed = stopped.once, []

    def stop_at_the_third(item, compute):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(item)
        return once(item, compute)

    stopped.once = stop_at_the_third
    with pytest.raises(KeyboardInterrupt):
        _clean_label.trials(stopped, "part", fn, (x,), (y,))
    finished = {path: path.read_bytes() for path in tmp_path.rglob("part-*.npz")}
    assert len(finished) == 2

    found = _clean_label.trials(context(tmp_path), "part", fn, (x,), (y,))
    np.testing.assert_array_equal(found["sum"], np.asarray(x) + 1)
    np.testing.assert_array_equal(found["twice"], 2 * np.asarray(x))
    assert all(path.read_bytes() == content for path, content in finished.items())

    def refuse(x, y):
        raise AssertionError("a finished trial was repeated")

    again = _clean_label.trials(context(tmp_path), "part", refuse, (x,), (y,))
    np.testing.assert_array_equal(again["sum"], found["sum"])


def test_share_has_wilsons_ends():
    figures = _clean_label.share("success", np.array([True] * 9 + [False]))
    low, high = measure.wilson(9, 10)
    assert figures == {"success": 0.9, "success_low": float(low), "success_high": float(high)}


def test_share_by_target_counts_each_target_once():
    hits = np.array([[True, True, False, True], [True, False, False, True]])  # two victims, four targets
    figures = _clean_label.share("success", hits, 4)
    low, high = measure.wilson(2.5, 4)
    assert figures.pop("success_low_by_target") == float(low) < figures["success_low"] < 0.625
    assert figures.pop("success_high_by_target") == float(high) > figures["success_high"] > 0.625
    assert figures == _clean_label.share("success", hits)


def test_eight_bits_is_the_round_trip_and_keeps_a_radius_of_whole_levels():
    key = jax.random.key(0)
    base = _clean_label.floats(np.arange(256, dtype=np.uint8))
    x = jnp.clip(base + jax.random.uniform(key, (256,), minval=-8 / 255, maxval=8 / 255), 0, 1)
    np.testing.assert_allclose(_clean_label.eight_bits(x), _clean_label.rounded(x), atol=1e-7)
    assert float(jnp.max(jnp.abs(_clean_label.eight_bits(x) - base))) <= 8 / 255 + 1e-6


def test_embedded_images_are_digits_whatever_is_prepared():
    pictures = _clean_label.images(embedded=True)
    assert pictures.x.shape == (3500, 32, 32, 1) and pictures.x_test.shape == (1500, 32, 32, 1)
    assert "not CIFAR-10" in pictures.notes[0]


@pytest.fixture
def tiny(monkeypatch):
    """An architecture that compiles fast."""
    network = lambda width, num_classes: models.mlp(widths=(width,), num_classes=num_classes)
    monkeypatch.setitem(_clean_label.ARCHITECTURES, "tiny", network)
    return "tiny"


def test_networks_of_one_model_are_members_of_one_entry(tiny):
    of = lambda width: _clean_label.architecture(tiny, width=width, colour=False, bfloat16=False)
    assert of(2) is of(2) and of(2) is not of(4)
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
    make = lambda k, width: _clean_label.Net(of(width), of(width).init(jax.random.key(k), x))
    nets = [make(0, 2), make(1, 4), make(2, 2)]
    fn, surrogates = _clean_label.stacked(nets, lambda model: model.features)
    first, second = fn(surrogates, x)
    for found, net in zip((*first, *second), (nets[0], nets[2], nets[1]), strict=True):
        np.testing.assert_allclose(found, net.model.features(net.params, x), rtol=1e-5, atol=1e-6)


def test_networks_trained_over_the_devices_are_those_trained_alone(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("MLSEC_JAX_CACHE", str(tmp_path))
    x = np.random.default_rng(0).integers(0, 256, (128, 4, 4, 1), dtype=np.uint8)
    y, keys = np.arange(128) % 10, jax.random.split(jax.random.key(0), jax.device_count() + 1)
    each = _clean_label.pretrained_each(keys, tiny, x, y, num_epochs=2)
    assert len(each) == len(keys)
    for key, net in zip(keys[-2:], each[-2:]):
        alone = _clean_label.pretrained(key, tiny, x, y, num_epochs=2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), net.params, alone.params)
    assert np.ptp([float(np.sum(net.params["head"]["w"])) for net in each]) > 0
