"""Normalization inside ONNX Runtime: operator, function body and float64 reference against each other."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.ops import DIALECT, import_functions
from planish.ir.ops.norms import NORMS
from planish.ir.printer import parse_model
from planish.runtime.kernels.library import Library, library_for

pytest.importorskip("tvm")
NAMES = sorted(NORMS)


def model_of(name: str, epsilon: float | None) -> ir.Model:
    """One node over inputs of any size."""
    operands = NORMS[name].schema
    inputs = [f"float[{'D' if o.name in ('scale', 'bias') else 'A, B, D'}] {o.name}" for o in operands.inputs]
    outputs = [f"float[A, B, D] {o.name}" for o in operands.outputs]
    names = [", ".join(o.name for o in group) for group in (operands.outputs, operands.inputs)]
    attribute = "" if epsilon is None else f"<epsilon = {epsilon}>"
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({", ".join(inputs)}) => ({", ".join(outputs)}) {{ {names[0]} = planish.{name} {attribute} ({names[1]}) }}
        """
    )
    import_functions(model)
    return model


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        found = library_for([model_of(name, None) for name in NAMES])
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert found is not None and [kernel.op for kernel in found.kernels] == NAMES
    return found


def run(model: ir.Model, inputs: dict[str, np.ndarray], library: Library | None, threads: int = 1) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)  # type: ignore[no-any-return]


def arrays(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    names = [operand.name for operand in NORMS[name].schema.inputs]
    return {n: rng.normal(1, 2, shape[-1:] if n in ("scale", "bias") else shape).astype("f") for n in names}


@pytest.mark.parametrize("epsilon", [0.25, None])
@pytest.mark.parametrize("name", NAMES)
def test_operator_body_and_reference_agree(name: str, epsilon: float | None, library: Library) -> None:
    model = model_of(name, epsilon)
    for shape in ((2, 3, 65), (0, 3, 8), (1, 1, 1), (1, 5, 768), (3, 7, 31)):
        inputs = arrays(name, shape)
        want = DIALECT[name].reference(*inputs.values(), epsilon=1e-5 if epsilon is None else epsilon)
        # One number: x minus its mean is 0, and all that is left of it is what float32 makes of the root of epsilon.
        for kernel, body, exact in zip(run(model, inputs, library), run(model, inputs, None), want, strict=True):
            np.testing.assert_allclose(kernel, exact, rtol=2e-6, atol=5e-6)
            np.testing.assert_allclose(kernel, body, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_constant_scale_and_bias(name: str, library: Library) -> None:
    model, inputs = model_of(name, None), arrays(name, (3, 2, 20))
    want = run(model, inputs, library)
    for value in [item for item in model.graph.inputs if item.name in ("scale", "bias")]:
        value.const_value = ir.tensor(inputs.pop(str(value.name)), name=value.name)
        value.shape = ir.Shape([20])
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    for constant, given in zip(run(model, inputs, library), want, strict=True):
        np.testing.assert_array_equal(constant, given)


def test_rows_on_several_threads(library: Library) -> None:
    model, inputs = model_of("AddLayerNormalization", None), arrays("AddLayerNormalization", (5, 41, 96))
    for one, two in zip(run(model, inputs, library), run(model, inputs, library, 2), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual": (2, 1, 8)}, "the residual must have the shape of x"),
        ({"scale": (1,)}, "scale must have shape \\(8\\)"),
        ({"bias": (9,)}, "bias must have shape \\(8\\)"),
    ],
)
def test_wrong_shapes_are_errors(changed: dict[str, tuple[int, ...]], message: str, library: Library) -> None:
    name = "AddLayerNormalization"
    model = model_of(name, None)
    for value in model.graph.inputs:
        value.shape = ir.Shape([None] * len(value.shape or ()))
    inputs = arrays(name, (2, 3, 8)) | {key: np.ones(shape, "f") for key, shape in changed.items()}
    with pytest.raises(Exception, match=message):
        run(model, inputs, library)
