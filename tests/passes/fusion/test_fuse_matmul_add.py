from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched

WEIGHT = "float[3, 2] w = {1, -2, 3, 0.5, 0.25, 4}"
TURNED = "float[2, 3] w = {1, 3, 0.25, -2, 0.5, 4}"


def model(
    body: str, weights: str = WEIGHT, *, x: str = "[B, 3]", y: str = "[B, 2]", extra: str = "", more: str = ""
) -> str:
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f (float{x} x{extra}) => (float{y} y{more})
    <{weights}, float[2] b = {{0.5, -1}}>
    {{ {body} }}
    """


MATMUL_ADD = "p = MatMul(x, w)\n y = Add(p, b)"


def feed(*dims: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(dims, dtype=np.float32)}


@pytest.mark.parametrize("body", [MATMUL_ADD, "p = MatMul(x, w)\n y = Add(b, p)"])
def test_two_dimensions_become_gemm(body: str) -> None:
    check_rewrite("fuse-matmul-add", model(body), model("y = Gemm(x, w, b)"), edits=1)
    for batch in (1, 3):
        check_numerics("fuse-matmul-add", model(body), feed(batch, 3))


def test_gemm_gets_its_weight_turned() -> None:
    before = model("y = Gemm<transB = 1, alpha = 0.5>(x, w, b)", TURNED)
    check_rewrite("fuse-matmul-add", before, model("y = Gemm<alpha = 0.5>(x, w, b)"), edits=1)
    check_numerics("fuse-matmul-add", before, feed(3, 3))


@pytest.mark.parametrize("dims", [(1, 1, 3), (3, 5, 3)])
@pytest.mark.parametrize("transpose", ["Transpose<perm = [1, 0]>(w)", "Transpose(w)"])
def test_transposed_weight_is_folded(transpose: str, dims: tuple[int, ...]) -> None:
    before = model(f"t = {transpose}\n y = MatMul(x, t)", TURNED, x="[B, S, 3]", y="[B, S, 2]")
    check_rewrite("fuse-matmul-add", before, model("y = MatMul(x, w)", x="[B, S, 3]", y="[B, S, 2]"), edits=1)
    check_numerics("fuse-matmul-add", before, feed(*dims))


def test_transposed_weight_and_bias_in_one_run() -> None:
    before = model("t = Transpose(w)\n p = MatMul(x, t)\n y = Add(p, b)", TURNED)
    check_rewrite("fuse-matmul-add", before, model("y = Gemm(x, w, b)"), edits=2)


DECLINES = {
    "a bias has (2,)": model("p = MatMul(x, w)\n y = Add(p, r)", extra=", float[B, 2] r"),
    "the second matrix is no weight": model("p = MatMul(x, v)\n y = Add(p, b)", extra=", float[3, 2] v"),
    "'p'": model(MATMUL_ADD, more=", float[B, 2] p"),
    "transposed at run time": model("y = Gemm<transB = 1>(x, v, b)", extra=", float[2, 3] v"),
    "would be stored twice": model(
        "t = Transpose(w)\n p = MatMul(x, t)\n q = MatMul(x, w)\n y = Mul(p, q)",
        "float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}",
        y="[B, 3]",
    ),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines("fuse-matmul-add", DECLINES[reason], reason.strip("'"))


def test_limit() -> None:
    check_declines(
        "fuse-matmul-add{limit=8}", model("y = Gemm<transB = 1>(x, w, b)", TURNED), "24 bytes, and the limit is 8"
    )


@pytest.mark.parametrize(
    "text",
    [
        model("y = Gemm(x, w, b)"),
        # As Gemm, products of more dimensions would need reshapes, and no bias would fuse with what follows.
        model(MATMUL_ADD, x="[B, S, 3]", y="[B, S, 2]"),
        model("t = Transpose(v)\n y = MatMul(x, t)", extra=", float[2, 3] v"),
    ],
)
def test_nothing_to_do(text: str) -> None:
    check_untouched("fuse-matmul-add", text)
