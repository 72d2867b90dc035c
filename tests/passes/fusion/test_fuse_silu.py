from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
    program_of,
)

SIGMOIDS = {
    "division": "n = Neg(x)\n e = Exp(n)\n d = Add(e, one)\n y = Div(x, d)",
    "sum the other way": "n = Neg(x)\n e = Exp(n)\n d = Add(one, e)\n y = Div(x, d)",
    "product with minus one": "n = Mul(x, minus)\n e = Exp(n)\n d = Add(one, e)\n y = Div(x, d)",
    "reciprocal": "n = Neg(x)\n e = Exp(n)\n d = Add(e, one)\n r = Reciprocal(d)\n y = Mul(r, x)",
    "one over it": "n = Neg(x)\n e = Exp(n)\n d = Add(e, one)\n r = Div(one, d)\n y = Mul(x, r)",
}


def model(body: str, *, dtype: str = "float", outputs: str = "") -> str:
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f ({dtype}[B, 6] x, {dtype}[B, 6] z) => ({dtype}[B, 6] y{outputs})
    <{dtype} one = {{1}}, {dtype} minus = {{-1}}, {dtype} two = {{2}}>
    {{ {body} }}
    """


def feed(batch: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    # Far out on both sides too, where exp overflows.
    x = np.concatenate([rng.standard_normal((batch, 4)) * 4, np.tile([-200.0, 200.0], (batch, 1))], axis=1)
    return {"x": x.astype(dtype), "z": rng.standard_normal((batch, 6)).astype(dtype)}


@pytest.mark.parametrize("form", SIGMOIDS)
def test_every_form(form: str) -> None:
    check_rewrite("fuse-silu", model(SIGMOIDS[form]), model("s = Sigmoid(x)\n y = Mul(x, s)"), edits=1)
    for batch in (0, 1, 5):
        check_numerics("fuse-silu", model(SIGMOIDS[form]), feed(batch))


def test_double() -> None:
    check_numerics("fuse-silu", model(SIGMOIDS["division"], dtype="double"), feed(3, np.float64))


def test_a_second_run_finds_nothing() -> None:
    program = program_of(model(SIGMOIDS["division"]))
    assert apply_pass("fuse-silu", program).fired == 1
    assert not apply_pass("fuse-silu", program).modified


def test_a_gate_after_it_becomes_swiglu() -> None:
    gated = SIGMOIDS["division"].replace("y =", "a =") + "\n y = Mul(a, z)"
    program = check_numerics("fuse-silu,fuse-swiglu", model(gated), feed(3))
    assert [n.op_type for n in program.main.graph] == ["SwiGLU"]


def test_without_a_kernel_it_declines() -> None:
    half = model(SIGMOIDS["division"], dtype="float16").replace("{1}", "{15360}").replace("{-1}", "{48128}")
    check_declines("fuse-silu", half, "Sigmoid has a kernel for float32 and float64")


def test_a_sigmoid_that_is_read_elsewhere_declines() -> None:
    check_declines("fuse-silu", model(SIGMOIDS["division"], outputs=", float[B, 6] d"), "'d'")


@pytest.mark.parametrize(
    ("old", "new"),
    [("Add(e, one)", "Add(e, two)"), ("Neg(x)", "Neg(z)"), ("Div(x, d)", "Div(d, x)"), ("Exp(n)", "Abs(n)")],
)
def test_what_is_no_silu_stays(old: str, new: str) -> None:
    check_untouched("fuse-silu", model(SIGMOIDS["division"].replace(old, new)))
