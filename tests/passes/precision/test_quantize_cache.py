"""quantize-cache: steps over caches in fewer bits against arithmetic on rounded caches, and what is refused."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import planish  # noqa: E402
from planish.driver import optimize  # noqa: E402
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PREFILL, cache_layer, scale_name  # noqa: E402
from planish.ir.errors import InputError, UnsupportedError  # noqa: E402
from planish.ir.graphs import constant_array  # noqa: E402
from planish.ir.ops.cache_attention import quantize  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.passes.base import PassContext, PassResult  # noqa: E402
from planish.passes.defaults import RECOGNIZE  # noqa: E402
from planish.passes.manager import PassError  # noqa: E402
from planish.passes.precision.cache_scales import Ranges, partners  # noqa: E402
from planish.passes.precision.quantize_cache import QuantizeCache  # noqa: E402
from planish.passes.testing import apply_pass  # noqa: E402
from planish.runtime.artifact import verify_artifact  # noqa: E402
from planish.runtime.bench import Bench  # noqa: E402
from planish.runtime.compile import compile_entry  # noqa: E402
from planish.runtime.executable import Executable  # noqa: E402
from tests.causal_models import causal_model, prompts  # noqa: E402

GATELESS = planish.Budget(gates=False)
EXAMPLE = np.random.default_rng(7).integers(3, 90, (2, 29))
#: Options → bytes of a token, relative to float32, of heads of 8.
FORMS = {"scales='token'": 0.375, "scales='channel'": 0.25, "scales='head'": 0.25, "format='float16'": 0.5}
#: Relative L2 that the logits of a step may lose; weights of these models are large, and softmax steep.
LOST = {"scales='token'": 0.05, "scales='channel'": 0.15, "scales='head'": 0.15, "format='float16'": 2e-3}


@functools.cache
def _recognized(name: str, target: str = "ort-cpu:threads=1") -> Program:
    program = optimize(
        causal_model(name),
        target,
        task="causal-lm",
        example_inputs={IDS: EXAMPLE, "attention_mask": np.arange(29) >= np.array([[0], [9]])},
        passes=",".join(RECOGNIZE),
        budget=GATELESS,
    ).program
    assert program is not None
    return program


def quantized(options: str, name: str = "Llama", program: Program | None = None) -> tuple[Executable, PassResult]:
    program = (program or _recognized(name)).clone()
    bench = Bench(program.target, program.calibration)
    result = apply_pass(f"quantize-cache{{{options}}}", program, PassContext(program.target, run=bench.run_entry))
    runners = {entry: compile_entry(program, entry, program.target) for entry in program.entries}
    return Executable(program, runners), result


@functools.cache
def plain(name: str) -> Executable:
    program = _recognized(name)
    return Executable(program, {entry: compile_entry(program, entry, program.target) for entry in program.entries})


def steps(exe: Executable, ids: np.ndarray, mask: np.ndarray, follow: np.ndarray) -> np.ndarray:
    """Logits of steps that read `follow`, (batch, steps), one token after the other, with copies of the caches."""
    lengths = mask.sum(1)
    packed = np.zeros_like(ids)
    for row, (values, seen) in enumerate(zip(ids, mask, strict=True)):
        packed[row, : seen.sum()] = values[seen == 1]
    found = exe.run({IDS: packed, LENGTHS: lengths}, PREFILL)
    caches = {}
    for name, value in found.items():
        if cache_layer(name) is not None:
            room = np.zeros((*value.shape[:2], follow.shape[1], value.shape[3]), value.dtype)
            caches[name.replace("present_", "past_", 1)] = np.concatenate([value, room], axis=2)
    logits = []
    for step in range(follow.shape[1]):
        found = exe.run({IDS: follow[:, step : step + 1], LENGTHS: lengths + step, **caches}, DECODE)
        logits.append(found.pop(LOGITS))
        caches = {name.replace("present_", "past_", 1): value for name, value in found.items()}
    return np.stack(logits, 1)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mistral"])
@pytest.mark.parametrize("options", FORMS)
def test_steps_over_a_rounded_cache(options: str, name: str) -> None:
    """Mistral has a window that the prompts exceed."""
    ids, mask = prompts(3, 17)
    follow = np.random.default_rng(1).integers(3, 90, (3, 4))
    exe, result = quantized(options, name)
    assert result.fired == 2 and not result.declined
    want, got = steps(plain(name), ids, mask, follow), steps(exe, ids, mask, follow)
    lost = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < lost < LOST[options]
    assert f"({FORMS[options]:.3f})" in result.notes[0], result.notes


def test_steps_are_what_the_codes_say() -> None:
    """Stepwise against float32 steps over caches that are rounded and restored after each of them."""
    ids, mask = prompts(2, 12)
    follow = np.random.default_rng(2).integers(3, 90, (2, 5))
    exe, _ = quantized("scales='token'")
    got = steps(exe, ids, mask, follow)
    graph = exe.program.entry(DECODE).graph  # type: ignore[union-attr]
    by = {cache_layer(n.inputs[3].name): constant_array(n.inputs[8]) for n in graph if n.op_type == "CacheAttention"}

    class Rounded:
        """`plain`, whose caches lose what codes lose."""

        def run(self, feeds: dict[str, np.ndarray], entry: str) -> dict[str, np.ndarray]:
            found = plain("Llama").run(feeds, entry)
            return {name: self.rounded(name, value) for name, value in found.items()}

        def rounded(self, name: str, value: np.ndarray) -> np.ndarray:
            if cache_layer(name) is None:
                return value
            channels: Any = by[cache_layer(name)] if name.endswith("key") else np.ones(value.shape[1::2], "f4")
            codes, scales = quantize(value, channels)
            return np.asarray(codes * scales * channels[:, None], np.float32)

    want = steps(Rounded(), ids, mask, follow)  # type: ignore[arg-type]
    # The last token is not rounded yet when a plain step attends to it.
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.02


@pytest.mark.parametrize("options", FORMS)
def test_generate_equals_steps(options: str) -> None:
    """In place, with room to spare, and rows of mixed lengths."""
    exe, _ = quantized(options)
    ids, mask = prompts(3, 11)
    tokens = exe.generate(ids, 9, attention_mask=mask)
    logits = steps(exe, ids, mask, tokens[:, 11:-1])
    np.testing.assert_array_equal(logits.argmax(-1), tokens[:, 12:])


@pytest.mark.parametrize("options", ["", "format='float16'"])
def test_kernels_export_and_load(options: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    program = _recognized("Llama", "ort-cpu:kernels,threads=1")
    try:
        exe, _ = quantized(options, program=program)
    except UnsupportedError as error:
        pytest.skip(str(error))
    name = "CacheAttention" + "Float16" * bool(options)
    assert sum(node.op_type == name for node in program_nodes(exe)) == 2
    ids, mask = prompts(2, 11)
    tokens = exe.generate(ids, 9, attention_mask=mask)
    # The operators' functions say the same.
    body, _ = quantized(options or "scales='token'")
    np.testing.assert_array_equal(body.generate(ids, 9, attention_mask=mask), tokens)
    exe.export(tmp_path / "lm")
    again = planish.load(tmp_path / "lm", allow_native=True)
    np.testing.assert_array_equal(again.generate(ids, 9, attention_mask=mask), tokens)
    code = (
        "import sys, numpy as np, planish; exe = planish.load(sys.argv[1], allow_native=True); "
        "exe.generate(np.array([[5, 6]]), 3); assert not {'torch', 'tvm', 'planish.passes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lm")], check=True)


def program_nodes(exe: Executable) -> list[ir.Node]:
    assert exe.program is not None
    return [node for model in exe.program.entries.values() for node in model.graph]


def test_golden_data_holds_caches_in_the_new_form(tmp_path: Path) -> None:
    exe, _ = quantized("scales='token'")
    exe.export(tmp_path / "lm")
    result = verify_artifact(tmp_path / "lm")
    assert result.ok and [entry for entry, _ in result.golden] == [PREFILL, DECODE], result


def test_gates_keep_what_saves_memory() -> None:
    """Where a step costs no more than allowed; the ledger says what is saved, and the error is that of the logits."""
    exe = planish.optimize(
        causal_model("GPT-2"),
        "ort-cpu:threads=1",
        task="causal-lm",
        example_inputs=EXAMPLE,
        approximate="quantize-cache{format='float16'}",
        budget=planish.Budget(error=0.05, seconds=4, min_gain=0.3),  # a step of so small a model may be slower
    )
    entry = exe.report.ledger["quantize-cache{format='float16'}"]
    assert entry.kept and entry.fired == 2, entry.verdict
    assert entry.notes == ["caches of 2 layers in float16: 512 bytes a token before, 256 after (0.500)"]
    assert entry.by_entry[DECODE].error is not None and entry.by_entry[DECODE].error.relative_l2 < 0.01


def test_some_layers_only() -> None:
    exe, result = quantized("layers=[1]")
    assert result.fired == 1
    kinds = {spec.name: spec.dtype for spec in exe.program.inputs(DECODE)}  # type: ignore[union-attr]
    assert kinds["past_0_key"] == ir.DataType.FLOAT and kinds["past_1_key"] == ir.DataType.INT8
    assert exe.generate(EXAMPLE[:1], 3).shape == (1, 32)


def test_nothing_is_quantized_twice() -> None:
    program = _recognized("Llama").clone()
    apply_pass("quantize-cache{scales='token'}", program)
    result = apply_pass("quantize-cache{format='float16'}", program)
    assert not result.modified and result.notes == ["its cache is int8 already"]


def test_a_cache_that_lets_go_is_left_alone() -> None:
    program = _recognized("Llama").clone()
    apply_pass("shard-attention{pattern='sliding-window',block=4,local=2,evict=True}", program)
    result = apply_pass("quantize-cache{scales='token'}", program)
    assert not result.fired and "in an order of its own" in result.declined[0].reason


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        (ir.AttrFloat32("softcap", 30.0), "its scores are capped"),
        (ir.AttrInt64("do_rotary", 1), "its step does more than attend"),
    ],
)
def test_steps_without_a_form(attribute: ir.Attr, reason: str) -> None:
    program = _recognized("Llama").clone()
    for node in program.entry(DECODE).graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes.add(attribute)
    result = apply_pass("quantize-cache", program)
    assert not result.modified and len(result.declined) == 2 and reason in result.declined[0].reason


def test_models_without_a_cache() -> None:
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[b, 4] x) => (float[b, 4] y) { y = Relu(x) }'
    exe = planish.optimize(ir.from_onnx_text(text), approximate="quantize-cache", budget=GATELESS)
    assert exe.report.ledger["quantize-cache"].declined[0].reason.startswith("there is no cache that a step writes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4"}, "int4"),
        ({"scales": "row"}, "row"),
        ({"format": "float16", "scales": "head"}, "float16 has none"),
        ({"margin": 0.5}, "margin is 0.5"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizeCache(**options)


def test_wrong_use() -> None:
    with pytest.raises(PassError, match="layers names layer 7; there are caches of 0, 1"):
        apply_pass("quantize-cache{layers=[7]}", _recognized("Llama").clone())
    with pytest.raises(PassError, match="fixed by calibration inputs, and there is nothing to run"):
        apply_pass("quantize-cache{scales='head'}", _recognized("Llama").clone())


def test_ranges() -> None:
    ranges = Ranges(np.array([[1, 3, 0]], "f4"), np.array([[2, 9, 0]], "f4"))
    channels = ranges.channels()
    assert np.square(channels).mean() == pytest.approx(1, abs=1e-5)
    assert channels[0, 1] / channels[0, 0] == pytest.approx(3**0.5)
    assert channels[0, 2] > 0.2
    np.testing.assert_allclose(ranges.scales(1.0, False)[0, 0, 0] * 127, [2, 9, 2], rtol=1e-6)
    np.testing.assert_allclose(ranges.scales(2.0, True)[0, 0, 0] * 127, 18, rtol=1e-6)
    nothing = Ranges(np.zeros((1, 2), "f4"), np.zeros((1, 2), "f4"))
    assert (nothing.channels() == 1).all() and (nothing.scales(1.0, False) > 0).all()


@pytest.mark.parametrize(("name", "want"), [("Llama", [4, 5, 6, 7, 0, 1, 2, 3]), ("GPT-2", list(range(8)))])
def test_rotary_partners(name: str, want: list[int]) -> None:
    graph = _recognized(name).entry(DECODE).graph
    node = next(node for node in graph if node.op_type == "GroupQueryAttention")
    assert node.inputs[1] is not None
    found = partners(node.inputs[1], 8)
    assert found is not None and found.tolist() == want


def test_names_of_scales() -> None:
    assert scale_name("past_3_key") == "past_3_key_scale" and cache_layer("past_3_key_scale") == 3
