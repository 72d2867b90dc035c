from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
    program_of,
)

WEIGHTS = """<float[6, 6] w = {1,2,3,4,5,6, 1,0,1,0,1,0, 2,2,2,2,2,2, 0,1,0,1,0,1, 3,1,3,1,3,1, 6,5,4,3,2,1},
 float[6] b = {1,2,3,4,5,6}, float[6] scale = {1,1,2,2,3,3}, float[6] shift = {0,1,0,1,0,1}>"""
NORM = "y = LayerNormalization(s, scale, shift)"


def model(body: str, *, dtype: str = "float", outputs: str = "") -> str:
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f ({dtype}[B, S, 6] x, {dtype}[B, S, 6] r) => ({dtype}[B, S, 6] y{outputs})
    {WEIGHTS if dtype == "float" else WEIGHTS.replace("float[", f"{dtype}[")}
    {{ {body} }}
    """


def feed(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    return {k: rng.standard_normal((batch, length, 6)).astype(np.float32) for k in ("x", "r")}


@pytest.mark.parametrize("order", ["s = Add(x, r)", "s = Add(r, x)"])
def test_a_residual_becomes_a_sum(order: str) -> None:
    after = model(order.replace("Add", "Sum") + "\n" + NORM)
    check_rewrite("lower-residual-add", model(order + "\n" + NORM), after, edits=1)
    for size in ((1, 1), (3, 5)):
        check_numerics("lower-residual-add", model(order + "\n" + NORM), feed(*size))


@pytest.mark.parametrize("body", ["p = Add(m, b)\n s = Add(p, r)", "p = Add(b, m)\n s = Add(r, p)"])
def test_the_bias_of_the_product_comes_along(body: str) -> None:
    before = model("m = MatMul(x, w)\n" + body + "\n" + NORM)
    program = check_numerics("lower-residual-add", before, feed(3, 5))
    assert [n.op_type for n in program.main.graph] == ["MatMul", "Sum", "LayerNormalization"]
    assert {v.name for v in program.main.graph[1].inputs if v is not None} == {"m", "b", "r"}


def test_a_second_run_finds_nothing() -> None:
    program = program_of(model("s = Add(x, r)\n" + NORM))
    assert apply_pass("lower-residual-add", program).fired == 1
    assert not apply_pass("lower-residual-add", program).modified


def test_the_runtime_does_not_fuse_the_result(tmp_path: Path) -> None:
    text = model("s = Add(x, r)\n" + NORM)
    program = program_of(text)
    assert "SkipLayerNormalization" in operators_run(program.main, tmp_path / "before")
    apply_pass("lower-residual-add", program)
    assert operators_run(program.main, tmp_path / "after") == {"Sum", "LayerNormalization"}


def operators_run(model: ir.Model, prefix: Path) -> set[str]:
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(prefix)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, feed(2, 3))
    events = json.loads(Path(session.end_profiling()).read_text())
    return {e["args"]["op_name"] for e in events if "op_name" in e.get("args", {})}


INNER = ["a = Relu(x)\n p = Add(a, b)\n s = Add(p, r)\n", "m = MatMul(x, w)\n p = Add(m, x)\n s = Add(p, r)\n"]


@pytest.mark.parametrize("inner", INNER)
def test_what_is_no_bias_of_a_product_stays_an_addition(inner: str) -> None:
    program = check_numerics("lower-residual-add", model(inner + NORM), feed(3, 5))
    assert [n.op_type for n in program.main.graph][1:] == ["Add", "Sum", "LayerNormalization"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("s = Add(x, r)\n n = LayerNormalization(s, scale, shift)\n y = Add(n, s)", ""),
        ("s = Add(x, r)\n" + NORM, ", float[B, S, 6] s"),
    ],
)
def test_a_sum_that_is_read_elsewhere_declines(body: str, outputs: str) -> None:
    # A pre-norm residual: the runtime does not fuse it either.
    check_declines("lower-residual-add", model(body, outputs=outputs), "'s'")


def test_a_mean_that_is_read_declines() -> None:
    body = "s = Add(x, r)\n y, mean = LayerNormalization(s, scale, shift)"
    check_declines("lower-residual-add", model(body, outputs=", float[B, S, 1] mean"), "'mean'")


def test_another_target_declines() -> None:
    program = program_of(model("s = Add(x, r)\n" + NORM))
    program.target = type(program.target)("tvm", "cpu")
    result = apply_pass("lower-residual-add", program)
    assert not result.modified
    assert {"target tvm-cpu has its own kernels for a residual and a normalization"} <= {
        d.reason for d in result.declined
    }


def test_half_precision_declines() -> None:
    text = model("s = Add(x, r)\n" + NORM, dtype="float16")
    check_declines("lower-residual-add", text, "not float32")


def test_without_a_sum_there_is_nothing() -> None:
    check_untouched("lower-residual-add", model("s = Mul(x, r)\n" + NORM))
    check_untouched("lower-residual-add", model("s = Add(x, r)\n y = Relu(s)"))
