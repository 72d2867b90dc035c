from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.ir import processor
from planish.ir.errors import InputError, PlanishError
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.precision.quantize import Quantize
from planish.passes.testing import apply_pass, check_declines, check_untouched, program_of
from planish.runtime.ort import compile_ort

K, N = 96, 64
SIZES = {
    "w": (K, N), "v": (K, N), "t": (N, K), "b": (N,), "e": (100, K), "small": (K, 4), "m": (1, N),
    "f": (8, 3, 3, 3), "fb": (8,), "g": (8, 8, 3, 3), "gb": (8,),
}  # fmt: skip
IMAGE = "float[B, 3, 17, 19] x"


def model(body: str, inputs: str = f"float[B, S, {K}] x", outputs: str = f"float[B, S, {N}] y", dtype="f4") -> ir.Model:
    rng, used = np.random.default_rng(1), re.findall(r"\w+", body)
    weights = [ir.tensor(rng.standard_normal(SIZES[n]).astype(dtype), name=n) for n in SIZES if n in used]
    text = f"""<ir_version: 10, opset_import: ["" : 23]> g ({inputs}) => ({outputs}) {{ {body} }}"""
    return ir.from_onnx_text(text, initializers=weights)


def run(program: Program, **feeds: np.ndarray) -> np.ndarray:
    entry = program.default_entry
    return next(iter(compile_ort(program.entry(entry), program.target).run(feeds).values()))


def context(program: Program, **feeds: np.ndarray) -> PassContext:
    def batches(trial: Program, entry: str):
        return [compile_ort(trial.entry(entry), trial.target).run(feeds)]

    return PassContext(program.target, run=batches)


def error(passed: Quantize, source: ir.Model | Program, **feeds: np.ndarray) -> float:
    program = program_of(source)
    want = run(program, **feeds)
    apply_pass(passed, program, context(program, **feeds))
    return float(np.linalg.norm(run(program, **feeds) - want) / np.linalg.norm(want))


def ops(program: Program) -> list[str]:
    return [node.op_type for node in program.entry(program.default_entry).graph]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("f4")


def test_products_of_one_input_measure_it_once():
    program = program_of(model("a = MatMul(x, w) c = MatMul(x, v) y = Add(a, c)"))
    result = apply_pass(Quantize(), program)
    product = ["MatMulInteger", "Cast", "Mul", "Mul"]
    assert result.fired == 2 and ops(program) == ["DynamicQuantizeLinear", *product, *product, "Add"]
    assert set(program.entry(program.default_entry).graph.initializers) == {
        "w_codes",
        "w_scales",
        "v_codes",
        "v_scales",
    }


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("body", "rank"),
    [("y = MatMul(x, w)", 3), ("y = Gemm<transB = 1>(x, t, b)", 2), ("y = Gemm(x, w, b)", 2),
     ("u = Transpose<perm = [1, 0]>(t) y = MatMul(x, u)", 3)],
)  # fmt: skip
def test_every_form_of_a_product(body, rank, mode):
    dims = "B, S" if rank == 3 else "B"
    source = model(body, f"float[{dims}, {K}] x", f"float[{dims}, {N}] y")
    assert 1e-4 < error(Quantize(mode=mode), source, x=normal(2, 5, K)[-1 if rank == 2 else slice(None)]) < 0.02


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_head_that_is_the_embedding_is_stored_once(mode):
    source = program_of(
        model(
            "x = Gather(e, i) h = Relu(x) u = Transpose<perm = [1, 0]>(e) y = MatMul(h, u)",
            "int64[B, S] i",
            "float[B, S, 100] y",
        )
    )
    apply_pass("infer-shapes", source)
    ids = np.array([[0, 99, 5], [7, 7, 1]])
    assert error(Quantize(mode=mode), source, i=ids) < 0.02
    program = source.clone()
    apply_pass(Quantize(mode=mode), program, context(program, i=ids))
    stored = [v for v in program.entry(program.default_entry).graph.initializers.values() if v.const_value.size >= 9600]
    assert [v.const_value.dtype for v in stored] == [ir.DataType.INT8]


BLOCK = (
    "c = Conv<pads = [1, 1, 1, 1]>(x, f, fb) r = Relu(c) d = Conv<pads = [1, 1, 1, 1]>(r, g, gb) s = Add(d, r) "
    "z = Relu(s) p = MaxPool<kernel_shape = [2, 2]>(z) y = GlobalAveragePool(p)"
)


def test_convolutions_with_sums_and_pools_between():
    source = model(BLOCK, IMAGE, "float[B, 8, 1, 1] y")
    program = program_of(source)
    result = apply_pass(Quantize(mode="static"), program, context(program, x=normal(2, 3, 17, 19)))
    assert result.fired == 2
    graph = program.entry(program.default_entry).graph
    pairs = {node.inputs[0].name for node in graph if node.op_type == "QuantizeLinear"}
    assert pairs == {"x", "r", "d", "z", "p", "y"}
    zero = {n.inputs[0].name: n.inputs[2].const_value.numpy() for n in graph if n.op_type == "QuantizeLinear"}
    scale = {n.inputs[0].name: n.inputs[1].const_value.numpy() for n in graph if n.op_type == "QuantizeLinear"}
    assert zero["r"] == zero["z"] == 0 and scale["p"] == scale["z"]
    assert error(Quantize(mode="static"), source, x=normal(2, 3, 17, 19)) < 0.03


def test_onnxruntime_makes_integer_kernels_of_them(tmp_path):
    import onnxruntime as ort

    program = program_of(model(BLOCK, IMAGE, "float[B, 8, 1, 1] y"))
    apply_pass(Quantize(mode="static"), program, context(program, x=normal(2, 3, 17, 19)))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(program.entry(program.default_entry)).SerializeToString(), options)
    found = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert found.count("QLinearConv") == 2 and found.count("QLinearAdd") == 1
    assert not {"Conv", "Add", "Relu"} & set(found) and any(op.endswith("MaxPool") for op in found)


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse"])
def test_methods_of_static_ranges(method):
    assert error(Quantize(mode="static", method=method), model("y = MatMul(x, w)"), x=normal(4, 60, K)) < 0.03


def test_without_instructions_for_it_weights_keep_seven_bits(monkeypatch):
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2"}))
    program = program_of(model("y = MatMul(x, w)"))
    result = apply_pass(Quantize(), program)
    codes = program.entry(program.default_entry).graph.initializers["w_codes"].const_value.numpy()
    assert np.abs(codes).max() == 63 and "weights keep 7 bits" in result.notes[0]
    assert error(Quantize(), model("y = MatMul(x, w)"), x=normal(2, 5, K)) < 0.03


def test_the_report_says_that_weights_keep_seven_bits(monkeypatch):
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2", "fma"}))
    exe = planish.optimize(model("y = MatMul(x, w)"), approximate="quantize", budget=planish.Budget(gates=False))
    assert any("weights keep 7 bits" in text for text in exe.report.remarks())


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "dtype", "reason"),
    [
        ("y = MatMul(x, w)", f"float16[B, S, {K}] x", f"float16[B, S, {N}] y", "f2", "its weight is float16"),
        ("y = MatMul(x, small)", f"float[B, {K}] x", "float[B, 4] y", "f4", "384 numbers; what is below 4096"),
        ("y = Gemm<transA = 1>(x, w)", f"float[{K}, B] x", f"float[B, {N}] y", "f4", "transposes or scales its input"),
        ("y = Gemm(x, w, m)", f"float[B, {K}] x", f"float[B, {N}] y", "f4", "not a constant for each output"),
    ],
)
def test_declines(body, inputs, outputs, dtype, reason):
    check_declines(Quantize(), model(body, inputs, outputs, dtype), reason)


def test_nothing_is_quantized_twice():
    program = program_of(model("y = MatMul(x, w)"))
    apply_pass(Quantize(), program)
    check_declines(Quantize(), program, "1 operators are quantized already, and nothing is quantized twice")


def test_excluded_nodes_and_convolutions_in_dynamic_mode_stay():
    source = program_of(model(BLOCK, IMAGE, "float[B, 8, 1, 1] y"))
    check_untouched(Quantize(), source)
    named = program_of(model("y = MatMul(x, w)"))
    name = named.entry(named.default_entry).graph[0].name
    check_untouched(Quantize(exclude=(name,)), named)


def test_calibration_that_is_not_finite():
    program = program_of(model("y = MatMul(x, w)"))
    bad = normal(2, 5, K)
    bad[0, 0, 0] = np.nan
    with pytest.raises(PlanishError, match="the calibration inputs make 'x' infinite or not a number"):
        apply_pass(Quantize(mode="static"), program, context(program, x=bad))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "statick"}, "Did you mean 'static'"), ({"method": "kl"}, "unknown method 'kl'"),
     ({"percentile": 50}, "percentile is 50; it is a share in percent")],
)  # fmt: skip
def test_options(options, message):
    with pytest.raises(InputError, match=message):
        Quantize(**options)


def test_static_ranges_need_inputs():
    with pytest.raises(PlanishError, match="nothing to run them with"):
        apply_pass(Quantize(mode="static"), program_of(model("y = MatMul(x, w)")))
