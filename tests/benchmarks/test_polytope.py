"""The clean-label benchmarks' own parts: what is held out, what trials are judged on, and what a small run records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from benchmarks import _clean_label as shared
from benchmarks import just_how_toxic, polytope
from benchmarks._record import UsageError
from mlsec_jax import data


@pytest.fixture(scope="module")
def images():
    """The embedded digits, or CIFAR-10 where it is."""
    return shared.images(fallback=True)


def test_networks_are_pretrained_on_nothing_that_is_fine_tuned_or_aimed_at(images):
    given = polytope.problem(images, polytope.SIZES["small"])
    pretrained = shared.floats(images.x[given.pretraining]).reshape(len(given.pretraining), -1)
    seen = {row.tobytes() for row in np.asarray(pretrained)}
    held = np.concatenate([np.asarray(given.tuning.x), np.asarray(given.targets)]).reshape(-1, pretrained.shape[1])
    assert not seen & {row.tobytes() for row in held}
    assert np.all(np.asarray(given.tuning.y[: polytope.POISONS]) == polytope.BASE_CLASS)
    assert np.bincount(np.asarray(given.tuning.y)).tolist() == [50] * 10


def test_no_setup_fine_tunes_on_a_pretraining_row(images):
    rows = set(shared.pretraining_rows(images.y, 4000).tolist())
    num_rows = 2500 if len(images.y) == 50_000 else 1000
    for trial in just_how_toxic.setups(images, 5):
        if len(images.y) == 50_000:
            assert not rows & set(data.fine_tuning_rows(images.y, trial, num_rows=num_rows).tolist())
        assert images.y[trial.base_indices].tolist() == [trial.base_class] * len(trial.base_indices)


def crafted(context, name):
    """Poisons of five targets on pixels, by steps that end on the budget's edge."""
    rng = np.random.default_rng(0)
    bases = shared.floats(rng.integers(0, 256, (5, polytope.POISONS, 4, 4, 3), np.uint8))
    targets = shared.floats(rng.integers(0, 256, (5, 4, 4, 3), np.uint8))
    features = lambda params, x, key=None: x.reshape(len(x), -1)
    attack = polytope.attack(name)
    return bases, shared.craft(context, name, jax.random.key(0), attack, features, (), bases, targets, num_steps=40)


class Interrupted(Exception):
    pass


class Shelf:
    """A context that keeps items, and is interrupted before the third new one."""

    def __init__(self):
        self.items, self.made, self.most = {}, [], 2

    def progress(self, items, label):
        return items

    def once(self, item, fn):
        if item not in self.items:
            if len(self.made) == self.most:
                raise Interrupted
            self.made.append(item)
            self.items[item] = {key: np.asarray(value) for key, value in fn().items()}
        return self.items[item]


@pytest.mark.parametrize("name", polytope.ATTACKS)
def test_poisons_keep_their_radius_after_rounding_and_finished_targets_survive(name, monkeypatch):
    monkeypatch.setattr(shared, "_at_once", lambda: 2)
    shelf = Shelf()
    with pytest.raises(Interrupted):
        crafted(shelf, name)
    assert shelf.made == [f"{name}-0", f"{name}-2"]
    shelf.most = 3
    bases, found = crafted(shelf, name)
    assert shelf.made == [f"{name}-0", f"{name}-2", f"{name}-4"]
    assert found["poison"].shape == bases.shape and found["outer"].shape == (5, 40)
    moved = np.abs(data.to_bytes(found["poison"]).astype(int) - data.to_bytes(np.asarray(bases))).max(axis=(1, 2, 3, 4))
    assert moved.max() == 25 and moved.min() > 0
    shared.check_levels(name, found["poison"], bases, 0.1)
    with pytest.raises(AssertionError, match="25 levels"):
        shared.check_levels(name, found["poison"], bases, 24 / 255)
    monkeypatch.setattr(shared, "_at_once", lambda: 8)
    np.testing.assert_array_equal(found["poison"], crafted(Shelf(), name)[1]["poison"])


def test_linear_victims_learn_their_poisons():
    """Two trials on the same table: the class of the poisons decides what the point at their place is taken for."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8)).astype(np.float32)
    y = (np.arange(40) % 2).astype(np.int32)
    x[:, 0] += 4 * y
    table = mj.dataset(jnp.asarray(x), jnp.asarray(y))
    rows = jnp.stack([jnp.arange(0, 40), jnp.arange(39, -1, -1)])  # the first rows are of class 0, then of class 1
    place = jnp.full((2, 2, 8), 3.0).at[:, :, 0].set(2.0)
    head = shared.LINEAR.init(jax.random.key(0), table.x[:1])
    recipe = shared.HeadRecipe(optax.adam(0.1), 20, 20)
    rows = rows.at[:, :2].set(jnp.array([[0, 2], [1, 3]]))
    logits = shared.linear_victims(jax.random.split(jax.random.key(1), 2), table, rows, place, place[:, :1], head, recipe)
    assert np.argmax(np.asarray(logits)[:, 0], axis=1).tolist() == [0, 1]


def test_a_folders_own_target_is_asked_under_its_patch():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (25, 8, 6, 3), np.uint8)
    folder = data.PoisonFolder(x, np.full(25, 3, np.int32), np.arange(25), x[0], 1)
    np.testing.assert_allclose(just_how_toxic.asked("f", folder), x[0] / 255, atol=1e-7)
    patch = rng.uniform(size=(3, 2, 4))
    found = np.asarray(just_how_toxic.asked("f", folder._replace(patch=patch, corner=(2, 5))))
    expected = x[0] / 255
    for row in range(2):
        for column in range(4):
            expected[5 + row, 2 + column] = patch[:, row, column]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    for corner in ((3, 5), (-1, 0), (2, 7)):
        with pytest.raises(UsageError, match=r"a patch .* inside the target"):
            just_how_toxic.asked("f", folder._replace(patch=patch, corner=corner))


def test_a_folder_of_other_labels_shapes_or_budgets_is_refused():
    rng = np.random.default_rng(0)
    x = rng.integers(20, 200, (30, 4, 4, 3), np.uint8)
    images = shared.Images(x, np.zeros(30, np.int64), x, np.zeros(30, np.int64), ())
    trial = data.PoisonSetup(0, 1, 3, np.arange(25))
    folder = data.PoisonFolder(x[:25] + 8, np.full(25, 3, np.int32), np.arange(25), x[0], 1)
    just_how_toxic.checked("f", folder, trial, images)
    for wrong, message in (
        (folder._replace(y=folder.y + (np.arange(25) == 7)), r"label 3, got \[3, 4\]"),
        (folder._replace(x=x[:25, :3]), "images like their bases"),
        (folder._replace(target_x=x[0, :3]), "images like their bases"),
        (folder._replace(x=x[:25] + 10), "within 8 levels"),
    ):
        with pytest.raises(UsageError, match=message):
            just_how_toxic.checked("f", wrong, trial, images)
