"""Small ONNX models for the tests of this folder: text, external data, functions, subgraphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[n, 8] x) => (float[n, 8] y) <float[8] b = {1, 2, 3, 4, 5, 6, 7, 8}> { h = Add (x, b) y = Relu (h) }
"""

RICH = """
<ir_version: 10, opset_import: ["" : 21, "local" : 1], producer_name: "tests">
main (float[n, 8] x, bool c) => (float[n, 8] y) <float[8] b = {1, 2, 3, 4, 5, 6, 7, 8}> {
    k = Constant <value: tensor = float[1] {2.0}> ()
    h = local.scale <alpha = 3.0> (x)
    y = If (c) <
        then_branch = then () => (float[n, 8] t) { t = Add (h, b) },
        else_branch = other () => (float[n, 8] e) { m = Mul (h, k) e = Softmax <axis = -1> (m) }
    >
}
<domain: "local", opset_import: ["" : 21]>
scale <alpha> (a) => (r) { f = Constant <value_float: float = @alpha> () r = Mul (a, f) }
"""


def plain() -> onnx.ModelProto:
    return onnx.parser.parse_model(PLAIN)


def rich() -> onnx.ModelProto:
    return onnx.parser.parse_model(RICH)


def external(**changes: str | int | None) -> onnx.ModelProto:
    """y = x @ w with the float[8, 8] weight w in 'w.bin'; `changes` to its external data (None removes a key)."""
    entries: dict[str, str | int | None] = {"location": "w.bin", "offset": 64, "length": 256} | changes
    tensor = TensorProto(name="w", data_type=1, dims=[8, 8], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "g",
        [info("x", 1, ["n", 8])],
        [info("y", 1, ["n", 8])],
        [tensor],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external_folder(folder: Path, **changes: str | int | None) -> Path:
    """Writes `external()` and its data to `folder`; returns the path of the model."""
    (folder / "w.bin").write_bytes(bytes(64) + np.arange(64, dtype=np.float32).tobytes())
    (folder / "m.onnx").write_bytes(external(**changes).SerializeToString())
    return folder / "m.onnx"
