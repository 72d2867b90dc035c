from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched

NAME = "unflatten-gemm"


def model(
    body: str,
    *,
    x: str = "[B, S, 3]",
    y: str = "[B, S, 2]",
    rows: str = "-1, 3",
    back: str = "0, 0, 2",
    bias: str = "float[2] b = {0.5, -1}",
    more: str = "",
    inputs: str = "",
) -> str:
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f (float{x} x{inputs}) => (float{y} y{more})
    <float[3, 2] w = {{1, -2, 3, 0.5, 0.25, 4}}, {bias}, int64[2] rows = {{{rows}}}, int64[1] last = {{2}}>
    {{ {body} }}
    """


# As torch writes it: the sizes of the result come from the input.
BACK = "lead = Shape<start = 0, end = 2>(x)\n to = Concat<axis = 0>(lead, last)"
GEMM = f"flat = Reshape(x, rows)\n p = Gemm(flat, w, b)\n {BACK}\n y = Reshape(p, to)"
AFTER = "m = MatMul(x, w)\n y = Add(m, b)"


def feed(*dims: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(dims, dtype=np.float32)}


def test_reshapes_go() -> None:
    check_rewrite(f"{NAME},eliminate-dead-code", model(GEMM), model(AFTER))
    check_rewrite(f"{NAME},eliminate-dead-code", model(GEMM.replace(", b)", ")")), model("y = MatMul(x, w)"))


@pytest.mark.parametrize("dims", [(1, 1, 3), (1, 5, 3), (3, 7, 3), (0, 4, 3)])
@pytest.mark.parametrize("bias", ["float[2] b = {0.5, -1}", "float[1, 2] b = {0.5, -1}", "float b = {0.5}"])
def test_numbers(bias: str, dims: tuple[int, int, int]) -> None:
    program = check_numerics(f"{NAME},eliminate-dead-code", model(GEMM, bias=bias), feed(*dims))
    assert [n.op_type for n in program.main.graph] == ["MatMul", "Add"]


def test_static_sizes() -> None:
    text = model(GEMM, x="[2, 5, 3]", y="[2, 5, 2]", rows="10, 3")
    program = check_numerics(f"{NAME},eliminate-dead-code", text, feed(2, 5, 3))
    assert [n.op_type for n in program.main.graph] == ["MatMul", "Add"]


def test_products_that_share_the_flattened_input() -> None:
    body = GEMM + "\n q = Gemm(flat, w)\n z = Reshape(q, to)"
    program = check_numerics(f"{NAME},eliminate-dead-code", model(body, more=", float[B, S, 2] z"), feed(2, 5, 3))
    assert "Gemm" not in {n.op_type for n in program.main.graph}


DECLINES = {
    "alpha = 0.5": model(GEMM.replace("Gemm(", "Gemm<alpha = 0.5>(")),
    "transA = 1": model(GEMM.replace("Gemm(", "Gemm<transA = 1>("), x="[1, 3, 3]", y="[1, 3, 2]"),
    "no weight": model(GEMM.replace("w, b", "v, b"), inputs=", float[3, 2] v"),
    "do not only join": model(
        GEMM.replace("(lead, last)", "(turned, last)").replace("to =", "turned = Gather(lead, swap)\n to =")
    )
    .replace("int64[1] last", "int64[2] swap = {1, 0}, int64[1] last")
    .replace("[B, S, 2] y", "[S, B, 2] y"),
    "a bias has": model(GEMM, bias="float[1] c = {1}", x="[1, 2, 3]", y="[1, 2, 2]", inputs=", float[2, 2] b"),
    "'p'": model(GEMM, more=", float[N, 2] p"),
    "there are two": model(GEMM.replace("end = 2", "end = 1"), x="[B, 3]", y="[B, 2]"),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines(NAME, DECLINES[reason], reason)


def test_nothing_to_do() -> None:
    check_untouched(NAME, model(AFTER))
    check_untouched(NAME, model("y = Gemm(x, w, b)", x="[B, 3]", y="[B, 2]"))
