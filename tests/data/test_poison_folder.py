"""Folders of poisons: what is written is read, what could run code is refused, a budget survives rounding."""

import base64
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from mlsec_jax import data

TENSOR = base64.b64decode(  # pickle.dumps(torch.arange(8.0).reshape(2, 2, 2)[:, :, 1:].transpose(1, 2), protocol=4)
    "gASVqgEAAAAAAACMDHRvcmNoLl91dGlsc5SMEl9yZWJ1aWxkX3RlbnNvcl92MpSTlCiMDXRvcmNoLnN0b3JhZ2WUjBBfbG9hZF9mcm9tX2J5dG"
    "VzlJOUQhsBAACAAooKbPycRvkgaqhQGS6AAk3pAy6AAn1xAChYEAAAAHByb3RvY29sX3ZlcnNpb25xAU3pA1gNAAAAbGl0dGxlX2VuZGlhbnEC"
    "iFgKAAAAdHlwZV9zaXplc3EDfXEEKFgFAAAAc2hvcnRxBUsCWAMAAABpbnRxBksEWAQAAABsb25ncQdLBHV1LoACKFgHAAAAc3RvcmFnZXEAY3"
    "RvcmNoCkZsb2F0U3RvcmFnZQpxAVgOAAAAOTM5NDE5OTk0ODkyMTZxAlgDAAAAY3B1cQNLCE50cQRRLoACXXEAWA4AAAA5Mzk0MTk5OTQ4OTIx"
    "NnEBYS4IAAAAAAAAAAAAAAAAAIA/AAAAQAAAQEAAAIBAAACgQAAAwEAAAOBAlIWUUpRLAUsCSwFLAoeUSwRLAUsCh5SJjAtjb2xsZWN0aW9uc5"
    "SMC09yZGVyZWREaWN0lJOUKVKUdJRSlC4="
)


def example(k=3, side=4):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (k, side, side, 3), np.uint8)
    return data.PoisonFolder(x, np.full(k, 5, np.int32), np.arange(k) + 10, x[0], 2)


@pytest.mark.parametrize("trigger", [False, True])
def test_a_folder_comes_back(tmp_path, trigger):
    poisons = example()
    if trigger:
        poisons = poisons._replace(patch=np.ones((3, 2, 2)), corner=(1, 2))
    data.write_poisons(tmp_path / "new" / "folder", poisons)
    found = data.read_poisons(tmp_path / "new" / "folder")
    for mine, theirs in zip(poisons, found, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["base_indices.pickle", "poisons.pickle", "target.pickle"]


def test_others_folders_are_read(tmp_path):
    image = Image.fromarray(example().x[0])
    for name, content in (("poisons", [(image, 1)]), ("base_indices", [np.int64(7)]), ("target", (image, np.int64(3)))):
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(content, protocol=2))
    found = data.read_poisons(tmp_path)
    assert found.base_indices.tolist() == [7] and found.target_y == 3 and found.patch is None


def test_png_images_and_the_newest_pickles_are_read(tmp_path):
    Image.fromarray(example().x[0]).save(tmp_path / "image.png")
    x = np.asarray(example().x[0])
    with Image.open(tmp_path / "image.png") as image:
        contents = {"poisons": [(image, 1)], "base_indices": np.arange(1), "target": (image, 3, np.ones((2, 3)).T, [0, 1])}
        for name, content in contents.items():
            (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(content, protocol=5))
    found = data.read_poisons(tmp_path)
    assert (found.x[0] == x).all() and (found.target_x == x).all() and found.patch.shape == (3, 2)
    assert found.base_indices.tolist() == [0]
    path = tmp_path / "base_indices.pickle"
    stream = path.read_bytes().replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")  # as older NumPy names it
    path.write_bytes(stream[:2] + stream[11:])  # without the frame's length
    assert data.read_poisons(tmp_path).base_indices.tolist() == [0]


def test_labels_in_arrays_images_as_arrays_and_targets_without_a_patch(tmp_path):
    x = example().x
    target = (Image.fromarray(x[1]), np.array([3]), None, None)
    contents = {"poisons": [(x[0], np.array([4]))], "base_indices": [2], "target": target}
    for name, content in contents.items():
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(content, protocol=4))
    found = data.read_poisons(tmp_path)
    assert found.y.tolist() == [4] and found.target_y == 3 and found.patch is None
    np.testing.assert_array_equal(found.x, x[:1])


def test_a_patch_of_pytorchs_is_read_without_it(tmp_path):
    data.write_poisons(tmp_path, example()._replace(patch=np.zeros((2, 1, 2)), corner=(0, 1)))

    target = pickle.dumps((Image.fromarray(example().x[0]), 2), protocol=4)
    path = tmp_path / "target.pickle"
    end = b"\x86\x94."  # of a pair; its two parts, the tensor and a corner make four
    assert target.endswith(end)
    body = target[: -len(end)][11:]
    path.write_bytes(b"\x80\x04(" + body + TENSOR[11:-1] + b"]\x94(K\x00K\x01et.")
    found = data.read_poisons(tmp_path)
    np.testing.assert_array_equal(found.patch, [[[1, 3]], [[5, 7]]])
    assert found.corner == (0, 1)


def test_no_poisons_and_half_a_trigger(tmp_path):
    nobody = example()._replace(x=np.zeros((0, 4, 4, 3), np.uint8), y=np.zeros(0, np.int32), base_indices=np.zeros(0, np.int64))
    data.write_poisons(tmp_path, nobody)
    assert len(data.read_poisons(tmp_path).x) == 0
    with pytest.raises(ValueError, match="poisons: expected a patch with its corner, or neither"):
        data.write_poisons(tmp_path, example()._replace(patch=np.ones((3, 2, 2))))


def test_a_stream_sets_no_attribute_of_numpys_own(tmp_path):
    """Opcodes that take numpy's function and set its defaults, as an unpickler lets them."""
    data.write_poisons(tmp_path, example())
    (tmp_path / "base_indices.pickle").write_bytes(b"cnumpy._core.numeric\n_frombuffer\n(N}V__defaults__\n(K\x01tstb.")
    with pytest.raises(ValueError, match=r"base_indices\.pickle"):
        data.read_poisons(tmp_path)
    assert np._core.numeric._frombuffer.__defaults__ != (1,)


class _Stream:
    """What pickles to a call and a state of one's choice."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(("name", "flags"), [("V8", 0), ("O", 63), ("u8", 63), ("S8", 0)])
def test_a_stream_makes_no_pointers_of_its_bytes(tmp_path, name, flags):
    """A dtype whose state says that eight bytes of the file are a Python object."""
    data.write_poisons(tmp_path, example(k=1))
    state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, flags)
    dtype = _Stream(np.dtype, (name, False, True), state)
    array = (1, (1,), dtype, False, (0x4141414141414141).to_bytes(8, "little"))
    content = _Stream(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), array)
    (tmp_path / "base_indices.pickle").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"base_indices\.pickle.*numbers only"):
        data.read_poisons(tmp_path)


@pytest.mark.parametrize("dtype", [">f4", "<f8", "u1", ">i2", "?"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_patches_of_any_numbers_are_read(tmp_path, dtype, protocol):
    data.write_poisons(tmp_path, example())
    patch = np.arange(12).reshape(3, 2, 2).astype(dtype)
    content = (Image.fromarray(example().x[0]), 2, patch.transpose(0, 2, 1), [1, np.int64(2)])
    (tmp_path / "target.pickle").write_bytes(pickle.dumps(content, protocol=protocol))
    found = data.read_poisons(tmp_path)
    np.testing.assert_array_equal(found.patch, patch.transpose(0, 2, 1))
    assert found.corner == (1, 2) and found.patch.dtype == patch.dtype


def test_grey_images_are_written(tmp_path):
    poisons = example()
    data.write_poisons(tmp_path, poisons._replace(x=poisons.x[..., :1], target_x=poisons.target_x[..., :1]))
    found = data.read_poisons(tmp_path)
    np.testing.assert_array_equal(found.x, np.repeat(poisons.x[..., :1], 3, axis=-1))
    np.testing.assert_array_equal(found.target_x, found.x[0])


@pytest.mark.parametrize("name", ["poisons", "base_indices", "target"])
@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x05.", pickle.dumps({"a": 1}), pickle.dumps(3)])
def test_a_file_of_something_else_is_named(tmp_path, name, content):
    data.write_poisons(tmp_path, example())
    path = tmp_path / f"{name}.pickle"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"folder: expected {path} as the published benchmark writes it"):
        data.read_poisons(tmp_path)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def test_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write_poisons(tmp_path, example())
    (tmp_path / "base_indices.pickle").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(ValueError, match=r"system: expected images and arrays only"):
        data.read_poisons(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_what_is_missing_or_does_not_fit_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"poisons\.pickle"):
        data.read_poisons(tmp_path)
    with pytest.raises(ValueError, match=r"got \[3, 3, 2\]"):
        data.write_poisons(tmp_path, example()._replace(base_indices=np.arange(2)))
    data.write_poisons(tmp_path, example())
    (tmp_path / "base_indices.pickle").write_bytes(pickle.dumps(np.arange(2)))
    with pytest.raises(ValueError, match="a base for each of 3 poisons, got 2"):
        data.read_poisons(tmp_path)
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"):
        data.to_bytes(np.array([1.2]))


def test_a_budget_of_whole_levels_survives_rounding():
    rng = np.random.default_rng(1)
    base = rng.integers(0, 256, 4000).astype(np.uint8)
    clean = base.astype(np.float32) / np.float32(255)
    radius = np.float32(8 / 255)
    moved = np.clip(clean + rng.choice([-1, 1, 0.37], 4000).astype(np.float32) * radius, clean - radius, clean + radius)
    rounded = data.to_bytes(np.clip(moved, 0, 1))
    assert np.abs(rounded.astype(int) - base).max() == 8


def test_fine_tuning_rows_are_the_first_of_each_class():
    labels = np.tile(np.arange(10), 50)
    setup = data.PoisonSetup(0, 1, 3, np.array([3, 13, 23]))
    rows = data.fine_tuning_rows(labels, setup, num_rows=100)
    assert rows[:3].tolist() == [3, 13, 23] and len(set(rows.tolist())) == 100
    assert np.bincount(labels[rows]).tolist() == [10] * 10
    assert sorted(rows[labels[rows] == 3]) == [3, 13, 23, *range(33, 103, 10)]


@pytest.mark.slow
def test_published_setups_agree_with_the_labels():
    try:
        setups = data.poison_setups("transfer_learning")
        _, y, index = data.load("cifar10", split="train", index=True)
        _, y_test, index_test = data.load("cifar10", split="test", index=True)
    except FileNotFoundError as error:
        assert "set-ups" in str(error) or "tfds build" in str(error)
        pytest.skip("the set-ups or CIFAR-10 are not here")
    labels, labels_test = y[np.argsort(index)], y_test[np.argsort(index_test)]
    assert len(setups) == 100
    for setup in setups:
        assert (labels[setup.base_indices] == setup.base_class).all()
        assert labels_test[setup.target_index] == setup.target_class


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b'{"setups": [{"target_cl',
        b"[]",
        b'{"setups": 3}',
        b'{"setups": [{"target_class": 1, "target_index": 2, "base_class": 3}]}',
        b'{"setups": [{"target_class": 1, "target_index": 2, "base_class": 3, "base_indices": ["a"]}]}',
    ],
)
def test_damaged_setups_are_named(tmp_path, content):
    path = tmp_path / "poisoning_benchmark_cifar10_from_scratch.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"set-ups: expected {path} to hold"):
        data.poison_setups("from_scratch", data_dir=tmp_path)
    whole = {"target_class": 1, "target_index": 2, "base_class": 3, "base_indices": [4, 5]}
    path.write_text(json.dumps({"setups": [whole]}))
    assert data.poison_setups("from_scratch", data_dir=tmp_path)[0].base_indices.tolist() == [4, 5]


def test_missing_setups_say_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="poisoning_benchmark_cifar10_from_scratch"):
        data.poison_setups("from_scratch", data_dir=tmp_path)
