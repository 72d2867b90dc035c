"""How many operators each architecture must end up with; a change that loses one fails here.

The exports are captured by the torch and transformers that are installed, so a new version of either is seen too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.compare import compare_outputs, tolerance
from planish.ir.printer import op_counts
from planish.ir.program import Program
from planish.passes.defaults import default_pipeline
from planish.passes.testing import apply_pass, check_numerics, program_of, run_reference
from tests.passes.fusion import old_exports
from tests.passes.fusion.exporting import Decoder, Flat, decoder_example, with_attention

# What comes after recognition may write one attention as several.
PIPELINE = default_pipeline("ort-cpu").split(",lower-")[0]
_WATCHED = (
    "Attention", "Softmax", "LayerNormalization", "RMSNormalization", "Gelu", "planish::SwiGLU", "Erf", "Tanh",
    "Transpose", "Expand", "RotaryEmbedding", "Gemm", "Split", "com.microsoft::MultiHeadAttention",
)  # fmt: skip

OLD: dict[str, tuple[ir.Model, dict[str, int], list[str]]] = {
    "BERT, -10000": (
        old_exports.bert(),
        {"Attention": 2, "LayerNormalization": 4, "Gelu": 2, "Expand": 1},
        ["attention_mask"],
    ),
    "BERT, lowest": (
        old_exports.bert(masking="-3.4028234663852886e38"),
        {"Attention": 2, "LayerNormalization": 4, "Gelu": 2, "Expand": 1},
        ["attention_mask"],
    ),
    "GPT-2, -10000": (old_exports.gpt2(), {"Attention": 2, "LayerNormalization": 4, "Gelu": 2}, []),
    "GPT-2, lowest": (
        old_exports.gpt2(fill="-3.4028234663852886e38"),
        {"Attention": 2, "LayerNormalization": 4, "Gelu": 2},
        [],
    ),
    "GPT-2, lowest, padding": (
        old_exports.gpt2(fill="-3.4028234663852886e38", padding="-3.4028234663852886e38"),
        {"Attention": 0, "com.microsoft::MultiHeadAttention": 2, "LayerNormalization": 4, "Gelu": 2},
        ["attention_mask"],
    ),
    "GPT-2, lowest, padding of -10000": (
        old_exports.gpt2(fill="-3.4028234663852886e38", padding="-10000.0"),
        {"Attention": 2, "LayerNormalization": 4, "Gelu": 2},
        ["attention_mask"],
    ),
    "DistilBERT": (old_exports.distilbert(), {"Attention": 2, "LayerNormalization": 4, "Gelu": 2}, ["attention_mask"]),
    "ViT": (old_exports.vit(), {"Attention": 2, "LayerNormalization": 4, "Gelu": 2}, []),
}


@pytest.mark.parametrize("name", OLD)
def test_torchscript_graphs(name: str) -> None:
    model, expected, masks = OLD[name]
    sizes = [(1, 5), (3, 5)] if name == "ViT" else [(1, 1), (1, 5), (3, 8)]
    rng = np.random.default_rng(1)
    original = program_of(model)
    program = original.clone()
    assert apply_pass(PIPELINE, program).modified
    counts = watched(program)
    assert {k: counts.get(k, 0) for k in expected} == expected
    assert not {"Softmax", "Erf", "Tanh"} & set(counts)
    assert "Transpose" not in beside_attention(program)
    for batch, length in sizes:
        inputs: dict[str, Any] = {"x": rng.standard_normal((batch, length, 16), dtype=np.float32)}
        for mask in masks:
            inputs[mask] = np.ones((batch, length), np.int64)
            inputs[mask][-1, length // 2 :] = 0
        want = run_reference(original, inputs)
        assert compare_outputs(want, run_reference(program, inputs)).relative_l2 <= tolerance(want)


def watched(program: Program) -> dict[str, int]:
    return {name: count for name, count in op_counts(program).items() if name in _WATCHED}


def beside_attention(program: Program) -> set[str]:
    """Operators that Attention reads from or is read by."""
    nodes = [n for n in program.main.graph if n.op_type in ("Attention", "MultiHeadAttention")]
    before = [v.producer() for n in nodes for v in n.inputs if v is not None]
    after = [user for n in nodes for v in n.outputs for user in v.consumers()]
    return {n.op_type for n in (*before, *after) if n is not None}


_TEXT = {"Attention": 2, "LayerNormalization": 5, "Gelu": 2}
# MiniLM is a BERT of six layers; lowering/test_coverage.py counts its operators.
_LLAMA = {"Attention": 2, "RMSNormalization": 5, "planish::SwiGLU": 2, "RotaryEmbedding": 4}
EXPORTED: dict[str, dict[str, int]] = {
    "BERT": _TEXT,
    "DistilBERT": _TEXT,
    "RoBERTa": _TEXT,
    "ALBERT": _TEXT,
    "GPT-2": {**_TEXT, "Gemm": 0, "Split": 0},
    "Llama": _LLAMA,
    "Qwen2": _LLAMA,
    "T5 encoder": {"Attention": 2, "RMSNormalization": 5},
    "ViT": _TEXT,
    "DeiT": _TEXT,
    "CLIP text": {"Attention": 2, "LayerNormalization": 5},
    "CLIP vision": {"Attention": 2, "LayerNormalization": 6},
    "Whisper encoder": {"Attention": 2, "LayerNormalization": 5, "Gelu": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_architectures(name: str, attention: str) -> None:
    pytest.importorskip("transformers")
    from planish.frontends.torch import capture
    from tests.architectures import ARCHITECTURES

    architecture = ARCHITECTURES[name]
    module = with_attention(architecture.build(True), attention)
    program = capture(module, architecture.example(module), architecture.dynamic_shapes, "ort-cpu").program
    apply_pass(PIPELINE, program)
    counts = watched(program)
    assert {k: counts.get(k, 0) for k in EXPORTED[name]} == EXPORTED[name]
    assert "Transpose" not in beside_attention(program)
    assert "Softmax" not in counts and "Erf" not in counts


TORCHSCRIPT: dict[str, tuple[int, int]] = {"BERT": (2, 5), "ViT": (2, 5), "GPT-2": (2, 5)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("opset", [11, 14, 17])
@pytest.mark.parametrize("name", TORCHSCRIPT)
def test_files_of_the_old_exporter(name: str, opset: int, attention: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from planish.frontends.onnx import load_onnx
    from tests.architectures import ARCHITECTURES

    if opset < 14 and (attention == "sdpa" or name == "GPT-2"):
        pytest.skip("the exporter has this from opset 14 on")
    architecture = ARCHITECTURES[name]
    module = with_attention(architecture.build(True), attention)
    examples = architecture.example(module)
    path = tmp_path / "old.onnx"
    torch.onnx.export(
        Flat(module, list(examples)), tuple(examples.values()), path, dynamo=False, opset_version=opset,
        input_names=list(examples), dynamic_axes=architecture.dynamic_shapes,
    )  # fmt: skip
    other = {k: v.numpy() for k, v in architecture.other(module).items()}
    program = check_numerics(PIPELINE, load_onnx(path, "ort-cpu"), other)
    counts = watched(program)
    assert (counts["Attention"], counts["LayerNormalization"]) == TORCHSCRIPT[name]
    assert "Softmax" not in counts and "Erf" not in counts
    assert "Transpose" not in beside_attention(program)


@pytest.mark.slow
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_decoding_with_a_cache(name: str, attention: str, new: int) -> None:
    pytest.importorskip("transformers")
    from planish.frontends.torch import capture
    from tests.architectures import ARCHITECTURES

    module = with_attention(ARCHITECTURES[name].build(True), attention)
    shapes: Any = {
        "input_ids": {0: "batch"} | ({1: "new"} if new > 1 else {}),
        "attention_mask": {0: "batch", 1: "total"},
        "past": [{0: "batch", 2: "past"}] * 4,
    }
    program = capture(Decoder(module), decoder_example(module, 2, new, 5), shapes, "ort-cpu").program
    names = [spec.name for spec in program.inputs()]
    original = program.clone()
    apply_pass(PIPELINE, program)
    for batch, length, past in ((1, new, 7), (3, new, 4), *(((2, 5, 2),) if new > 1 else ())):
        example = decoder_example(module, batch, length, past)
        flat = [example["input_ids"], example["attention_mask"], *example["past"]]
        feed = {n: v.numpy() for n, v in zip(names, flat, strict=True)}
        assert compare_outputs(run_reference(original, feed), run_reference(program, feed)).relative_l2 < 1e-5
    nodes = [n for n in program.main.graph if n.op_type == "Attention"]
    assert len(nodes) == 2 and all(len(n.outputs) == 3 for n in nodes)  # each appends to its cache
    assert "Softmax" not in op_counts(program)
    assert "Transpose" not in beside_attention(program)
    assert op_counts(program)["Concat"] <= 2


_MASKED = {"attention_mask": {0: "batch", 1: "seq"}}
# Name: how the module is made, operators that it ends with, and whether no Transpose may stay beside attention.
FLAT: dict[str, tuple[str, tuple[Any, ...], dict[str, int], bool]] = {
    "bmm": ("Bmm", (), {"Attention": 1, "Softmax": 0, "Transpose": 0}, True),
    "bmm, masked, clamped": ("Bmm", (True,), {"Attention": 1, "Softmax": 0, "Transpose": 0}, True),
    # A key that is padding and after the query has twice the lowest float: the row may be NaN.
    "bmm, masked": (
        "Bmm", (False,), {"com.microsoft::MultiHeadAttention": 1, "Softmax": 0, "Transpose": 0}, True,
    ),
    "one head": ("OneHead", (), {"Attention": 1, "Softmax": 0, "Transpose": 0}, True),
    "MultiheadAttention": ("Torch", (True, False), {"Attention": 1, "Softmax": 0}, False),
    "MultiheadAttention, length first": ("Torch", (False, False), {"Attention": 1, "Softmax": 0}, False),
    "MultiheadAttention, weights dropped": ("Torch", (True, True), {"Attention": 1, "Softmax": 0}, False),
    "MultiheadAttention, weights given": ("Torch", (False, True, True), {"Attention": 0, "Softmax": 1}, False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", FLAT)
def test_products_of_rank_3(name: str, exporter: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from planish.frontends.onnx import load_onnx
    from planish.passes.base import PassContext
    from tests.passes.fusion import flat_modules

    kind, arguments, expected, beside = FLAT[name]
    torch.manual_seed(0)
    module = getattr(flat_modules, kind)(*arguments).eval()
    # TorchScript wrote the length of MultiheadAttention's example into the file.
    fixed = kind == "Torch" and exporter == "torchscript"
    shapes: dict[str, Any] = {} if fixed else {"x": {0: "batch", 1: "seq"}}
    example: dict[str, Any] = {"x": torch.randn(3, 5, 16)}
    if "masked" in name:
        shapes, example = shapes | _MASKED, example | {"attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    path = tmp_path / "flat.onnx"
    if exporter == "dynamo":
        dims = tuple(dict.fromkeys(shapes[n], torch.export.Dim.DYNAMIC) for n in example)
        torch.onnx.export(
            module, tuple(example.values()), path, dynamo=True, dynamic_shapes=dims, input_names=list(example)
        )
    else:
        torch.onnx.export(
            module, tuple(example.values()), path, dynamo=False, opset_version=14, input_names=list(example),
            dynamic_axes=shapes,
        )  # fmt: skip
    original = load_onnx(path, "ort-cpu")
    program = original.clone()
    result = apply_pass(PIPELINE, program, PassContext(program.target))
    counts = op_counts(program)
    assert {k: counts.get(k, 0) for k in expected} == expected
    assert not beside or "Transpose" not in beside_attention(program)
    if "given" in name:
        assert any("a step between scores and output, is used elsewhere" in d.reason for d in result.declined)
    for batch, length in [(3, 5)] if fixed else [(1, 1), (3, 5), (1, 7)]:
        feed = {"x": np.random.default_rng(1).standard_normal((batch, length, 16), dtype=np.float32)}
        if "masked" in name:
            feed["attention_mask"] = np.ones((batch, length), np.int64)
            feed["attention_mask"][-1, : length // 2] = 0  # rows that see nothing
        want, got = run_reference(original, feed), run_reference(program, feed)
        for key, value in want.items():
            np.testing.assert_allclose(got[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bloom() -> None:
    pytest.importorskip("transformers")
    import torch

    from planish.frontends.torch import capture
    from tests.test_zoo import _bloom

    torch.manual_seed(0)
    module, make, shapes = _bloom()
    program = capture(module.eval(), make(2, 9), shapes, "ort-cpu").program
    original = program.clone()
    apply_pass(PIPELINE, program)
    counts = op_counts(program)
    assert counts["Attention"] == 2 and "Softmax" not in counts
    assert "Transpose" not in beside_attention(program)
    for batch, length in ((1, 1), (3, 5), (2, 12)):
        feed = {k: v.numpy() for k, v in make(batch, length).items()}
        feed["attention_mask"][-1, : length // 2] = 0
        assert compare_outputs(run_reference(original, feed), run_reference(program, feed)).relative_l2 < 1e-5
