"""planish::SwiGLU: body against the float64 reference on ONNX Runtime, inference, cost, and what is refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.errors import InputError, PlanishError
from planish.ir.ops import DIALECT, InferenceError, TensorInfo, dialect_op, import_functions, register_op
from planish.ir.ops.base import DialectOp, broadcast_dims
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

FLOAT = ir.DataType.FLOAT
TOLERANCE = {"float": 2e-6, "double": 1e-14, "float16": 2e-3, "bfloat16": 2e-2}
NUMPY = {"float": np.float32, "double": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def model_of(dtype: str = "float", dims: str = "A, B") -> ir.Model:
    return parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({dtype}[{dims}] gate, {dtype}[{dims}] up) => ({dtype}[{dims}] y) {{ [glu] y = planish.SwiGLU (gate, up) }}
        """
    )


def session(model: ir.Model, level: ort.GraphOptimizationLevel, path: Path | None = None) -> ort.InferenceSession:
    import_functions(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from(["float", "double"]),
    seed=st.integers(0, 99),
)
def test_body_equals_reference_on_onnxruntime(shape: list[int], scale: float, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate, up = ((scale * rng.standard_normal(shape)).astype(NUMPY[dtype]) for _ in range(2))
    model = model_of(dtype, ", ".join("ABCD"[: len(shape)]))
    (got,) = session(model, ort.GraphOptimizationLevel.ORT_DISABLE_ALL).run(None, {"gate": gate, "up": up})
    (want,) = DIALECT["SwiGLU"].reference(gate, up)
    assert got.dtype == NUMPY[dtype]
    np.testing.assert_allclose(got, want, rtol=10 * TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1.0, scale**2))


def test_half_precision_body() -> None:
    gate, up = (np.linspace(-6, 6, 35).reshape(5, 7).astype(np.float16) for _ in range(2))
    (got,) = session(model_of("float16"), ort.GraphOptimizationLevel.ORT_ENABLE_ALL).run(None, {"gate": gate, "up": up})
    (want,) = DIALECT["SwiGLU"].reference(gate, up)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_bfloat16_body_is_valid() -> None:
    model = model_of("bfloat16")
    import_functions(model)
    verify_model(model, full=True)


def test_reference_is_stable_at_large_gates() -> None:
    gate = np.array([-1e4, -800.0, 0.0, 800.0, 1e4])
    (got,) = DIALECT["SwiGLU"].reference(gate, np.ones(5))
    np.testing.assert_array_equal(got, [-0.0, -0.0, 0.0, 800.0, 1e4])


def test_onnxruntime_inlines_and_fuses_the_body(tmp_path: Path) -> None:
    path = tmp_path / "optimized.onnx"
    session(model_of(), ort.GraphOptimizationLevel.ORT_ENABLE_ALL, path)
    ops = [node.op_type for node in ir.load(path).graph]
    assert "SwiGLU" not in ops
    # x * sigmoid(x) becomes one kernel.
    assert sorted(ops) == ["Mul", "QuickGelu"]


@pytest.mark.parametrize(
    ("gate", "up", "want"),
    [
        (("B", 4), ("B", 4), ("B", 4)),
        (("B", "S"), (2, "S"), (2, "S")),
        ((None, 4), ("B", None), ("B", 4)),
        (None, (2, 3), (2, 3)),
        (None, None, None),
    ],
)
def test_inference_takes_the_more_precise_size(gate: object, up: object, want: object) -> None:
    (info,) = DIALECT["SwiGLU"].infer([TensorInfo(FLOAT, gate), TensorInfo(None, up)], {})  # type: ignore[arg-type]
    assert info == TensorInfo(FLOAT, want)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [((2, 4), (1, 4), "does not broadcast"), ((2, 4), (4,), "gate has rank 2 and up has rank 1")],
)
def test_inference_refuses_to_broadcast(gate: tuple[int, ...], up: tuple[int, ...], message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        DIALECT["SwiGLU"].infer([TensorInfo(FLOAT, gate), TensorInfo(FLOAT, up)], {})


def test_cost_counts_every_element_once() -> None:
    info = TensorInfo(FLOAT, (3, 5))
    cost = DIALECT["SwiGLU"].cost([info, info], [info], {})
    assert (cost.flops, cost.bytes) == (75, 180)


def test_registry() -> None:
    with pytest.raises(InputError, match="Did you mean 'SwiGLU'"):
        dialect_op("SwiGlu")
    op = DIALECT["SwiGLU"]
    assert register_op(op) is op
    other = DialectOp(op.schema, op.infer, op.body, op.reference, op.flops, min_opset=20)
    with pytest.raises(PlanishError, match="already has an operator planish::SwiGLU"):
        register_op(other)


def test_functions_are_imported_once_and_only_when_used() -> None:
    model = model_of()
    assert import_functions(model) == ["SwiGLU"]
    body = model.functions["planish", "SwiGLU", ""]
    assert import_functions(model) == ["SwiGLU"]
    assert model.functions["planish", "SwiGLU", ""] is body
    assert model.graph.opset_imports["planish"] == 1
    plain = parse_model('<ir_version: 10, opset_import: ["" : 23]>\ng (float[2] x) => (float[2] y) { y = Relu (x) }')
    assert import_functions(plain) == []
    assert not plain.functions and "planish" not in plain.graph.opset_imports


def test_broadcasting_of_symbols() -> None:
    assert broadcast_dims(("B", 1, 4), (3, 4), "x") == ("B", 3, 4)
    assert broadcast_dims(("B",), (5,), "x") == (5,)
    assert broadcast_dims(("B",), ("S",), "x") == (None,)
    with pytest.raises(InferenceError, match="x: sizes 2 and 3"):
        broadcast_dims((2,), (3,), "x")
