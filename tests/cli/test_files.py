"""Reading inputs and writing outputs: nothing is executed, nothing is half-written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planish.cli import files
from planish.ir.errors import InputError
from tests.cli.command_line import names


def test_inputs_with_objects_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="never loaded"):
        files.load_inputs(path)


@pytest.mark.parametrize("cut", [3, 30, 120])
def test_damaged_inputs_are_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.ones(100))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"x\.npz"):
        files.load_inputs(path)


def test_outputs_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "y.npz"
    with pytest.raises(InputError, match="not an array"):
        files.save_outputs(path, {"a": np.ones(3), "b": [np.ones(2)]})
    assert names(tmp_path) == set()
    files.save_outputs(path, {"file": np.ones(3), "a/b": np.array(["x", "yy"], dtype=object)})
    found = files.load_inputs(path)
    assert found["a/b"].tolist() == ["x", "yy"] and found["file"].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(InputError, match="can not write"):
        files.save_outputs(tmp_path / "no" / "y.npz", {"a": np.ones(1)})
