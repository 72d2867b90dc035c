from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from planish.ir.errors import InputError
from planish.ir.spec import ElementType, TensorSpec
from planish.ir.target import Target
from planish.runtime.empty import EmptyOutputs
from planish.runtime.ort import compile_ort

FLOAT = ElementType.FLOAT


def _outputs(inputs: tuple[int | str | None, ...], *outputs: tuple[int | str | None, ...]) -> EmptyOutputs:
    return EmptyOutputs(
        [TensorSpec("x", FLOAT, inputs)], [TensorSpec(f"y{i}", FLOAT, shape) for i, shape in enumerate(outputs)]
    )


def test_empty_inputs_give_empty_outputs_of_the_declared_shapes() -> None:
    got = _outputs(("n", 4), ("n", 2), (3, "n")).of({"x": np.ones((0, 4), np.float32)})
    assert got is not None
    assert {name: (a.shape, a.dtype) for name, a in got.items()} == {
        "y0": ((0, 2), np.float32),
        "y1": ((3, 0), np.float32),
    }


@pytest.mark.parametrize(
    ("inputs", "outputs", "shape"),
    [
        (("n", 4), [("n", 2)], (1, 4)),  # nothing is empty
        (("n", "m"), [("m", 2)], (0, 4)),  # another dimension is empty
        (("n", 4), [("n", 2), (3,)], (0, 4)),  # one output has elements
        (("n", 4), [("n", "k")], (0, 4)),  # an unknown size
        (("n", 4), [(None, 2)], (0, 4)),
        (("n", 4), [()], (0, 4)),
    ],
)
def test_everything_else_is_computed(
    inputs: tuple[int | str], outputs: list[tuple[int | str | None, ...]], shape: tuple[int, ...]
) -> None:
    assert _outputs(inputs, *outputs).of({"x": np.ones(shape, np.float32)}) is None


def test_a_recurrent_model_takes_an_empty_batch() -> None:
    """ONNX Runtime 1.31 ends the process here."""
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=2)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, "batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 1, "batch", 2])],
        [
            onnx.numpy_helper.from_array(np.ones((1, 8, 2), np.float32), "w"),
            onnx.numpy_helper.from_array(np.ones((1, 8, 2), np.float32), "r"),
        ],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    runner = compile_ort(model, Target.parse("ort-cpu:threads=1"))
    feeds = {"x": np.ones((3, 0, 2), np.float32)}
    assert runner.run(feeds)["y"].shape == (3, 1, 0, 2)
    assert runner.prepared(feeds)()["y"].shape == (3, 1, 0, 2)
    assert runner.run({"x": np.ones((3, 2, 2), np.float32)})["y"].shape == (3, 1, 2, 2)


def test_a_model_that_runtime_fusions_break_runs_without_them() -> None:
    """ONNX Runtime 1.31 fuses both Gelus, drops the product that they share, and then refuses its own graph."""
    names = {"half": 0.5, "one": 1.0, "root": 2**0.5, "three": 3.0, "cubic": 0.044715, "factor": 0.7978845608}
    nodes = [
        ("Mul", ["x", "half"], "h"),
        ("Pow", ["x", "three"], "p"),
        ("Mul", ["p", "cubic"], "q"),
        ("Add", ["x", "q"], "s"),
        ("Mul", ["s", "factor"], "f"),
        ("Tanh", ["f"], "t"),
        ("Add", ["t", "one"], "t1"),
        ("Mul", ["h", "t1"], "g1"),
        ("Div", ["x", "root"], "d"),
        ("Erf", ["d"], "e"),
        ("Add", ["e", "one"], "e1"),
        ("Mul", ["h", "e1"], "g2"),
        ("Add", ["g1", "g2"], "y"),
    ]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [out], name=out) for op, inputs, out in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(np.array(value, np.float32), name) for name, value in names.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))
    x = np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)
    runners = [compile_ort(model, Target.parse("ort-cpu:threads=1"), optimize=on) for on in (True, False)]
    got, expected = (runner.run({"x": x})["y"] for runner in runners)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_number_is_refused_after_an_array_of_its_shape_too() -> None:
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    runner = compile_ort(model, Target.parse("ort-cpu:threads=1"))
    assert runner.run({"x": np.array(2, np.float32)})["y"] == -2
    with pytest.raises(InputError, match="give a numpy array"):
        runner.run({"x": np.float32(2)})


def test_a_dtype_without_kernels_says_what_to_convert_to() -> None:
    graph = helper.make_graph(
        [helper.make_node("Gelu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [2])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [2])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))
    with pytest.raises(
        InputError, match=r"no CPU kernel for Erf \(opset 13\); the model is double: convert it to float32"
    ):
        compile_ort(model, Target.parse("ort-cpu:threads=1"))
