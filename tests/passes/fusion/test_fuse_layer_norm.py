from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite

SQUARES = {"power": "s = Pow(d, two)", "product": "s = Mul(d, d)"}
QUOTIENTS = {
    "division": "n = Div(d, r)",
    "reciprocal": "i = Reciprocal(r)\n n = Mul(d, i)",
    "one over": "i = Div(one, r)\n n = Mul(i, d)",
}
ENDS = {
    "both": "m = Mul(n, scale)\n y = Add(m, bias)",
    "both turned": "m = Mul(scale, n)\n y = Add(bias, m)",
    "scale": "y = Mul(n, scale)",
    "neither": "y = Identity(n)",
}
AFTER = {
    "both": "y = LayerNormalization<axis = -1, epsilon = 1e-5>(x, scale, bias)",
    "both turned": "y = LayerNormalization<axis = -1, epsilon = 1e-5>(x, scale, bias)",
    "scale": "y = LayerNormalization<axis = -1, epsilon = 1e-5>(x, scale)",
    "neither": "n = LayerNormalization<axis = -1, epsilon = 1e-5>(x, ones)\n y = Identity(n)",
}


def model(
    body: str | None = None,
    *,
    square: str = "power",
    quotient: str = "division",
    end: str = "both",
    opset: int = 23,
    dims: str = "[B, S, 6]",
    axes: str = "{-1}",
    dtype: str = "float",
    parameters: str = "[6]",
    extra: str = "",
    outputs: str = "",
    keep: str = "",
) -> str:
    if body is None:

        def mean(v: str, keep: str) -> str:
            if opset < 18:
                return f"ReduceMean<axes = [{axes.strip('{}')}]>({v})"
            return f"ReduceMean{keep}({v}, axes)"

        body = f"""mu = {mean("x", keep)}
            d = Sub(x, mu)
            {SQUARES[square]}
            variance = {mean("s", keep)}
            shifted = Add(variance, eps)
            r = Sqrt(shifted)
            {QUOTIENTS[quotient]}
            {ENDS[end]}"""
    count = axes.count(",") + 1
    return f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    f ({dtype}{dims} x, {dtype}{parameters} scale, {dtype}{parameters} bias{extra}) => ({dtype}{dims} y{outputs})
    <{dtype} two = {{2}}, {dtype} one = {{1}}, {dtype} eps = {{1e-5}}, int64[{count}] axes = {axes},
     {dtype}[6] ones = {{1, 1, 1, 1, 1, 1}}>
    {{ {body} }}
    """


def feed(*dims: int, parameters: tuple[int, ...] = (6,)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": dims, "scale": parameters, "bias": parameters}
    return {name: 1 + 2 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize("end", ENDS)
def test_every_spelling(square: str, quotient: str, end: str) -> None:
    text = model(square=square, quotient=quotient, end=end)
    check_rewrite("fuse-layer-norm", text, model(AFTER[end]), edits=1)
    for size in ((1, 1, 6), (3, 5, 6)):
        check_numerics("fuse-layer-norm", text, feed(*size))


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_axes_as_attribute_and_as_input(opset: int) -> None:
    check_numerics("fuse-layer-norm", model(opset=opset), feed(3, 5, 6))


def test_several_axes() -> None:
    text = model(axes="{-2, -1}", dims="[B, 5, 6]", parameters="[5, 6]")
    program = check_numerics("fuse-layer-norm", text, feed(3, 5, 6, parameters=(5, 6)))
    assert program.main.graph[0].attributes.get_int("axis") == -2


def test_large_offsets_stay_accurate() -> None:
    inputs = feed(3, 5, 6)
    inputs["x"] += 100
    check_numerics("fuse-layer-norm", model(), inputs)


DECLINES = {
    "which are not the last ones": model(axes="{1}", dims="[B, 6, 6]"),
    "mean drops its axes": model(keep="<keepdims = 0>", dims="[6]", axes="{0}"),
    "epsilon is not a positive constant": model(extra=", float e").replace("Add(variance, eps)", "Add(variance, e)"),
    "the input is double": model(dtype="double"),
    "needs opset 17": model(opset=13),
    "'variance'": model(outputs=", float[B, S, 1] variance"),
    "different axes": model(axes="{-1}", dims="[5, 5, 5]")
    .replace(
        "variance = ReduceMean(s, axes)", "more = Constant<value_ints = [-2, -1]>()\n variance = ReduceMean(s, more)"
    )
    .replace("[6] ones = {1, 1, 1, 1, 1, 1}", "[1] ones = {1}")
    .replace("[6]", "[5]"),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines("fuse-layer-norm", DECLINES[reason], reason.strip("'"))


def test_a_scale_of_another_shape_stays_outside() -> None:
    # The normalization itself is recovered; the product with a scalar is left as it is.
    text = model(parameters="[1]")
    program = check_numerics("fuse-layer-norm", text, feed(3, 5, 6, parameters=(1,)))
    assert [n.op_type for n in program.main.graph] == ["LayerNormalization", "Mul", "Add"]
