from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import planish
from planish.frontends.onnx import load_onnx
from planish.ir.budget import Budget
from planish.ir.verify import verify

HEAD = '<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 2]>\n'


def model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def check(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[str]:
    """Optimizes, compares with plain ONNX Runtime, and returns what the ledger says of its passes."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    expected = ort.InferenceSession(proto.SerializeToString(), settings).run(None, feeds)
    exe = planish.optimize(proto, "ort-cpu:threads=1", budget=Budget(gates=False))
    got = exe(**feeds)
    for a, b in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
        if isinstance(b, np.ndarray):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        else:
            assert a == b
    assert exe.report is not None
    return [entry.verdict for entry in exe.report.ledger.entries]


SHADOWED = """
g (float[n, 2] x, bool c) => (float[n, 2] y) <float[2] w = {1, 2}> {
    v = If (c) <
        then_branch = t () => (float[n, 2] r) <float[2] w = {10, 20}> { r = Add (x, w) },
        else_branch = e () => (float[n, 2] y) { y = Neg (x) }
    >
    y = Mul (v, w)
}
"""


def test_names_of_subgraphs_that_hide_outer_ones_are_made_unique() -> None:
    proto = model(SHADOWED)
    program = load_onnx(proto)
    verify(program, full=True)
    assert "2 values of subgraphs had the name of a value around them" in program.provenance["notes"]
    x = np.arange(4, dtype=np.float32).reshape(2, 2)
    for c in (True, False):
        verdicts = check(proto, {"x": x, "c": np.array(c)})
        assert not any("rolled back" in v for v in verdicts), verdicts


def test_a_size_of_minus_one_is_an_unknown_one() -> None:
    proto = model("g (float[n, 2] x) => (float[n, 2] y) { y = Relu (x) }")
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = -1
    program = load_onnx(proto)
    assert [spec.shape for spec in (*program.inputs(), *program.outputs())] == [(None, 2), (None, 2)]
    check(proto, {"x": np.ones((3, 2), np.float32)})


def test_outputs_of_unknown_rank() -> None:
    proto = model("g (float[n, 2] x) => (float[n, 2] y) { y = Relu (x) }")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    check(proto, {"x": np.ones((3, 2), np.float32)})


def test_an_output_that_is_listed_twice() -> None:
    proto = model("g (float[n, 2] x) => (float[n, 2] y) { y = Relu (x) }")
    proto.graph.output.append(proto.graph.output[0])
    check(proto, {"x": np.ones((3, 2), np.float32)})


@pytest.mark.parametrize("batch", [1, 3])
def test_a_classifier_that_gives_maps(batch: int) -> None:
    proto = model(
        "g (float[n, 2] x) => (float[n, 2] y) { h = Relu (x) y = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1]> (h) }"
    )
    kind = onnx.helper.make_map_type_proto(onnx.TensorProto.INT64, onnx.helper.make_tensor_type_proto(1, []))
    proto.graph.output[0].type.CopyFrom(onnx.helper.make_sequence_type_proto(kind))
    verdicts = check(proto, {"x": np.ones((batch, 2), np.float32)})
    assert not any("rolled back" in v for v in verdicts), verdicts
