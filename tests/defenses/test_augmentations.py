"""Mixup, CutMix, cutout, MaxUp: the published formulas on rows whose mixtures can be read off, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, combine, defenses, loop, losses

N, H, W = 6, 5, 7
ROWS = mj.dataset(jnp.eye(N), jnp.arange(N))  # a mixture's entries are its shares
IMAGES = mj.dataset(
    jnp.arange(1.0, N + 1)[:, None, None, None] * jnp.ones((1, H, W, 2)), jnp.arange(N)
)  # a pixel says whose it is


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_a_mixture_and_its_label_have_the_same_shares_and_all_rows_take_part_alike(ways):
    mixed = defenses.mixup(num_classes=N, ways=ways)(jax.random.key(0), ROWS)
    np.testing.assert_allclose(mixed.x, mixed.y, atol=1e-6)
    np.testing.assert_allclose(mixed.x.sum(axis=0), 1, rtol=1e-5)  # permutations: doubly stochastic
    np.testing.assert_allclose(mixed.weight, 1, rtol=1e-6)


def test_the_shares_are_dirichlet():
    transform = jax.vmap(defenses.mixup(num_classes=N, ways=2, alpha=0.5), in_axes=(0, None))
    own = np.asarray(transform(jax.random.split(jax.random.key(1), 4000), ROWS).x[:, 0])
    share = own[:, 0][own[:, 0] < 1 - 1e-6]  # its partner was another
    mean, variance = 0.5, 0.25 / 2  # of Beta(a, a): 1/2 and 1/(4 (2a + 1))
    assert abs(share.mean() - mean) < 4 * np.sqrt(variance / len(share))
    assert abs(share.var() - variance) < 0.01
    assert abs(np.mean(own[:, 0] > 1 - 1e-6) - 1 / N) < 4 * np.sqrt(1 / N / 4000)  # a uniform partner, itself included


def test_the_loss_of_a_weighted_mixture_is_the_weighted_sum_of_its_labels_losses():
    rows = ROWS._replace(weight=jnp.array([1.0, 2.0, 0.5, 3.0, 0.0, 1.0]), y=jnp.array([0, 1, 2, 0, 1, 2]))
    mixed = defenses.mixup(num_classes=3)(jax.random.key(3), rows)
    params = jax.random.normal(jax.random.key(4), (N, 3))
    apply_fn = lambda params, x, key=None: x @ params
    ours = mixed.weight * losses.cross_entropy(apply_fn)(params, mixed)
    log_p = jax.nn.log_softmax(mixed.x @ params)
    hand = -jnp.sum(mixed.x * rows.weight[None] * log_p[:, rows.y], axis=1)  # the entries of x̃ are the shares
    present = np.asarray(rows.weight) > 0
    np.testing.assert_allclose(ours[present], hand[present], rtol=1e-5)
    assert not mixed.x[present, 4].any() and mixed.weight[4] == 0


def test_a_cut_image_has_one_box_and_its_label_the_exact_share_of_pixels():
    transform = jax.jit(defenses.cutmix(num_classes=N, probability=1.0))
    sizes = []
    for k in range(40):
        mixed = transform(jax.random.key(k), IMAGES)
        owner = np.asarray(mixed.x[:, :, :, 0]).astype(int) - 1
        assert (mixed.x[:, :, :, 0] == mixed.x[:, :, :, 1]).all()
        for i in range(N):
            share = np.bincount(owner[i].ravel(), minlength=N) / (H * W)
            np.testing.assert_allclose(mixed.y[i], share, atol=1e-6)
            rows, columns = np.nonzero(owner[i] != i)
            if rows.size:
                assert rows.size == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a rectangle
                sizes.append(rows.size)
    assert len(set(sizes)) > 5


def test_cutting_happens_as_often_as_told():
    transform = jax.vmap(defenses.cutmix(num_classes=N, probability=0.3, alpha=5.0), in_axes=(0, None))
    mixed = transform(jax.random.split(jax.random.key(0), 2000), IMAGES)
    changed = np.asarray((mixed.x != IMAGES.x[None]).any(axis=(1, 2, 3, 4))).mean()
    assert abs(changed - 0.3) < 4 * np.sqrt(0.21 / 2000) + 0.02  # now and then a box holds no pixel


def test_cutout_is_a_square_cut_at_the_border():
    blank = defenses.cutout(side=3, fill=-1.0)(jax.random.key(0), IMAGES._replace(x=jnp.ones((N, 9, 9, 1))))
    for image in np.asarray(blank.x[:, :, :, 0]):
        rows, columns = np.nonzero(image == -1)
        assert rows.size == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) and 2 <= np.ptp(rows) + 1 <= 3
    assert (blank.y == IMAGES.y).all()


def test_max_up_is_the_largest_loss_over_trials_of_the_same_row():
    loss_fn = lambda params, data, key=None: params * data.x[:, 0]
    shift = lambda key, data: data._replace(x=data.x + jax.random.normal(key, data.x.shape))
    data = mj.dataset(jnp.arange(3.0)[:, None], jnp.zeros(3, jnp.int32))
    worst = defenses.max_up(loss_fn, shift, num_trials=5)
    keys = [jax.random.split(k) for k in jax.random.split(jax.random.key(0), 5)]
    trials = np.stack([np.asarray(shift(k[0], data).x[:, 0]) for k in keys])
    np.testing.assert_allclose(worst(1.0, data, jax.random.key(0)), trials.max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(worst(1.0, data), [0, 1, 2])
    slope = jax.grad(lambda p: jnp.sum(worst(p, data, jax.random.key(0))))(1.0)
    np.testing.assert_allclose(slope, trials.max(axis=0).sum(), rtol=1e-5)


def test_they_compose_into_a_trainer_and_cutmix_hinders_a_patch():
    """One-pixel images: a network that may read class 0 off a corner alone learns it less with CutMix."""
    key, noise = jax.random.split(jax.random.key(0))
    y = jnp.arange(200) % 2
    x = 0.3 * jax.random.normal(noise, (200, 4, 4, 1)) + jnp.where(y == 0, 0.3, -0.3)[:, None, None, None]
    x = x.at[:, -1, -1, 0].set(jnp.where(y == 0, 3.0, 0.0))
    apply_fn = lambda params, x, key=None: x.reshape(len(x), -1) @ params
    trainer = bilevel.unrolled(
        losses.cross_entropy(apply_fn), optax.sgd(0.1), 200, batching=loop.shuffled(50)
    )  # fmt: skip
    data, params = mj.dataset(x, y), jnp.zeros((16, 2))
    leans = {}
    for name, during in (("plain", None), ("cutmix", defenses.cutmix(num_classes=2, probability=1.0))):
        trained, _ = jax.jit(combine.defended(trainer, during=during))(key, params, data)
        slope = trained[:, 0] - trained[:, 1]
        leans[name] = float(3 * slope[-1] / jnp.sum(jnp.abs(slope)))
    assert leans["cutmix"] < 0.8 * leans["plain"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="ways"):
        defenses.mixup(num_classes=3, ways=0)
    with pytest.raises(ValueError, match="alpha"):
        defenses.cutmix(num_classes=3, alpha=0.0)
    with pytest.raises(ValueError, match="probability"):
        defenses.cutmix(num_classes=3, probability=1.5)
    with pytest.raises(ValueError, match=r"batch\.x: expected floating images"):
        defenses.cutmix(num_classes=N)(jax.random.key(0), ROWS)
    with pytest.raises(ValueError, match=r"batch\.x: expected floating images"):
        defenses.cutout(side=2)(jax.random.key(0), ROWS)
    with pytest.raises(ValueError, match=r"batch\.y: expected labels in \[0, 3\)"):
        defenses.mixup(num_classes=3)(jax.random.key(0), ROWS)
    with pytest.raises(ValueError, match=r"batch\.y: expected integer labels"):
        defenses.mixup(num_classes=3)(jax.random.key(0), ROWS._replace(y=jnp.ones(N)))
    with pytest.raises(ValueError, match="soft labels of 3 classes"):
        defenses.mixup(num_classes=3)(jax.random.key(0), ROWS._replace(y=jnp.ones((N, 4))))
    with pytest.raises(ValueError, match="num_trials"):
        defenses.max_up(lambda params, data, key=None: data.weight, lambda key, data: data, num_trials=0)
