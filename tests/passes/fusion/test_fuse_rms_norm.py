from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite

SQUARES = {"power": "s = Pow(x, two)", "product": "s = Mul(x, x)"}
ROOTS = {
    "division": "r = Sqrt(v)\n n = Div(x, r)",
    "reciprocal": "r = Sqrt(v)\n i = Reciprocal(r)\n n = Mul(x, i)",
    "one over": "r = Sqrt(v)\n i = Div(one, r)\n n = Mul(i, x)",
    "power": "i = Pow(v, mhalf)\n n = Mul(x, i)",
}


def model(
    body: str | None = None,
    *,
    square: str = "power",
    root: str = "reciprocal",
    end: str = "y = Mul(scale, n)",
    dtype: str = "float",
    opset: int = 23,
    axes: str = "{-1}",
    dims: str = "[B, S, 6]",
    scale: str = "[6]",
    outputs: str = "",
) -> str:
    body = body or f"{SQUARES[square]}\n m = ReduceMean(s, axes)\n v = Add(m, eps)\n {ROOTS[root]}\n {end}"
    inner = "float" if dtype == "float16" else dtype
    return f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    f ({dtype}{dims} x, {dtype}{scale} scale) => ({dtype}{dims} y{outputs})
    <{inner} two = {{2}}, {inner} one = {{1}}, {inner} mhalf = {{-0.5}}, {inner} eps = {{1e-6}}, int64[1] axes = {axes}>
    {{ {body} }}
    """


#: Llama in half precision: the norm in float32, the product with the scale in float16.
CAST = model(
    """w = Cast<to = 1>(x)
    s = Pow(w, two)
    m = ReduceMean(s, axes)
    v = Add(m, eps)
    r = Sqrt(v)
    i = Reciprocal(r)
    n = Mul(w, i)
    h = Cast<to = 10>(n)
    y = Mul(scale, h)""",
    dtype="float16",
)


def feed(*dims: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": (rng.standard_normal(dims) * 2).astype(dtype), "scale": rng.standard_normal(dims[-1:]).astype(dtype)}


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("end", ["y = Mul(scale, n)", "y = Mul(n, scale)"])
def test_every_spelling(square: str, root: str, end: str) -> None:
    text = model(square=square, root=root, end=end)
    after = model("y = RMSNormalization<axis = -1, epsilon = 1e-6, stash_type = 1>(x, scale)")
    check_rewrite("fuse-rms-norm", text, after, edits=1)
    for size in ((1, 1, 6), (3, 5, 6)):
        check_numerics("fuse-rms-norm", text, feed(*size))


@pytest.mark.parametrize("size", [(1, 1, 6), (3, 5, 6)])
def test_half_precision_with_casts(size: tuple[int, ...]) -> None:
    program = check_numerics("fuse-rms-norm", CAST, feed(*size, dtype=np.float16))
    assert [n.op_type for n in program.main.graph] == ["RMSNormalization"]


def test_tiny_values() -> None:
    inputs = feed(3, 5, 6)
    inputs["x"] *= 1e-4
    check_numerics("fuse-rms-norm", model(), inputs)


DECLINES = {
    "which are not the last ones": model(axes="{1}", dims="[B, 6, 6]"),
    "scale has shape (1,)": model(scale="[1]"),
    "scale has shape (5, 6)": model(scale="[5, 6]", dims="[B, 5, 6]"),
    "epsilon is not a positive constant": model().replace("eps = {1e-6}", "eps = {0}"),
    "the input is double": model(dtype="double"),
    "needs opset 23": model(opset=22),
    "'m'": model(outputs=", float[B, S, 1] m"),
    "cast to another dtype": CAST.replace("to = 10", "to = 1")
    .replace("float16[6] scale", "float[6] scale")
    .replace("(float16[B, S, 6] y)", "(float[B, S, 6] y)"),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines("fuse-rms-norm", DECLINES[reason], reason.strip("'"))
