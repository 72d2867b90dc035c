from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched
from tests.passes.fusion.linear_models import model, normal, statistics

BN = "y = BatchNormalization(c, g, s, m, v)"
NAME = "fold-batch-norm"
SIMPLE = """
    <ir_version: 10, opset_import: ["" : 20]>
    f (float[B, 1, H, W] x) => (float[B, 2, H, W] y)
    <float[2, 1, 1, 1] w = {2, 3}, float[2] g = {4, 1}, float[2] s = {1, -1}, float[2] m = {0.5, 2},
     float[2] v = {4, 1}, float[2] b = {1, 2}>
"""


def ops(program: Any) -> list[str]:
    return [node.op_type for node in program.main.graph]


def test_before_and_after() -> None:
    before = SIMPLE + "{ c = Conv(x, w)  y = BatchNormalization<epsilon = 0.0>(c, g, s, m, v) }"
    after = SIMPLE.replace("w = {2, 3}", "w = {4, 3}").replace("b = {1, 2}", "b = {0, -3}") + "{ y = Conv(x, w, b) }"
    check_rewrite(NAME, before, after, edits=1)
    with_bias = before.replace("Conv(x, w)", "Conv(x, w, b)")
    after = SIMPLE.replace("w = {2, 3}", "w = {4, 3}").replace("b = {1, 2}", "b = {2, -1}") + "{ y = Conv(x, w, b) }"
    check_rewrite(NAME, with_bias, after, edits=1)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(
    ("line", "weights", "dims"),
    [
        ("c = Conv<pads=[1,1,1,1]>(x, w, b)", {"w": normal(6, 4, 3, 3), "b": normal(6)}, (4, 5, 7)),
        ("c = Conv<strides=[2,2]>(x, w)", {"w": normal(6, 4, 3, 3)}, (4, 7, 9)),
        ("c = Conv<group=2>(x, w, b)", {"w": normal(6, 2, 3, 3), "b": normal(6)}, (4, 5, 7)),
        ("c = Conv<group=6>(x, w)", {"w": normal(6, 1, 3, 3)}, (6, 5, 7)),
        ("c = Conv(x, w)", {"w": normal(6, 4, 3)}, (4, 9)),
        ("c = ConvTranspose<strides=[2,2]>(x, w, b)", {"w": normal(4, 6, 3, 3), "b": normal(6)}, (4, 5, 3)),
        ("c = ConvTranspose<group=2>(x, w)", {"w": normal(4, 3, 2, 2)}, (4, 5, 3)),
        ("c = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", {"w": normal(6, 4), "b": normal(6)}, (4,)),
        ("c = Gemm(x, w)", {"w": normal(4, 6)}, (4,)),
        ("c = MatMul(x, w)", {"w": normal(4, 6)}, (4,)),
    ],
)
def test_into_the_product_before(line: str, weights: dict[str, Any], dims: tuple[int, ...], batch: int) -> None:
    if batch == 0 and "ConvTranspose" in line:
        pytest.skip("ONNX Runtime's ConvTranspose has no empty batch")
    built = model([line, BN], weights | statistics(6), ["B", *dims])
    program = check_numerics(NAME, built, {"x": normal(batch, *dims)})
    assert "BatchNormalization" not in ops(program) and len(ops(program)) <= 2


def test_float64() -> None:
    built = model(["c = Gemm(x, w)", BN], {"w": normal(4, 6)} | statistics(6), ["B", 4], dtype=TensorProto.DOUBLE)
    check_numerics(NAME, built, {"x": normal(3, 4).astype(np.float64)})


@pytest.mark.parametrize("group", [1, 2])
def test_into_the_convolution_behind(group: int) -> None:
    lines = ["n = BatchNormalization(x, g, s, m, v)", f"y = Conv<group={group}>(n, w, b)"]
    weights = {"w": normal(6, 4 // group, 3, 3), "b": normal(6)} | statistics(4)
    program = check_numerics(NAME, model(lines, weights, ["B", 4, "H", "W"]), {"x": normal(2, 4, 5, 7)})
    assert ops(program) == ["Conv"]
    lines[1] = lines[1].replace(", b)", ")")
    program = check_numerics(NAME, model(lines, weights, ["B", 4, "H", "W"]), {"x": normal(2, 4, 5, 7)})
    assert ops(program) == ["Conv"]


def test_padding_stops_a_shift_and_nothing_else() -> None:
    lines = ["n = BatchNormalization(x, g, s, m, v)", "y = Conv<pads=[1,1,1,1]>(n, w, b)"]
    weights = {"w": normal(6, 4, 3, 3), "b": normal(6)} | statistics(4)
    check_declines(NAME, model(lines, weights, ["B", 4, "H", "W"]), "pads with zeros, which the shift would not reach")
    same = [lines[0], 'y = Conv<auto_pad="SAME_UPPER">(n, w, b)']
    check_declines(NAME, model(same, weights, ["B", 4, "H", "W"]), "pads with zeros")
    unshifted = weights | {"s": np.zeros(4, np.float32), "m": np.zeros(4, np.float32)}
    program = check_numerics(NAME, model(lines, unshifted, ["B", 4, "H", "W"]), {"x": normal(2, 4, 5, 7)})
    assert ops(program) == ["Conv"]


def test_a_residual_block() -> None:
    lines = [
        "a = Conv<pads=[1,1,1,1]>(x, w)",
        "c = BatchNormalization(a, g, s, m, v)",
        "r = Relu(c)",
        "d = Conv<pads=[1,1,1,1]>(r, w2)",
        "e = BatchNormalization(d, g, s, m, v)",
        "f = Add(e, x)",
        "y = Relu(f)",
    ]
    weights = {"w": normal(4, 4, 3, 3), "w2": normal(4, 4, 3, 3, seed=5)} | statistics(4)
    program = check_numerics(NAME, model(lines, weights, ["B", 4, "H", "W"]), {"x": normal(2, 4, 5, 7)})
    assert ops(program) == ["Conv", "Relu", "Conv", "Add", "Relu"]


CONV = {"w": normal(6, 4, 3, 3)} | statistics(6)
DECLINES: dict[str, Any] = {
    "inner value 'c' is also used by": model(["c = Conv(x, w)", BN, "z = Relu(c)"], CONV, ["B", 4, 5, 5], ("y", "z")),
    "inner value 'c' is an output": model(["c = Conv(x, w)", BN], CONV, ["B", 4, 5, 5], ("y", "c")),
    "computes statistics of the batch": model(
        ["c = Conv(x, w)", "y, p, q = BatchNormalization<training_mode=1>(c, g, s, m, v)"], CONV, ["B", 4, 5, 5]
    ),
    "and would be stored twice": model(["c = Conv(x, w)", BN, "z = Conv(x, w)"], CONV, ["B", 4, 5, 5], ("y", "z")),
    "gamma 'h' is not constant": model(
        ["c = Conv(x, w)", BN.replace("c, g", "c, h")], CONV, ["B", 4, 5, 5], inputs={"h": [6]}
    ),
    "columns of the product are not": model(["c = MatMul(x, w)", BN], {"w": normal(4, 6)} | statistics(6), ["B", 6, 4]),
    "a variance is not positive": model(["c = Conv(x, w)", BN], CONV | {"v": -np.ones(6, np.float32)}, ["B", 4, 5, 5]),
    "do not fit": model(["c = Conv(x, w)", BN], CONV | {"g": np.full(6, 1e38, np.float32)}, ["B", 4, 5, 5]),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    source = DECLINES[reason]
    check_declines(NAME, source, reason)


def test_nothing_to_do() -> None:
    lines = ["c = Relu(x)", BN]
    check_untouched(NAME, model(lines, statistics(4), ["B", 4, "H", "W"]))
