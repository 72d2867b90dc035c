"""The commands with an artifact of compiled code, which holds no graph (target tvm-cpu)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.command_line import as_json, save

pytest.importorskip("tvm")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compiled(model: Path, call: Call) -> Path:
    code, _, err = call("optimize", model, "-t", "tvm-cpu:threads=1", "-o", "compiled", "--no-gates")
    assert code == 0, err
    return model.parent / "compiled"


def test_every_command_takes_it_or_says_what_to_give(model: Path, compiled: Path, call: Call) -> None:
    code, _, err = call("run", compiled)
    assert code == 2 and "allow-native" in err
    code, out, err = call("run", compiled, "--allow-native", "--json")
    assert code == 0 and as_json(out)["outputs"]["y"]["dtype"] == "float32", err
    np.savez("x.npz", x=np.ones((5, 8), np.float32))
    code, out, err = call("run", compiled, "--allow-native", "--inputs", "x.npz", "--json")
    assert code == 0 and as_json(out)["outputs"]["y"]["shape"] == [5, 8], err
    code, out, err = call("bench", model, compiled, "--allow-native", "--seconds", "0.1", "--json")
    assert code == 0 and as_json(out)["rows"][1]["error"]["relative_l2"] < 1e-6, err
    code, out, err = call("verify", compiled, "--allow-native", "--json")
    assert code == 0 and as_json(out)["ok"], err
    code, out, err = call("inspect", compiled, "--json")
    assert code == 0 and as_json(out)["compiled"] and as_json(out)["needs"][0]["met"], err
    code, out, _ = call("inspect", compiled)
    assert code == 0 and "It runs on this machine." in out and "x: float[batch, 8]" in out
    code, _, err = call("diff", model, compiled)
    assert code == 2 and "no graph" in err and "model's file" in err
    code, _, err = call("run", compiled, "--allow-native", "--dim", "batch=3")
    assert code == 2 and "no graph to make inputs for" in err


def test_an_operator_without_code_is_named(model: Path, call: Call) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) <int64 a = {0}> { y = CumSum(x, a) }'
    )
    code, _, err = call("optimize", save(model.parent / "sum.onnx", text), "-t", "tvm-cpu")
    assert code == 2 and "does not take CumSum" in err
