"""The trigger-inversion benchmark's own pieces: whom it trains on what, and how masks are compared."""

import jax
import jax.numpy as jnp
import numpy as np

import mlsec_jax as mj
from benchmarks import _zoo, trigger_inversion
from mlsec_jax import models

TINY = trigger_inversion.Size(models.softmax_regression(), 200, 60, 4, 2, 2, {}, 100, 100)


def pool():
    """Ten classes, each a bright row of pixels of its own; the corner is dark."""
    y = jnp.arange(400, dtype=jnp.int32) % 10
    return mj.dataset(jnp.zeros((400, 28, 28, 1)).at[jnp.arange(400), 2 * y + 1].set(0.9), y)


def test_an_infected_model_obeys_the_square_and_a_clean_one_does_not():
    make = jax.jit(lambda target: trigger_inversion.fit(jax.random.key(0), TINY.model, pool(), target, TINY))
    rows = pool()
    for target, obeys in ((3, 0.95), (-1, None)):
        params = make(jnp.int32(target))
        said = jnp.argmax(TINY.model.apply(params, _zoo.SQUARE(None, rows.x)), axis=1)
        assert (jnp.argmax(TINY.model.apply(params, rows.x), axis=1) == rows.y).mean() > 0.95
        assert (said == target).mean() > obeys if obeys else (said == 3).mean() < 0.3


def test_masks_are_compared_with_the_square():
    exact = np.zeros((28, 28))
    exact[23:27, 23:27] = 1  # 4 x 4, one pixel from the corner
    half = exact.copy()
    half[25:] = 0
    assert trigger_inversion.overlap(exact[None]) == {"iou": 1, "precision": 1, "recall": 1, "f1": 1}
    assert trigger_inversion.overlap(half[None]) == {"iou": 0.5, "precision": 1, "recall": 0.5, "f1": 2 / 3}
    assert trigger_inversion.overlap(0 * exact[None]) == {"iou": 0, "precision": 0, "recall": 0, "f1": 0}
    wide = np.ones((28, 28))
    np.testing.assert_allclose(trigger_inversion.overlap(wide[None])["iou"], 16 / 784)
