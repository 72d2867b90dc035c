"""planish::Linear and its relatives: body against the float64 reference on ONNX Runtime, inference, cost, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.errors import PlanishError
from planish.ir.infer import infer_shapes
from planish.ir.ops import DIALECT, InferenceError, TensorInfo
from planish.ir.ops.linear import COMPUTE_TYPES, LINEAR
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model
from planish.runtime.ort import with_bodies

FLOAT = ir.DataType.FLOAT
NAMES = sorted(LINEAR)
SIZES = {"weight": ("K", "N"), "gate_weight": ("K", "N"), "up_weight": ("K", "N"), "bias": ("N",)}


def dims_of(operand: str, rows: tuple[Any, ...]) -> tuple[Any, ...]:
    return SIZES.get(operand, (*rows, "K" if operand == "x" else "N"))


def model_of(name: str, rank: int, compute_type: int | None) -> ir.Model:
    """One node; its inputs are inputs of the graph, of any size."""
    rows = tuple("ABCD"[: rank - 1])
    names = [operand.name for operand in LINEAR[name].schema.inputs]
    inputs = ", ".join(f"float[{', '.join(dims_of(item, rows))}] {item}" for item in names)
    attribute = "" if compute_type is None else f"<compute_type = {compute_type}>"
    return parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({inputs}) => (float[{", ".join((*rows, "N"))}] y)
        {{ [node] y = planish.{name} {attribute} ({", ".join(names)}) }}
        """
    )


def arrays(name: str, rows: tuple[int, ...], k: int, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    sizes = {"K": k, "N": n}
    names = [operand.name for operand in LINEAR[name].schema.inputs]
    shapes = {item: tuple(sizes.get(d, d) for d in dims_of(item, rows)) for item in names}
    return {item: rng.standard_normal(shape).astype(np.float32) for item, shape in shapes.items()}


def session(model: ir.Model, level: str = "ORT_ENABLE_ALL", path: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    if path is not None:
        options.optimized_model_filepath = str(path)
    proto = ir.to_proto(with_bodies(model))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("compute_type", [None, *COMPUTE_TYPES])
@pytest.mark.parametrize("name", NAMES)
def test_body_equals_reference_on_onnxruntime(name: str, compute_type: int | None) -> None:
    rng = np.random.default_rng()
    for rows in ((), (5,), (2, 0), (2, 3), (1, 2, 3)):
        model = model_of(name, len(rows) + 1, compute_type)
        verify_model(with_bodies(model), full=True)
        for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
            running = session(model, level)
            for k, n in ((1, 1), (17, 33), (64, 5)):
                inputs = arrays(name, rows, k, n, rng)
                (got,) = running.run(None, inputs)
                (want,) = DIALECT[name].reference(*inputs.values(), compute_type=compute_type or COMPUTE_TYPES[0])
                assert got.dtype == np.float32 and got.shape == want.shape
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6 * k)


def test_the_reference_is_the_definition() -> None:
    rng = np.random.default_rng()
    x, weight, bias, residual = (rng.standard_normal(s) for s in ((3, 4), (4, 5), (5,), (3, 5)))
    h = x @ weight + bias
    erf = np.vectorize(math.erf)
    want = {
        "Linear": h,
        "LinearRelu": np.where(h > 0, h, 0),
        "LinearGelu": h / 2 * (1 + erf(h / math.sqrt(2))),
        "LinearGeluTanh": h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
        "LinearSilu": h / (1 + np.exp(-h)),
        "LinearQuickGelu": h / (1 + np.exp(-1.702 * h)),
    }
    for name, value in want.items():
        np.testing.assert_allclose(DIALECT[name].reference(x, weight, bias)[0], value, rtol=1e-12)
    np.testing.assert_allclose(DIALECT["LinearAdd"].reference(x, weight, bias, residual)[0], h + residual, rtol=1e-12)
    (gated,) = DIALECT["LinearSwiGLU"].reference(x, weight, 2 * weight)
    np.testing.assert_allclose(gated, x @ weight / (1 + np.exp(-x @ weight)) * (2 * x @ weight), rtol=1e-12)
    assert set(want) | {"LinearAdd", "LinearSwiGLU"} == set(LINEAR)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "LinearRelu"])
def test_the_reference_does_not_overflow(name: str) -> None:
    rest = [np.zeros(2), np.zeros((2, 2))][: len(LINEAR[name].schema.inputs) - 2]
    weights = [np.eye(2)] * (3 - len(rest)) if name == "LinearSwiGLU" else [np.eye(2)]
    with np.errstate(all="raise", under="ignore"):
        (y,) = DIALECT[name].reference(np.array([[-1e4, 1e4]] * 2), *weights[:2], *([] if len(weights) > 1 else rest))
    assert np.isfinite(y).all()


def test_bfloat16_is_another_number() -> None:
    rng = np.random.default_rng(0)
    inputs = arrays("Linear", (4,), 64, 8, rng)
    one, two = (DIALECT["Linear"].reference(*inputs.values(), compute_type=kind)[0] for kind in COMPUTE_TYPES)
    error = np.linalg.norm(one - two) / np.linalg.norm(one)
    assert 1e-4 < error < 1e-2


def test_onnxruntime_inlines_and_fuses_the_body(tmp_path: Path) -> None:
    path = tmp_path / "optimized.onnx"
    session(model_of("LinearGelu", 2, None), path=path)
    left = [node.op_type for node in ir.load(path).graph]
    assert not any(op.startswith("Linear") for op in left)
    assert len(left) <= 4 and "Cast" not in left, left  # casts from float32 to float32 are no work


@pytest.mark.parametrize("name", NAMES)
def test_inference_on_a_graph(name: str) -> None:
    model = model_of(name, 3, None)
    (y,) = model.graph.outputs
    y.shape, y.type = None, None
    infer_shapes(model)
    assert (str(y.shape), y.dtype) == ("[A,B,N]", FLOAT)


GIVEN: list[tuple[str, list[Any], Any]] = [
    ("Linear", [("B", 8), (8, 4), (4,)], ("B", 4)),
    ("Linear", [("B", "S", None), (None, "N"), (4,)], ("B", "S", 4)),
    ("Linear", [(3,), ("K", 4), (4,)], (4,)),
    ("Linear", [("B", 8), None, None], ("B", None)),
    ("Linear", [("B", 8), None, (4,)], ("B", 4)),
    ("Linear", [None, (8, 4), (4,)], None),
    ("LinearAdd", [("B", 8), (8, 4), (4,), (7, 4)], (7, 4)),
    ("LinearAdd", [None, (8, 4), (4,), ("B", 4)], ("B", 4)),
    ("LinearSwiGLU", [("B", 8), ("K", "N"), (8, 4)], ("B", 4)),
    ("LinearSwiGLU", [(0, 0), (0, 4), (0, 4)], (0, 4)),
]


@pytest.mark.parametrize(("name", "given", "want"), GIVEN)
def test_inference_takes_the_more_precise_size(name: str, given: list[Any], want: Any) -> None:
    infos = [TensorInfo(FLOAT, dims) for dims in given]
    assert DIALECT[name].infer(infos, {"compute_type": 1}) == [TensorInfo(FLOAT, want)]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("Linear", [(2, 8), (7, 4), (4,)], "the columns of x and the weight's rows: sizes 8 and 7 must be equal"),
        ("Linear", [(2, 8), (8, 4), (5,)], "the weight's columns and the bias: sizes 4 and 5 must be equal"),
        ("Linear", [(2, 8), (8, 4), (1, 4)], "the bias has rank 2; it must have 1"),
        ("Linear", [(2, 8), (2, 8, 4), (4,)], "a weight has rank 3; it must have 2"),
        ("Linear", [(), (8, 4), (4,)], "x has rank 0"),
        ("LinearAdd", [(2, 8), (8, 4), (4,), (4,)], "the result has rank 2 and the residual 1"),
        ("LinearAdd", [(2, 8), (8, 4), (4,), (1, 4)], "the result and the residual: sizes 2 and 1 must be equal"),
        ("LinearSwiGLU", [(2, 8), (8, 4), (8, 5)], "weights: sizes 4 and 5 must be equal"),
        ("LinearSwiGLU", [(2, 8), (8, 4), (9, 4)], "weights: sizes 8 and 9 must be equal"),
    ],
)
def test_inference_refuses(name: str, given: list[Any], message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        DIALECT[name].infer([TensorInfo(FLOAT, dims) for dims in given], {"compute_type": 1})


def test_other_dtypes_are_refused() -> None:
    infos = [TensorInfo(FLOAT, (2, 8)), TensorInfo(FLOAT, (8, 4)), TensorInfo(FLOAT, (4,))]
    with pytest.raises(InferenceError, match="compute_type is 10; it must be one of"):
        DIALECT["Linear"].infer(infos, {"compute_type": 10})
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (double[2, 8] x, double[8, 4] w, double[4] b) => (double[2, 4] y) { [node] y = planish.Linear (x, w, b) }
        """
    )
    with pytest.raises(PlanishError, match="input 'x' is double, which it can not be"):
        verify_model(with_bodies(model), full=True)


@pytest.mark.parametrize("name", NAMES)
def test_cost(name: str) -> None:
    k, n, rows = 7, 5, (2, 3)
    inputs = arrays(name, rows, k, n, np.random.default_rng())
    infos = [TensorInfo(FLOAT, array.shape) for array in inputs.values()]
    outputs = DIALECT[name].infer(infos, {"compute_type": 1})
    cost = DIALECT[name].cost(infos, outputs, {"compute_type": 1})
    products = 2 if name == "LinearSwiGLU" else 1
    assert cost.flops == products * 2 * 6 * k * n
    assert cost.bytes == 4 * (sum(array.size for array in inputs.values()) + 6 * n)
