"""Holes against what they promise, and the painter against the two fills that learn nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import defenses, models, train

KEY = jax.random.key(0)


def test_holes_are_rectangles_and_blobs_of_the_sizes_asked_for():
    draw = jax.jit(lambda key: train.random_holes(key, 400, (20, 24), low=3, high=8))
    holes = np.asarray(draw(KEY))[..., 0]
    assert holes.shape == (400, 20, 24) and set(np.unique(holes)) == {0, 1}
    rows, columns = holes.any(axis=2).sum(axis=1), holes.any(axis=1).sum(axis=1)
    full = holes.sum(axis=(1, 2)) == rows * columns
    assert 0.4 < full.mean() < 0.75  # half are rectangles, and a few small blobs look like one
    assert (holes.sum(axis=(1, 2)) >= 4).all()
    assert rows[full].min() >= 2 and rows[full].max() == 8 and columns[full].max() == 8
    assert holes.mean(axis=0).min() > 0  # every pixel has its turn
    assert not (holes[0] == holes[1]).all()


def waves(key, num, side=8):
    """Sine gratings: what is in a hole follows from what is around, but not harmonically."""
    angle, phase, pitch = jax.random.uniform(key, (3, num, 1, 1))
    at = jnp.arange(side, dtype=jnp.float32)
    along = jnp.cos(jnp.pi * angle) * at[None, :, None] + jnp.sin(jnp.pi * angle) * at[None, None]
    return 0.5 + 0.45 * jnp.sin((0.8 + 0.6 * pitch) * along + 6.3 * phase)[..., None]


@pytest.mark.slow
def test_a_painter_with_a_critic_beats_the_mean_and_the_membrane():
    model, critic = models.inpainter(width=8, num_downs=1, dilations=(2,)), models.patch_critic(width=4, num_downs=1)
    recipe = train.InpaintingRecipe(num_epochs=24, batch_size=32, learning_rate=5e-3, low=2, high=4, critic_steps=2)
    clean = mj.dataset(waves(KEY, 512), jnp.zeros(512, jnp.int32))
    fit = jax.jit(lambda key, data: train.pretrain_inpainter(key, model, data, recipe, critic=critic))
    params, info = fit(KEY, clean)
    assert info["l1"].shape == (24 * 16,) and info["l1"][-20:].mean() < 0.5 * info["l1"][:20].mean()
    assert info["distance"].shape == (int(0.2 * 24 * 16),) and (np.asarray(info["distance"]) != 0).any()

    @jax.jit
    def errors(params):
        x, hole = waves(jax.random.key(7), 200), train.random_holes(jax.random.key(8), 200, (8, 8), low=2, high=4)
        fills = defenses.fill_network(model.apply, params), defenses.fill_harmonic(num_steps=20), defenses.fill_mean(0.5)
        return [jnp.sum(hole * jnp.abs(fill(x, hole) - x)) / jnp.sum(hole) for fill in fills]

    painted, harmonic, mean = errors(params)
    assert painted < 0.75 * harmonic and painted < 0.75 * mean


BLIND = models.Model(lambda key, x: {"b": jnp.zeros(())}, lambda p, x, key=None: 0 * x[..., :1] + p["b"], None)
PIXEL = models.Model(lambda key, x: {"w": jnp.full((), 0.2)}, lambda p, x, key=None: p["w"] * x[:, 1, 1, :1], None)


def toy(data, **changes):
    """A painter that knows one colour, and a linear critic of one pixel."""
    recipe = train.InpaintingRecipe(num_epochs=300, batch_size=len(data.y), low=4, high=4, critic_steps=1)
    return train.pretrain_inpainter(KEY, BLIND, data, recipe._replace(**changes), critic=PIXEL)


def test_the_penalty_holds_the_critics_slope():
    """`min_w penalty (w - 1)² - w d`, d the share of holes over the pixel: w = 1 + d / 20, or without end."""
    clean = mj.dataset(jnp.ones((32, 4, 4, 1)), jnp.zeros(32, jnp.int32))
    fit = lambda penalty: toy(clean, learning_rate=0.0, share=1.0, critic_rate=0.02, penalty=penalty)[1]["distance"][-1]
    fit = jax.jit(fit)
    assert abs(float(fit(10.0)) - 1.05) < 0.1 and float(fit(0.0)) > 2


def test_the_painter_learns_the_median_and_what_the_critic_likes():
    """L1 alone: the median of the colours, 0.2 for two thirds of the rows. The critic's opinion wins if it weighs enough."""
    colour = jnp.where(jnp.arange(30) % 3 == 0, 0.8, 0.2)
    clean = mj.dataset(jnp.broadcast_to(colour[:, None, None, None], (30, 4, 4, 1)), jnp.zeros(30, jnp.int32))
    fit = lambda adversarial: toy(clean, learning_rate=0.01, share=0.5, critic_rate=0.0, adversarial=adversarial)[0]["b"]
    fit = jax.jit(fit)
    np.testing.assert_allclose(fit(0.0), 0.2, atol=0.03)
    assert float(fit(20.0)) > 0.4  # a frozen critic likes bright pixels: slope 0.2 · 20 against at most 1


def test_rows_of_weight_zero_teach_nothing():
    clean = mj.dataset(waves(KEY, 8), jnp.zeros(8, jnp.int32))
    fit = jax.jit(lambda data: toy(data, num_epochs=10, share=0.5))
    absent = lambda value: clean._replace(x=clean.x.at[3].set(value), weight=clean.weight.at[3].set(0))
    first, second = fit(absent(0.0)), fit(absent(jnp.nan))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)))


def test_without_a_critic_there_is_no_distance():
    clean = mj.dataset(waves(KEY, 8), jnp.zeros(8, jnp.int32))
    recipe = train.InpaintingRecipe(num_epochs=3, batch_size=4, low=4, high=4)
    _, info = jax.eval_shape(lambda: train.pretrain_inpainter(KEY, BLIND, clean, recipe))
    assert info["l1"].shape == (6,) and info["distance"].shape == (0,)


def test_bad_input_is_named():
    clean = mj.dataset(jnp.ones((4, 8, 8, 1)), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"clean\.num_rows"):
        train.pretrain_inpainter(KEY, models.inpainter(), clean, train.InpaintingRecipe())
    with pytest.raises(ValueError, match=r"recipe\.batch_size: expected an integer of at least 1, got 0"):
        train.pretrain_inpainter(KEY, models.inpainter(), clean, train.InpaintingRecipe(batch_size=0))
    with pytest.raises(ValueError, match="high: expected holes that fit"):
        train.random_holes(KEY, 1, (8, 8))
    with pytest.raises(ValueError, match="multiple of 4"):
        models.inpainter().init(KEY, (10, 8, 4))
