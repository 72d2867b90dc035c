from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched
from tests.passes.fusion.linear_models import model, normal

NAME = "fold-scale-shift"
HEADER = """
    <ir_version: 10, opset_import: ["" : 20]>
    f (float[B, S, 2] x) => (float[B, S, 2] y)
"""


def ops(program: Any) -> list[str]:
    return [node.op_type for node in program.main.graph]


def test_layer_scale_before_and_after() -> None:
    before = (
        HEADER
        + "<float[2, 2] w = {1, 2, 3, 4}, float[2] b = {1, -1}, float[2] c = {2, 0.5}>"
        + "{ p = MatMul(x, w)  q = Add(p, b)  y = Mul(c, q) }"
    )
    after = HEADER + "<float[2, 2] w = {2, 1, 6, 2}, float[2] b = {2, -0.5}>" + "{ p = MatMul(x, w)  y = Add(p, b) }"
    check_rewrite(NAME, before, after, edits=1)
    divided = before.replace("Mul(c, q)", "Div(q, c)").replace("c = {2, 0.5}", "c = {0.5, 2}")
    check_rewrite(NAME, divided, after, edits=1)


C4 = {"w": normal(6, 4, 3, 3), "b": normal(6)}
T4 = {"w": normal(4, 3, 2, 2)}
G4 = {"w": normal(4, 6), "b": normal(6)}


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(
    ("line", "weights", "constant", "dims"),
    [
        ("p = Conv(x, w, b)", C4, normal(6, 1, 1), (4, 5, 7)),
        ("p = Conv<pads=[1,1,1,1]>(x, w)", {"w": C4["w"]}, normal(1, 6, 1, 1), (4, 5, 7)),
        ("p = Conv(x, w, b)", C4, np.array(0.3, np.float32), (4, 5, 7)),
        ("p = ConvTranspose<group=2>(x, w)", T4, normal(6, 1, 1), (4, 5, 3)),
        ("p = Gemm<beta=0.5, alpha=2.0>(x, w, b)", G4, normal(6), (4,)),
    ],
)
@pytest.mark.parametrize("by", ["Mul(p, k)", "Add(k, p)", "Sub(p, k)", "Div(p, k)"])
def test_numbers(line: str, weights: dict[str, Any], constant: Any, dims: tuple[int, ...], by: str, batch: int) -> None:
    if batch == 0 and "ConvTranspose" in line:
        pytest.skip("ONNX Runtime's ConvTranspose has no empty batch")
    built = model([line, f"y = {by}"], weights | {"k": constant}, ["B", *dims])
    program = check_numerics(NAME, built, {"x": normal(batch, *dims)})
    assert len(ops(program)) == 1


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("batch", [0, 1])
def test_layer_scale_of_a_sequence(batch: int, length: int) -> None:
    lines = ["p = MatMul(x, w)", "q = Add(p, b)", "r = Mul(q, k)", "y = Add(r, x)"]
    weights = {"w": normal(4, 4), "b": normal(4), "k": 1e-6 * normal(4)}
    program = check_numerics(NAME, model(lines, weights, ["B", "S", 4]), {"x": normal(batch, length, 4)})
    assert ops(program) == ["MatMul", "Add", "Add"]


def test_several_in_a_row() -> None:
    lines = ["p = Conv(x, w)", "q = Mul(p, k)", "y = Add(q, k)"]
    program = check_numerics(
        NAME, model(lines, {"w": C4["w"], "k": normal(6, 1, 1)}, ["B", 4, "H", "W"]), {"x": normal(2, 4, 5, 7)}
    )
    assert ops(program) == ["Conv"]


SQUARE = {"w": normal(6, 4, 3, 3)}
DECLINES: dict[str, Any] = {
    "is not one number for each of the 6 channels": model(
        ["p = Conv(x, w)", "y = Mul(p, k)"], SQUARE | {"k": normal(3)}, ["B", 4, 5, 5]
    ),
    "has shape [1, 1, 6, 1, 1]": model(
        ["p = Conv(x, w)", "y = Mul(p, k)"], SQUARE | {"k": normal(1, 1, 6, 1, 1)}, ["B", 4, 5, 5]
    ),
    "is also used by": model(
        ["p = Conv(x, w)", "y = Mul(p, k)", "z = Relu(p)"], SQUARE | {"k": normal(6, 1, 1)}, ["B", 4, 5, 5], ("y", "z")
    ),
    "would be stored twice": model(
        ["p = Conv(x, w)", "y = Mul(p, k)", "z = Conv(x, w)"],
        SQUARE | {"k": normal(6, 1, 1)},
        ["B", 4, 5, 5],
        ("y", "z"),
    ),
    "holds a zero, and divides": model(
        ["p = Conv(x, w)", "y = Div(p, k)"], SQUARE | {"k": np.zeros((6, 1, 1), np.float32)}, ["B", 4, 5, 5]
    ),
    "do not fit float16": model(
        ["p = MatMul(x, w)", "y = Mul(p, k)"],
        {"w": normal(4, 6), "k": 1e-6 * np.ones(6, np.float32)},
        ["B", "S", 4],
        dtype=TensorProto.FLOAT16,
    ),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines(NAME, DECLINES[reason], reason)


def test_residuals_and_gates_are_no_near_miss() -> None:
    lines = ["p = Conv(x, w)", "q = Mul(p, g)", "y = Add(q, g)"]
    source = model(lines, SQUARE, ["B", 4, 5, 5], inputs={"g": ["B", 6, 3, 3]})
    check_untouched(NAME, source)
