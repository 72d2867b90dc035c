"""bf16: what it changes, what it declines, and what comes out where the processor lacks what it takes."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.ir import processor
from planish.ir.infer import infer_shapes
from planish.ir.ops import DIALECT, import_functions
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import PassContext, PassResult
from planish.passes.precision.bf16 import Bf16
from planish.runtime import ort_artifact
from planish.runtime.ort import compile_ort

TARGET = Target.parse("ort-cpu:threads=1,kernels")
WIDTH, HIDDEN, WORDS = 32, 48, 100
#: Attention, a feed-forward network, and an embedding that is the head.
BODY = """
  e = Gather(table, ids)
  q = planish.Linear(e, wq, bq)
  a = planish.FlashAttention<q_num_heads = 2, kv_num_heads = 2, scale = 0.25, is_causal = 1>(q, q, q)
  o = planish.LinearAdd(a, wo, bo, e)
  h = planish.LinearGelu(o, w1, b1)
  r = planish.LinearAdd(h, w2, b2, o)
  t = Transpose<perm = [1, 0]>(table)
  y = MatMul(r, t)
"""
SHAPES = {
    "table": (WORDS, WIDTH),
    **{f"w{n}": (WIDTH, WIDTH) for n in "qo"},
    **{f"b{n}": (WIDTH,) for n in "qo2"},
    "w1": (WIDTH, HIDDEN),
    "b1": (HIDDEN,),
    "w2": (HIDDEN, WIDTH),
}


def program_of(body: str = BODY, output: str = f"float[batch, n, {WORDS}] y", target: Target = TARGET) -> Program:
    rng = np.random.default_rng(5)
    weights = [
        ir.tensor((rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32), name=name)
        for name, shape in SHAPES.items()
        if name in body
    ]
    text = (
        f'<ir_version: 10, opset_import: ["" : 23, "planish" : 1]> g (int64[batch, n] ids) => ({output}) {{ {body} }}'
    )
    made = Program.single(ir.from_onnx_text(text, initializers=weights), target)
    for number, node in enumerate(made.main.graph):
        node.name = f"node_{number}"
    import_functions(made.main)
    infer_shapes(made.main)
    return made


def applied(program: Program, **options: bool) -> PassResult:
    return Bf16(**options).apply(program, PassContext(program.target))


def ops(program: Program) -> list[str]:
    return [node.op_type for node in program.main.graph]


def ids(batch: int = 2, length: int = 19) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng().integers(0, WORDS, (batch, length))}


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has it, wherever this runs: what is compiled is another question."""
    monkeypatch.setattr(processor, "features", lambda: processor.AMX_BF16)


def require_kernels() -> None:
    from planish.runtime.kernels.cpu import detect, permit_tiles

    if importlib.util.find_spec("tvm") is None or detect("amx") is None or not permit_tiles():
        pytest.skip("needs TVM, and a processor with AMX")


@pytest.mark.usefixtures("amx")
def test_everything_with_a_kernel_changes() -> None:
    program = program_of()
    result = applied(program)
    assert result.modified and not result.declined and result.fired == 6
    assert ops(program) == [
        "Gather",
        "Linear",
        "FlashAttentionBf16",
        "LinearAdd",
        "FeedForwardGelu",
        "LinearTransposed",
    ]
    again = applied(program)
    assert not again.modified and not again.fired


@pytest.mark.usefixtures("amx")
def test_weights_are_stored_rounded_but_for_the_embedding() -> None:
    program = program_of()
    before = {name: value.const_value for name, value in program.main.graph.initializers.items()}
    applied(program)
    kept = program.main.graph.initializers
    assert kept["table"].dtype == ir.DataType.FLOAT and kept["table"].const_value is before["table"]
    rounded = {n: v.const_value for n, v in kept.items() if v.dtype == ir.DataType.BFLOAT16}
    assert sorted(rounded) == ["w1_bf16", "w2_bf16", "wo_bf16", "wq_bf16"]
    for name, tensor in rounded.items():
        assert tensor is not None
        exact = before[name.removesuffix("_bf16")]
        assert exact is not None
        step = np.abs(tensor.numpy().astype(np.float32) - exact.numpy())
        assert step.max() > 0 and np.all(step <= 2.0**-8 * np.abs(exact.numpy()))


@pytest.mark.usefixtures("amx")
def test_entries_go_on_sharing_weights() -> None:
    program = program_of()
    program.entries["again"] = program.main.clone()
    for name, value in program.entries["again"].graph.initializers.items():
        value.const_value = program.main.graph.initializers[name].const_value
    applied(program)
    weights = program.weights  # raises where two tensors have one name
    assert sum(t.dtype == ir.DataType.BFLOAT16 for t in weights.values()) == 4


@pytest.mark.usefixtures("amx")
def test_what_something_else_reads_stays() -> None:
    outputs = f"float[batch, n, {WORDS}] y, float[batch, n, {HIDDEN}] z, float[{WIDTH}, {HIDDEN}] s"
    program = program_of(BODY + " z = Relu(h)  s = Add(w1, w1)", outputs)
    applied(program)
    assert "FeedForwardGelu" not in ops(program) and "LinearGelu" in ops(program)
    used = next(node for node in program.main.graph if node.op_type == "LinearGelu")
    assert used.attributes.get_int("compute_type", 1) == 16
    assert used.inputs[1] is not None and used.inputs[1].name == "w1"
    assert {"w2_bf16", "w1"} <= set(program.main.graph.initializers)


@pytest.mark.usefixtures("amx")
def test_options() -> None:
    program = program_of()
    applied(program, attention=False, head=False)
    assert "FlashAttention" in ops(program) and "MatMul" in ops(program)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("target", ["ort-cpu", "tvm-cpu"])
def test_targets_without_kernels_are_declined(target: str) -> None:
    program = program_of(target=Target.parse(target))
    result = applied(program)
    assert not result.modified and "has no products in bfloat16; 'ort-cpu:kernels' has" in result.declined[0].reason


def test_a_processor_without_amx_keeps_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2", "avx512_bf16"}))
    program = program_of()
    result = applied(program)
    assert not result.modified and "FlashAttention" in ops(program)
    assert result.notes == [
        "this processor lacks amx_bf16, amx_tile, without which bfloat16 is no faster: float32 stays"
    ]


def test_the_report_says_why_nothing_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    found = processor.features() - processor.AMX_BF16
    monkeypatch.setattr(processor, "features", lambda: found)
    exe = planish.optimize(
        program_of().main, "ort-cpu:threads=1,kernels", passes="bf16", budget=planish.Budget(gates=False)
    )
    assert any("this processor lacks amx_bf16" in text for text in exe.report.remarks())


def test_numbers() -> None:
    """The kernels, the bodies and the program before: as far apart as bfloat16 is, and no further."""
    require_kernels()
    program = program_of()
    exact = compile_ort(program.main, Target.parse("ort-cpu"))
    applied(program)
    body, kernel = (compile_ort(program.main, t) for t in (Target.parse("ort-cpu"), TARGET))
    for shape in ((1, 1), (3, 33)):
        feeds = ids(*shape)
        want, plain, fast = (runner.run(feeds)["y"] for runner in (exact, body, kernel))
        scale = np.linalg.norm(want)
        assert np.linalg.norm(fast - plain) < 3e-3 * scale
        assert 1e-4 * scale < np.linalg.norm(fast - want) < 1.5e-2 * scale


def test_an_artifact_where_amx_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what the processor lacks, and runs the bodies: the numbers of bfloat16 all the same."""
    require_kernels()
    exe = planish.optimize(
        program_of().main, "ort-cpu:threads=1,kernels", passes="bf16", budget=planish.Budget(gates=False)
    )
    exe.export(tmp_path / "artifact")
    feeds = ids()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = planish.load(tmp_path / "artifact", allow_native=True).run(feeds)["y"]
    monkeypatch.setattr(ort_artifact, "missing", lambda needed: sorted(set(needed) & {"amx_bf16", "amx_tile"}))
    with pytest.warns(RuntimeWarning, match="amx_bf16, amx_tile"):
        slow = planish.load(tmp_path / "artifact", allow_native=True).run(feeds)["y"]
    assert 0 < np.linalg.norm(slow - fast) < 3e-3 * np.linalg.norm(fast)


def test_artifacts_hold_half_of_the_weights(tmp_path: Path) -> None:
    require_kernels()
    size = {}
    for passes in ("eliminate-dead-code", "bf16"):
        program = program_of()
        exe = planish.optimize(
            program.main, "ort-cpu:threads=1,kernels", passes=passes, budget=planish.Budget(gates=False)
        )
        size[passes] = exe.program.weight_bytes()
    table = 4 * WORDS * WIDTH
    matrices = 4 * (2 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    saved = size["eliminate-dead-code"] - size["bf16"]
    # The head's own bias of zeros comes on top.
    assert size["bf16"] >= table and saved == matrices // 2 - 4 * WORDS


def test_it_is_approximate_and_known_by_name() -> None:
    from planish.passes.pipeline import format_pipeline, parse_pipeline

    (found,) = parse_pipeline("bf16{attention=False}")
    assert found == Bf16(attention=False) and found.kind == "approximate" and Bf16.gives_up
    assert format_pipeline([found]) == "bf16{attention=False}" and "FlashAttentionBf16" in DIALECT
