from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import InputError, VerifyError
from planish.ir.program import Calibration, Program

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4] x, seq(float[2]) s, float[4] w) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> { y = Add(x, w) }"""


def test_inputs_leave_out_initializers_and_show_symbols() -> None:
    program = Program.single(ir.from_onnx_text(TEXT))
    assert [str(spec) for spec in program.inputs()] == ["x: float[N, 4]", "s: non-tensor[2]"]
    assert [spec.name for spec in program.outputs()] == ["y"]
    assert program.weight_bytes() == 16
    assert program.node_count() == 1


def test_sizes_are_read_off_the_calibration() -> None:
    program = Program.single(ir.from_onnx_text(TEXT))
    assert program.sizes() == {}
    program.calibration = Calibration([{"x": np.zeros((5, 4), np.float32), "s": []}])  # type: ignore[dict-item]
    assert program.sizes() == {"N": 5}


def test_a_clone_shares_weights_and_not_graphs() -> None:
    program = Program.single(ir.from_onnx_text(TEXT))
    copy = program.clone()
    assert copy.weights["w"] is program.weights["w"]
    copy.main.graph.remove(copy.main.graph[0])
    assert program.node_count() == 1


def test_entries_share_one_weight_store() -> None:
    prefill = ir.from_onnx_text(TEXT)
    decode = prefill.clone()
    program = Program({"prefill": prefill, "decode": decode})
    assert program.weight_bytes() == 16
    assert list(program.weights) == ["w"]
    decode.graph.initializers["w"].const_value = ir.tensor(np.ones(4, np.float32))
    with pytest.raises(VerifyError, match="entry 'decode': initializer 'w'"):
        _ = program.weights


def test_entries_are_named_in_errors() -> None:
    program = Program({"prefill": ir.from_onnx_text(TEXT), "decode": ir.from_onnx_text(TEXT)})
    with pytest.raises(InputError, match="unknown entry 'prefil'. Did you mean 'prefill'"):
        program.inputs("prefil")
    with pytest.raises(InputError, match="prefill, decode; name one"):
        _ = program.main
