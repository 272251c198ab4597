"""The backdoor benchmarks' own pieces: rows that nobody trains on, budgets, what a cell counts."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import _zoo, adaptive, certified, deep_back_gradient, defense_matrix, spectral
from benchmarks._run import Context

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def digits():
    return _zoo.digits(1000, embedded=True)


@pytest.mark.parametrize("size, whole", [("full", True), ("paper", True), ("small", False)])
def test_only_small_runs_go_without_prepared_data(size, whole, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    readers = [
        lambda: deep_back_gradient._digits(size),
        lambda: certified.digits((1, 7), certified.SIZES[size], fallback=size == "small"),
        lambda: _zoo.digits(embedded=size == "small"),
    ]
    for read in readers:
        if whole:
            with pytest.raises(FileNotFoundError, match="tfds build mnist"):
                read()
        else:
            assert read()


def test_defenders_digits_are_nobodys_training_digits(digits):
    rows = [{np.asarray(x).tobytes() for x in part.x} for part in (digits.train, digits.clean, digits.test)]
    assert [len(part) for part in rows] == [1000, 500, 1500]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]


def test_a_cell_is_accuracy_success_and_recovery_over_digits_of_other_classes():
    y, wanted = np.array([0, 1, 2, 3]), np.array([0, 0, 0, 0])
    got = defense_matrix.cell(np.array([0, 1, 2, 9]), np.array([0, 0, 2, -1]), y, wanted)
    np.testing.assert_allclose(got, [3 / 4, 1 / 3, 1 / 3])


@pytest.mark.parametrize("name", ["clean", "patch", "all_to_all", "blend", "stripes", "warp"])
def test_every_backdoor_keeps_its_budget_and_its_share_is_the_largest_of_a_class(digits, name):
    backdoor = defense_matrix.BACKDOORS[name]
    rows, share = defense_matrix.poisoned(KEY, backdoor, digits.train, None)
    changed = np.asarray(jnp.any(rows.x != digits.train.x, axis=(1, 2, 3)) | (rows.y != digits.train.y))
    assert changed.sum() == round(backdoor.fraction * 1000)
    if backdoor.fraction:
        largest = max(np.mean(changed[np.asarray(rows.y) == c]) for c in range(10) if c == 0 or name == "all_to_all")
        assert abs(share - largest) < 0.06
    else:
        assert 0 < share < 0.1


def test_the_matrix_has_every_defense_that_it_names():
    assert set(defense_matrix.trainers(defense_matrix.SIZES["small"])) | set(defense_matrix.AT_TEST) == set(
        defense_matrix.EVERY_DEFENSE
    )
    assert set(defense_matrix.SIZES["small"].defenses) <= set(defense_matrix.EVERY_DEFENSE)


def test_the_matrix_keeps_the_lowest_and_the_highest_success_over_seeds(digits, monkeypatch, tmp_path):
    chosen = defense_matrix.SIZES["small"]._replace(seeds=3)
    monkeypatch.setitem(defense_matrix.SIZES, "small", chosen)
    monkeypatch.setattr(_zoo, "digits", lambda *args, **options: digits)
    context = Context("defense_matrix", "small", 0, tmp_path, "code", Console(file=io.StringIO()))
    seed = lambda item: int(item[-1])
    context.once = lambda item, fn: {name: np.array([0.9, 0.25 * seed(item), 0.5]) for name in chosen.defenses}
    figures = defense_matrix.run("small", 0, context).figures
    for cell in ("clean_none", "patch_strip"):
        got = [figures[f"{figure}_{cell}"] for figure in ("success_lowest", "success", "success_highest")]
        assert got == [0.0, 0.25, 0.5]


def test_what_the_published_code_removed_stands_beside_the_defender_who_knows_the_target():
    paper = spectral.published(["dog_10"])
    assert paper["left_dog_10"].value == 57 and "0 to 57" in paper["left_dog_10"].source
    assert "target class alone" in paper["pois_known_dog_10"].source and "alone" not in paper["pois_after_dog_10"].source
    assert {"nat_before_dog_10", "nat_after_dog_10", "nat_known_dog_10"} <= set(paper)


def test_adaptive_trials_have_reserved_rows_and_ask_for_another_label():
    (keys, targets, labels), (train, clean) = adaptive.problem(KEY, 6, embedded=True)
    assert train.num_rows == 510 and train.weight[-adaptive.POISONS :].sum() == 0
    assert jnp.bincount(train.y[: -adaptive.POISONS], length=10).tolist() == [50] * 10
    seen = {np.asarray(x).tobytes() for x in train.x}
    assert not seen & {np.asarray(x).tobytes() for x in targets} and not seen & {np.asarray(x).tobytes() for x in clean.x}
    test = _zoo.digits(3000, embedded=True).test
    true = {np.asarray(x).reshape(-1).tobytes(): int(y) for x, y in zip(test.x, test.y)}
    assert all(true[np.asarray(x).tobytes()] != int(label) for x, label in zip(targets, labels))
    assert len(keys) == 6


def test_spots_are_pixels_of_one_colour():
    stamped = spectral.spots(spectral.ELL, (11, 16), (255, 0, 51))(None, jnp.full((1, 32, 32, 3), 0.5))
    changed = np.argwhere(np.any(np.asarray(stamped[0]) != 0.5, axis=-1))
    assert changed.tolist() == [[11, 16], [12, 16], [12, 17]]
    np.testing.assert_allclose(stamped[0, 11, 16], [1.0, 0.0, 0.2], rtol=1e-6)
