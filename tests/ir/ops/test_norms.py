"""planish::LayerNorm and its relatives: body against the float64 reference on ONNX Runtime, inference, cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.ops import DIALECT, InferenceError, TensorInfo, import_functions
from planish.ir.ops.norms import NORMS
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

FLOAT = ir.DataType.FLOAT
NAMES = sorted(NORMS)


def model_of(name: str, width: int | str, epsilon: float | None = 1e-3) -> ir.Model:
    """One node; its inputs are inputs of the graph."""
    added, bias = name.startswith("Add"), "Layer" in name
    inputs = [f"float[A, B, {width}] x", *([f"float[A, B, {width}] residual"] if added else [])]
    inputs += [f"float[{width}] scale", *([f"float[{width}] bias"] if bias else [])]
    names = ", ".join(item.split()[-1] for item in inputs)
    results = ["y", "sum"][: 1 + added]
    attribute = "" if epsilon is None else f"<epsilon = {epsilon}>"
    return parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({", ".join(inputs)}) => ({", ".join(f"float[A, B, {width}] {item}" for item in results)})
        {{ [norm] {", ".join(results)} = planish.{name} {attribute} ({names}) }}
        """
    )


def arrays(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    names = [operand.name for operand in NORMS[name].schema.inputs]
    sizes = {"x": shape, "residual": shape}
    return {item: rng.normal(1, 2, sizes.get(item, shape[-1:])).astype(np.float32) for item in names}


def session(model: ir.Model, path: Path | None = None) -> ort.InferenceSession:
    import_functions(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if path is not None:
        options.optimized_model_filepath = str(path)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("epsilon", [1e-3, None])
@pytest.mark.parametrize("name", NAMES)
def test_body_equals_reference_on_onnxruntime(name: str, epsilon: float | None) -> None:
    rng = np.random.default_rng()
    for width in (1, 5, 64):
        model = model_of(name, width, epsilon)
        verify_model(model, full=True)
        running = session(model)
        for shape in ((2, 3, width), (0, 2, width), (1, 1, width)):
            inputs = arrays(name, shape, rng)
            got = running.run(None, inputs)
            want = DIALECT[name].reference(*inputs.values(), epsilon=1e-5 if epsilon is None else epsilon)
            for g, w in zip(got, want, strict=True):
                np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_inlines_the_body(name: str, tmp_path: Path) -> None:
    path = tmp_path / "optimized.onnx"
    session(model_of(name, 8), path)
    left = {node.op_type for node in ir.load(path).graph}
    assert name not in left
    assert left & {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
                   "SkipSimplifiedLayerNormalization"}  # fmt: skip


def test_inference_gives_both_outputs_a_shape() -> None:
    model = model_of("AddLayerNormalization", 8)
    for value in model.graph.outputs:
        value.shape, value.type = None, None
    infer_shapes(model)
    assert [str(value.shape) for value in model.graph.outputs] == ["[A,B,8]", "[A,B,8]"]


@pytest.mark.parametrize(
    ("x", "residual", "scale", "want"),
    [
        (("B", 8), ("B", 8), (8,), ("B", 8)),
        (("B", "D"), (3, None), (8,), (3, 8)),
        (None, (3, "D"), None, (3, "D")),
        (None, None, (8,), None),
    ],
)
def test_inference_takes_the_more_precise_size(x: object, residual: object, scale: object, want: object) -> None:
    given = [TensorInfo(FLOAT, dims) for dims in (x, residual, scale)]  # type: ignore[arg-type]
    assert DIALECT["AddRMSNormalization"].infer(given, {}) == [TensorInfo(FLOAT, want)] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "residual", "scale", "message"),
    [
        ((2, 8), (1, 8), (8,), "axis 0 of x and residual: sizes 2 and 1 must be equal"),
        ((2, 8), (8,), (8,), "x has rank 2 and the residual 1"),
        ((2, 8), (2, 8), (4,), "the last axis of x, and scale: sizes 8 and 4"),
        ((2, 8), (2, 8), (1, 8), "scale and bias must have rank 1"),
        ((), (), (8,), "x has rank 0"),
    ],
)
def test_inference_refuses(x: tuple[int, ...], residual: tuple[int, ...], scale: tuple[int, ...], message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        DIALECT["AddRMSNormalization"].infer([TensorInfo(FLOAT, dims) for dims in (x, residual, scale)], {})


def test_cost_is_that_of_every_element() -> None:
    x, vector = TensorInfo(FLOAT, (3, 5)), TensorInfo(FLOAT, (5,))
    cost = DIALECT["AddLayerNormalization"].cost([x, x, vector, vector], [x, x], {})
    assert (cost.flops, cost.bytes) == (8 * 15, 4 * (4 * 15 + 2 * 5))
