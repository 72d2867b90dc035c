from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto

from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
    program_of,
)
from planish.runtime.ort import compile_ort
from tests.passes.fusion.linear_models import model, normal

NAME = "lower-feed-forward"
BLOCK = ["a = MatMul(x, w)", "c = Add(a, b)", "h = Gelu(c)", "p = MatMul(h, w2)", "y = Add(p, b2)"]
WEIGHTS = {"w": normal(64, 128) / 8, "b": normal(128), "w2": normal(128, 64) / 8, "b2": normal(64)}
GATED = [
    "g = MatMul(x, w)",
    "u = MatMul(x, w3)",
    "s = Sigmoid(g)",
    "i = Mul(g, s)",
    "h = Mul(i, u)",
    "y = MatMul(h, w2)",
]


def ops(program: Any) -> list[str]:
    return [node.op_type for node in program.main.graph]


def test_before_and_after() -> None:
    header = '<ir_version: 10, opset_import: ["" : 20]> f (float[B, S, 8] x) => (float[B, S, 8] y)'
    ones = ", ".join(["1"] * 64)
    row = ", ".join(["2"] * 8)
    before = f"""{header} <float[8, 8] w = {{{ones}}}, float[8] b = {{{row}}}, float[8, 8] w2 = {{{ones}}}>
        {{ a = MatMul(x, w)  c = Add(b, a)  h = Relu(c)  y = MatMul(h, w2) }}"""
    after = f"""{header} <float[8, 8, 1, 1] w = {{{ones}}}, float[8] b = {{{row}}}, float[8, 8, 1, 1] w2 = {{{ones}}},
        int64[1] k = {{0}}>
        {{ u = Unsqueeze(x, k)  t = Transpose<perm = [0, 3, 1, 2]>(u)  c = Conv<kernel_shape = [1, 1]>(t, w, b)
           h = Relu(c)  d = Conv<kernel_shape = [1, 1]>(h, w2)  v = Transpose<perm = [0, 2, 3, 1]>(d)
           y = Squeeze(v, k) }}"""
    check_rewrite(f"{NAME}{{min_channels=8}}", before, after, edits=1)
    check_declines(NAME, before, "8 channels are fewer than 64")


@pytest.mark.parametrize("dims", [(1, 1), (3, 7), (), (2, 3, 5)])
@pytest.mark.parametrize("activation", ["Gelu(c)", 'Gelu<approximate="tanh">(c)', "Relu(c)", "Tanh(c)"])
def test_numbers(activation: str, dims: tuple[int, ...]) -> None:
    lines = [*BLOCK[:2], f"h = {activation}", *BLOCK[3:]]
    sizes = dims if len(dims) != 0 else (4,)
    symbols = ["B", "S", "T"][: len(sizes)]
    program = check_numerics(NAME, model(lines, WEIGHTS, [*symbols, 64]), {"x": normal(*sizes, 64)})
    assert ops(program).count("Conv") == 2 and "MatMul" not in ops(program)


@pytest.mark.parametrize("dims", [(1, 1), (2, 9)])
def test_gates(dims: tuple[int, int]) -> None:
    weights = {"w": normal(64, 128) / 8, "w3": normal(64, 128, seed=7) / 8, "w2": WEIGHTS["w2"]}
    built = model(GATED, weights, ["B", "S", 64])
    program = check_numerics(NAME, built, {"x": normal(*dims, 64)})
    assert ops(program).count("Conv") == 3 and "MatMul" not in ops(program)
    program = check_numerics(f"fuse-swiglu,{NAME}", built, {"x": normal(*dims, 64)})
    assert ops(program).count("Conv") == 3 and "SwiGLU" in ops(program)


@pytest.mark.parametrize("dims", [(0, 5), (3, 0)])
def test_nothing_to_compute(dims: tuple[int, int]) -> None:
    # The kernel refuses images without pixels, so the runtime answers by itself.
    program = program_of(model(BLOCK, WEIGHTS, ["B", "S", 64]))
    for value in program.main.graph.outputs:
        value.shape = ir.Shape(["B", "S", 64])
    apply_pass(NAME, program)
    got = compile_ort(program.main, program.target).run({"x": normal(*dims, 64)})
    assert got["y"].shape == (*dims, 64)


def test_the_runtime_multiplies_a_gate_in_its_layout(tmp_path: Path) -> None:
    # It does so only where it sees one shape on both sides: else the block leaves the layout and enters it again.
    weights = {"w": normal(64, 128) / 8, "w3": normal(64, 128, seed=7) / 8, "w2": WEIGHTS["w2"]}
    program = program_of(model(GATED, weights, ["B", "S", 64]))
    apply_pass(NAME, program)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    proto = ir.to_proto(program.main).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": normal(2, 5, 64)})
    events = json.loads(Path(session.end_profiling()).read_text())
    reordered = {e["name"] for e in events if "Reorder" in e.get("args", {}).get("op_name", "")}
    assert len({name for name in reordered if name.endswith("_kernel_time")}) <= 2


def test_quick_gelu() -> None:
    lines = [*BLOCK[:2], "q = Mul(c, k)", "s = Sigmoid(q)", "h = Mul(c, s)", *BLOCK[3:]]
    source = model(lines, WEIGHTS | {"k": np.array(1.702, np.float32)}, ["B", "S", 64])
    assert "MatMul" not in ops(check_numerics(NAME, source, {"x": normal(2, 5, 64)}))


def test_transposes_of_a_channels_last_block_go_away() -> None:
    lines = ["n = Transpose<perm=[0,2,3,1]>(x)", *(line.replace("(x,", "(n,") for line in BLOCK)]
    lines[-1] = "q = Add(p, b2)"
    lines += ["t = Transpose<perm=[0,3,1,2]>(q)", "y = Add(t, x)"]
    source = model(lines, WEIGHTS, ["B", 64, "H", "W"])
    program = check_numerics(f"{NAME},compose-views", source, {"x": normal(2, 64, 3, 5)})
    assert ops(program) == ["Conv", "Gelu", "Conv", "Add"]


DECLINES: dict[str, Any] = {
    "inner value 'h' is also used by Relu": model([*BLOCK, "z = Relu(h)"], WEIGHTS, ["B", "S", 64], ("y", "z")),
    "inner value 'c' is also used as an output": model(BLOCK, WEIGHTS, ["B", "S", 64], ("y", "c")),
    "and would be stored twice": model([*BLOCK, "z = MatMul(x, w)"], WEIGHTS, ["B", "S", 64], ("y", "z")),
    "no multiple of 8": model(
        BLOCK, {"w": normal(64, 100), "b": normal(100), "w2": normal(100, 64), "b2": normal(64)}, ["B", "S", 64]
    ),
    "it is not float32": model(BLOCK, WEIGHTS, ["B", "S", 64], dtype=TensorProto.FLOAT16),
    "rank 5": model(BLOCK, WEIGHTS, ["B", "S", "T", "U", 64]),
    "read different values": model(
        [GATED[0], GATED[1].replace("(x,", "(z,"), *GATED[2:]],
        {"w": normal(64, 128), "w3": normal(64, 128), "w2": WEIGHTS["w2"]},
        ["B", "S", 64],
        inputs={"z": ["B", "S", 64]},
    ),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines(NAME, DECLINES[reason], reason)


def test_single_products_and_attention_stay() -> None:
    check_untouched(NAME, model(["y = MatMul(x, w)"], {"w": WEIGHTS["w"]}, ["B", "S", 64]))
    lines = ["a = MatMul(x, w)", "s = Softmax(a)", "y = MatMul(s, w2)"]
    check_untouched(NAME, model(lines, WEIGHTS, ["B", "S", 64]))
    check_untouched(NAME, model(["h = Gelu(x)", "y = MatMul(h, w)"], WEIGHTS, ["B", "S", 64]))


def test_the_runtime_stays_in_its_blocked_layout(tmp_path: Any) -> None:
    import onnx
    import onnx_ir as ir
    import onnxruntime

    program = program_of(model(BLOCK, WEIGHTS, ["B", "S", 64]))
    apply_pass(NAME, program)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    proto = ir.to_proto(program.main).SerializeToString()
    onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    nodes = list(onnx.load(tmp_path / "optimized.onnx").graph.node)
    if not any(n.domain == "com.microsoft.nchwc" for n in nodes):
        pytest.skip("this processor has no blocked layout")
    assert [
        n.op_type for n in nodes if n.op_type in ("Conv", "Gelu", "ReorderInput", "ReorderOutput", "Transpose")
    ] == [
        "ReorderInput",
        "Conv",
        "Gelu",
        "Conv",
        "ReorderOutput",
    ]
