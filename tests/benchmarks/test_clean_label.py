"""What the clean-label benchmarks share: trials that survive a stop, intervals, rounding."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import _clean_label
from benchmarks._run import Context
from mlsec_jax import measure


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
