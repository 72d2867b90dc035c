from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.ir import processor
from planish.ir.errors import InputError, PlanishError
from planish.ir.names import ensure_names
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.precision.blocks import round_to_nearest
from planish.passes.precision.quantize_weights import QuantizeWeights
from planish.passes.testing import apply_pass, check_declines, check_rewrite, check_untouched, program_of
from planish.runtime.ort import compile_ort

K, N = 96, 64
SIZES = {"w": (K, N), "t": (N, K), "b": (N,), "e": (100, K), "odd": (300, 20), "small": (K, 4), "m": (1, N)}


def model(body: str, inputs: str = f"float[B, S, {K}] x", outputs: str = f"float[B, S, {N}] y", dtype="f4") -> ir.Model:
    rng = np.random.default_rng(1)
    weights = [
        ir.tensor(rng.standard_normal(SIZES[n]).astype(dtype), name=n) for n in SIZES if n in re.findall(r"\w+", body)
    ]
    text = (
        f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> g ({inputs}) => ({outputs}) {{ {body} }}"""
    )
    return ir.from_onnx_text(text, initializers=weights)


def run(program: Program, **feeds: np.ndarray) -> np.ndarray:
    return next(iter(compile_ort(program.entry(program.default_entry), program.target).run(feeds).values()))


def error(passed: QuantizeWeights, source: ir.Model, **feeds: np.ndarray) -> float:
    program = program_of(source)
    want = run(program, **feeds)
    apply_pass(passed, program)
    return float(np.linalg.norm(run(program, **feeds) - want) / np.linalg.norm(want))


def test_before_and_after():
    before = model("y = MatMul(x, w)")
    blocks = round_to_nearest(before.graph.initializers["w"].const_value.numpy().T, 8, 64)
    after = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[B, S, {K}] x) => (float[B, S, {N}] y) {{ y = com.microsoft.MatMulNBits
          <K = {K}, N = {N}, accuracy_level = 4, bits = 8, block_size = 64>(x, codes, scales) }}""",
        initializers=[ir.tensor(blocks.codes, name="codes"), ir.tensor(blocks.scales.reshape(-1), name="scales")],
    )
    result = check_rewrite(QuantizeWeights(), before, after, edits=1)
    assert result.notes == ["1 weight in 8 bits, in blocks of 64 (1); relative error of the weights 0.0057"]


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.02), (4, 0.15)])
@pytest.mark.parametrize(
    ("body", "rank"),
    [("y = MatMul(x, w)", 3), ("y = Gemm<transB = 1>(x, t, b)", 2), ("y = Gemm(x, w)", 2), ("y = Gemm(x, w, b)", 2),
     ("u = Transpose<perm = [1, 0]>(t) y = MatMul(x, u)", 3)],
)  # fmt: skip
def test_every_form_of_a_product(body, rank, bits, limit):
    dims = "B, S" if rank == 3 else "B"
    source = model(body, f"float[{dims}, {K}] x", f"float[{dims}, {N}] y")
    x = np.random.default_rng(0).standard_normal((2, 3, K)[-rank:]).astype("f4")
    assert 1e-4 < error(QuantizeWeights(bits=bits), source, x=x) < limit


def test_a_head_that_is_the_embedding_is_stored_once():
    source = model(
        "x = Gather(e, i) h = Relu(x) u = Transpose<perm = [1, 0]>(e) y = MatMul(h, u)",
        "int64[B, S] i",
        "float[B, S, 100] y",
    )
    apply_pass("infer-shapes", source := program_of(source))
    program = source.clone()
    apply_pass(QuantizeWeights(block=32), program)
    ops = [n.op_type for n in program.entry(program.default_entry).graph]
    assert ops == ["GatherBlockQuantized", "Reshape", "Relu", "MatMulNBits"]
    codes = [
        v
        for v in program.entry(program.default_entry).graph.initializers.values()
        if v.const_value.dtype == ir.DataType.UINT8
    ]
    assert len(codes) == 1 and len(codes[0].uses()) == 2
    ids = np.array([[0, 99, 5], [7, 7, 1]])
    assert error(QuantizeWeights(block=32), source, i=ids) < 0.02


def test_rows_of_a_table_that_is_looked_up_only():
    source = model("y = Gather(e, i)", "int64[B] i", f"float[B, {K}] y")
    ids = np.array([0, 99, 5])
    assert error(QuantizeWeights(block=16), source, i=ids) < 0.01
    check_untouched(QuantizeWeights(embeddings=False), source)


def two_entries() -> Program:
    one = model("y = MatMul(x, w)")
    ensure_names(one)
    return Program({"prefill": one, "decode": one.clone()}, planish.Target())


def test_entries_share_the_weights():
    program = two_entries()
    apply_pass(QuantizeWeights(), program)
    stored = [{id(v.const_value) for v in m.graph.initializers.values()} for m in program.entries.values()]
    assert stored[0] == stored[1] and len(stored[0]) == 2


def test_one_entry_only():
    program = two_entries()
    apply_pass(QuantizeWeights(entries=("decode",)), program)
    assert [n.op_type for n in program.entry("prefill").graph] == ["MatMul"]
    assert [n.op_type for n in program.entry("decode").graph] == ["MatMulNBits"]


def test_correction_by_calibration_inputs():
    source = model("y = MatMul(x, w)")
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((K, K)) * np.exp(rng.standard_normal(K))
    x = (rng.standard_normal((4, 60, K)) @ mixed).astype("f4")
    program, want = program_of(source), run(program_of(source), x=x)

    def batches(trial: Program, entry: str):
        return [compile_ort(trial.entry(entry), trial.target).run({"x": x})]

    errors = {}
    for method in ("nearest", "gptq"):
        changed = program.clone()
        apply_pass(QuantizeWeights(bits=4, method=method), changed, PassContext(program.target, run=batches))
        got = run(changed, x=x)
        errors[method] = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert errors["gptq"] < 0.8 * errors["nearest"]


@pytest.mark.parametrize("method", ["nearest", "gptq"])
@pytest.mark.parametrize("bits", [4, 8])
def test_float16_on_a_gpu(method, bits):
    """Weights that are float16 by then get scales of float16, by which their codes are rounded."""
    source = model("r = Gather(e, i) p = MatMul(r, w) y = Add(p, b)", "int64[B, S] i", f"float16[B, S, {N}] y", "f2")
    program = program_of(source, "ort-cuda:dtype=float16")
    apply_pass("infer-shapes", program)
    ids = np.random.default_rng(0).integers(0, 100, (2, 30))
    want = source.graph.initializers["e"].const_value.numpy()[ids].astype("f8")
    want = want @ source.graph.initializers["w"].const_value.numpy().astype("f8")
    want = want + source.graph.initializers["b"].const_value.numpy()

    def batches(trial: Program, entry: str):
        found = compile_ort(trial.entry(entry), Target()).run({"i": ids})
        return [found]

    passed = QuantizeWeights(bits=bits, method=method, embeddings=bits == 8)
    apply_pass(passed, program, PassContext(program.target, run=batches))
    node = next(n for n in program.main.graph if n.op_type == "MatMulNBits")
    assert [v.dtype.name for v in node.inputs] == ["FLOAT16", "UINT8", "FLOAT16"]
    assert "accuracy_level" not in node.attributes and node.outputs[0].dtype == ir.DataType.FLOAT16
    got = compile_ort(program.main, Target()).run({"i": ids})["y"].astype("f8")
    assert np.linalg.norm(got - want) < (0.02 if bits == 8 else 0.15) * np.linalg.norm(want)


def test_small_scales_of_float16():
    weight = np.array([[1e-9, -2e-9] * 16, [3e-5, 1e-4] * 16, [0, 0] * 16], "f4")
    blocks = round_to_nearest(weight, 8, 32, half=True)
    assert (blocks.scales.astype("f2").astype("f4") == blocks.scales).all() and (blocks.scales != 0).all()
    assert (np.abs(blocks.weight() - weight) <= 1.2 * np.abs(blocks.scales)).all()  # the last code is one step short


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "dtype", "reason"),
    [
        ("y = MatMul(x, w)", f"float16[B, S, {K}] x", f"float16[B, S, {N}] y", "f2", "its weight is float16"),
        ("y = MatMul(x, small)", f"float[B, {K}] x", "float[B, 4] y", "f4", "384 numbers; what is below 4096"),
        ("y = Gemm<alpha = 2.0>(x, w)", f"float[B, {K}] x", f"float[B, {N}] y", "f4", "transposes or scales its input"),
        ("y = Gemm(x, w, m)", f"float[B, {K}] x", f"float[B, {N}] y", "f4", "not a constant for each output"),
        ("y = MatMul(x, w)", f"float[{K}] x", f"float[{N}] y", "f4", "its input is a vector"),
        ("y = Gather(odd, i)", "int64[B] i", "float[B, 20] y", "f4", "rows have 20 numbers, which blocks of 16 do not"),
    ],
)
def test_declines(body, inputs, outputs, dtype, reason):
    check_declines(QuantizeWeights(), model(body, inputs, outputs, dtype), reason)


def test_nothing_is_quantized_twice():
    program = program_of(model("y = MatMul(x, w)"))
    apply_pass(QuantizeWeights(bits=4), program)
    check_declines(QuantizeWeights(), program, "1 products are quantized already, and nothing is quantized twice")


def test_a_product_of_two_inputs_is_none():
    check_untouched(
        QuantizeWeights(), model("y = MatMul(x, z)", f"float[B, {K}] x, float[{K}, {N}] z", f"float[B, {N}] y")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 2}, "bits is 2; there are 8 and 4"), ({"block": 24}, "block is 24; there are blocks of 16, 32"),
     ({"method": "gpt"}, "Did you mean 'gptq'"), ({"alpha": 1.0}, "alpha is 1; it is a share")],
)  # fmt: skip
def test_options(options, message):
    with pytest.raises(InputError, match=message):
        QuantizeWeights(**options)


def test_gptq_needs_inputs():
    with pytest.raises(PlanishError, match="nothing to run them with"):
        apply_pass(QuantizeWeights(method="gptq"), program_of(model("y = MatMul(x, w)")))


def test_what_a_processor_without_the_instructions_gets_is_in_the_report(monkeypatch):
    source = model("y = MatMul(x, w)")
    said = {}
    for name, features in {"old": {"sse2"}, "avx2": {"avx2"}, "vnni": {"avx2", "avx512_vnni"}}.items():
        monkeypatch.setattr(processor, "features", lambda found=frozenset(features): found)
        exe = planish.optimize(source, approximate="quantize-weights", budget=planish.Budget(gates=False))
        said[name] = exe.report.ledger["quantize-weights"].fired, " ".join(exe.report.remarks())
    assert said["old"][0] == 0 and "lacks avx2 (or asimddp)" in said["old"][1] and "float32 stays" in said["old"][1]
    assert said["avx2"][0] == 1 and "codes are multiplied by AVX2" in said["avx2"][1]
    assert said["vnni"][0] == 1 and "instructions" not in said["vnni"][1]
