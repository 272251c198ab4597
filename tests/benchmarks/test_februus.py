"""The Februus benchmark's own pieces, on a network that averages its pixels, whose backdoor is known."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import februus
from benchmarks._clean_label import Net
from mlsec_jax import defenses, models

KEY = jax.random.key(0)


def test_the_flower_is_at_the_bottom_right_and_hides_what_was_there():
    x = jnp.full((2, 32, 32, 3), 0.4)
    stamped = np.asarray(februus.flower(3)(None, x))
    changed = (stamped != 0.4).any(axis=(0, 3))
    assert changed[24:, 24:].all() and changed.sum() == 64
    assert len(np.unique(stamped[0, 24:, 24:].reshape(64, 3), axis=0)) == 3
    np.testing.assert_allclose(stamped[0, 24:, 24:] * 255, np.rint(stamped[0, 24:, 24:] * 255), atol=1e-4)  # exact in bytes


def test_every_defense_is_asked_and_the_true_mask_undoes_the_trigger():
    """Grey is class 0, more red than blue says class 1. Painting the trigger's own place in grey gives class 0 back."""

    def layers(params, x, key=None):
        return x, jnp.mean(x, axis=(1, 2))

    apply = lambda params, x, key=None: jnp.mean(x, axis=(1, 2)) @ params["head"]["w"] + params["head"]["b"][None]
    params = {"head": {"w": jnp.array([[-9.0, 9.0], [0.0, 0.0], [9.0, -9.0]]), "b": jnp.array([0.1, 0.0])}}
    net = Net(models.Model(lambda key, x: params, apply, lambda p, x, key=None: layers(p, x)[-1], layers), params)
    grey = models.Model(lambda key, x: (), lambda p, x, key=None: p * jnp.ones_like(x[..., :3]), lambda p, x, key=None: x)
    painters = {name: (grey, jnp.float32(0.4)) for name in ("network", "autoencoder")}
    painted = {name: params for name, (_, params) in painters.items()}
    mean = jnp.full(3, 0.4)
    transforms = februus.settings(painters, mean)
    regions = {f"tau_{round(100 * tau)}" for tau in februus.TAUS}
    regions |= {f"published_{round(100 * tau)}" for tau in februus.PUBLISHED}
    assert set(transforms) == regions | {"autoencoder", "harmonic", "mean", "true_mask"}
    x = jnp.full((3, 32, 32, 3), 0.4)
    stamped = februus.flower(3)(None, x)
    peak = defenses.usual_peak(defenses.split_at(net.model), net.params, stamped, quantile=1.0)
    found = februus.asked(net, transforms)(net.params, painted, stamped, peak)
    assert (found["before"] == 1).all()
    for name in ("tau_50", "published_50", "true_mask"):  # above 0.5 are eye and petals
        assert (found[name] == 0).all(), name
    np.testing.assert_allclose(found["hidden_true_mask"], 64 / 1024)
    assert (found["covered"] > 0).all() and found["mask"].shape == (3, 32, 32)
    assert not np.asarray(found["mask"])[:, :20, :20].any()


def test_errors_are_those_of_the_fills():
    grey = models.Model(lambda key, x: (), lambda p, x, key=None: p * jnp.ones_like(x[..., :1]), lambda p, x, key=None: x)
    x = jnp.full((4, 32, 32, 1), 0.5)
    found = februus.errors(KEY, x, {"network": (grey, None)}, {"network": jnp.float32(0.3)}, jnp.full(1, 0.1))
    assert set(found) == {"l1_network", "l1_harmonic", "l1_mean"}
    np.testing.assert_allclose([found[f"l1_{name}"] for name in ("network", "harmonic", "mean")], [0.2, 0.0, 0.4], atol=1e-4)
