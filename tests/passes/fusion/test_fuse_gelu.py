from __future__ import annotations

import re

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched

CONSTANTS = """<float half = {0.5}, float one = {1}, float two = {2}, float three = {3},
 float root2 = {1.4142135381698608},
 float inv2 = {0.7071067690849304}, float cubic = {0.044714998453855515}, float rate = {0.7978845834732056}>"""
ERF = "d = Div(x, root2)\n e = Erf(d)\n g = Add(e, one)\n"
TANH = "p = Pow(x, three)\n c = Mul(p, cubic)\n s = Add(x, c)\n a = Mul(s, rate)\n t = Tanh(a)\n g = Add(t, one)\n"


def model(body: str, *, dtype: str = "float", opset: int = 23, outputs: str = "") -> str:
    constants = CONSTANTS.replace("float ", f"{dtype} ")
    if dtype == "float16":  # the text form wants bit patterns
        constants = re.sub(r"{([\d.]+)}", lambda m: f"{{{np.float16(m[1]).view(np.uint16)}}}", constants)
    return f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    f ({dtype}[B, S, 6] x) => ({dtype}[B, S, 6] y{outputs})
    {constants}
    {{ {body} }}
    """


PRODUCTS = [
    "m = Mul(x, g)\n y = Mul(m, half)",
    "m = Mul(g, x)\n y = Mul(half, m)",
    "m = Mul(g, half)\n y = Mul(x, m)",
    "m = Mul(half, g)\n y = Mul(m, x)",
    "m = Mul(x, half)\n y = Mul(m, g)",
    "m = Mul(x, g)\n y = Div(m, two)",
    "m = Div(x, two)\n y = Mul(m, g)",
]
ARGUMENTS = {
    "erf by division": ERF,
    "erf by product": "d = Mul(inv2, x)\n e = Erf(d)\n g = Add(one, e)\n",
    "tanh of a power": TANH,
    "tanh of products": "x2 = Mul(x, x)\n x3 = Mul(x2, x)\n c = Mul(cubic, x3)\n s = Add(c, x)\n a = Mul(rate, s)\n"
    "t = Tanh(a)\n g = Add(one, t)\n",
    "tanh, constant first": "x1 = Mul(x, cubic)\n x2 = Mul(x1, x)\n x3 = Mul(x2, x)\n s = Add(x, x3)\n"
    "a = Mul(s, rate)\n t = Tanh(a)\n g = Add(t, one)\n",
    "tanh, factored": "x1 = Mul(cubic, x)\n x2 = Mul(x1, x)\n e = Add(one, x2)\n xr = Mul(x, rate)\n a = Mul(xr, e)\n"
    "t = Tanh(a)\n g = Add(one, t)\n",
    "tanh, factored last": "x2 = Pow(x, two)\n c = Mul(x2, cubic)\n e = Add(c, one)\n er = Mul(e, rate)\n"
    "a = Mul(x, er)\n t = Tanh(a)\n g = Add(t, one)\n",
}


def feed(batch: int, length: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((batch, length, 6)) * 3
    return {"x": x.astype(dtype)}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_order_of_the_factors(argument: str, product: str) -> None:
    text = model(ARGUMENTS[argument] + product)
    attribute = '<approximate = "tanh">' if "tanh" in argument else ""
    check_rewrite("fuse-gelu", text, model(f"y = Gelu{attribute}(x)"), edits=1)
    for size in ((1, 1), (3, 5)):
        check_numerics("fuse-gelu", text, feed(*size))


def test_opset_20_is_enough_and_19_is_not() -> None:
    check_numerics("fuse-gelu", model(ERF + PRODUCTS[0], opset=20), feed(3, 5))
    check_declines("fuse-gelu", model(ERF + PRODUCTS[0], opset=19), "needs opset 20")


def test_float16() -> None:
    check_numerics("fuse-gelu", model(TANH + PRODUCTS[0], dtype="float16"), feed(3, 5, np.float16))


def test_two_in_a_row() -> None:
    first = (ERF + PRODUCTS[0]).replace("y =", "h =")
    # Every inner name gets a 2, and the constants keep theirs.
    second = re.sub(r"\b([degm])\b", r"\g<1>2", (ERF + PRODUCTS[0]).replace("x", "h"))
    check_rewrite("fuse-gelu", model(first + "\n" + second), model("h = Gelu(x)\n y = Gelu(h)"), edits=2)


DECLINES = {
    "x is DOUBLE": model(TANH + PRODUCTS[0], dtype="double"),
    "g": model(ERF + PRODUCTS[0], outputs=", float[B, S, 6] g"),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines("fuse-gelu", DECLINES[reason], reason)


@pytest.mark.parametrize(
    "body",
    [
        ERF.replace("root2", "two") + PRODUCTS[0],
        ERF + PRODUCTS[0].replace("half", "two"),
        TANH.replace("cubic", "rate") + PRODUCTS[0],
        TANH.replace("three", "two") + PRODUCTS[0],
        ERF.replace("one", "half") + PRODUCTS[0],
    ],
)
def test_other_numbers_are_not_gelu(body: str) -> None:
    check_untouched("fuse-gelu", model(body))
