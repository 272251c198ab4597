"""The comparison with secml: no attacker sees a test row, and what secml found once is not computed again."""

import sys

import numpy as np
import pytest

from benchmarks.speed import secml

FAKE = """
import json
import sys
import numpy as np
given = dict(np.load(sys.argv[2]))
assert sorted(given) == ["C", "x_start", "x_train", "x_val", "y_start", "y_train", "y_val"], sorted(given)
np.savez(sys.argv[3], seconds=[0.0, 1.0], poisons=[given["x_start"], given["x_start"] / 2],
         finished=json.loads(sys.argv[4])["finished"])
"""


@pytest.fixture(scope="module")
def arrays():
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setenv("TFDS_DATA_DIR", "nowhere")  # the embedded digits
        return secml.problem(0)


def rows(x):
    return {row.tobytes() for row in x}


def test_the_test_rows_are_all_that_no_attacker_sees(arrays):
    assert [len(arrays[f"x_{name}"]) for name in ("train", "val", "test")] == [400, 300, 300]
    assert not rows(arrays["x_test"]) & (rows(arrays["x_train"]) | rows(arrays["x_val"]))
    assert rows(arrays["x_start"]) <= rows(arrays["x_train"])
    assert all(arrays[f"x_{name}"].min() >= 0 and arrays[f"x_{name}"].max() == 1 for name in ("train", "val", "test"))


def test_the_peer_is_given_no_test_row_and_its_answer_is_kept(arrays, tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "fake.py"} "$@"\n')
    python.chmod(0o755)
    call = lambda setting, given: secml.peer(tmp_path, given, setting, 1, 60, tmp_path)
    assert not call({"finished": False}, arrays)["finished"]
    assert not list(tmp_path.glob("*.npz"))  # a run that was cut off is made again
    first = call({"finished": True}, arrays)
    assert first["finished"] and np.array_equal(first["poisons"][1], arrays["x_start"] / 2)
    python.unlink()
    again = call({"finished": True}, {**arrays, "x_test": arrays["x_test"][:10], "y_test": arrays["y_test"][:10]})
    assert all(np.array_equal(first[name], again[name]) for name in first)
    with pytest.raises(FileNotFoundError):  # another setting, or other rows, are another run
        call({"finished": True, "other": 1}, arrays)
    with pytest.raises(FileNotFoundError):
        call({"finished": True}, {**arrays, "x_val": arrays["x_val"] / 2})


def test_mistakes_are_those_of_the_victim_trained_with_the_poisons(arrays):
    wrong = secml.mistakes(arrays, [arrays["x_start"], 1 - arrays["x_start"]], "newton-cholesky")
    assert wrong.shape == (2, 300) and wrong.dtype == bool
    assert 0 < wrong[0].mean() < 0.15 and (wrong[0] != wrong[1]).any()
