"""How many operators each architecture must end up with; a change that loses one fails here.

The exports are captured by the torch and transformers that are installed, so a new version of either is seen too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.compare import compare_outputs
from planish.ir.printer import op_counts
from planish.ir.program import Program
from planish.passes.defaults import default_pipeline
from planish.passes.testing import apply_pass, check_numerics, run_reference
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
    for batch, length in sizes:
        inputs: dict[str, Any] = {"x": rng.standard_normal((batch, length, 16), dtype=np.float32)}
        for mask in masks:
            inputs[mask] = np.ones((batch, length), np.int64)
            inputs[mask][-1, length // 2 :] = 0
        program = check_numerics(PIPELINE, model, inputs)
        counts = watched(program)
        assert {k: counts.get(k, 0) for k in expected} == expected
        assert not {"Softmax", "Erf", "Tanh"} & set(counts)
        assert "Transpose" not in beside_attention(program)


def watched(program: Program) -> dict[str, int]:
    return {name: count for name, count in op_counts(program).items() if name in _WATCHED}


def beside_attention(program: Program) -> set[str]:
    """Operators that Attention reads from or is read by."""
    nodes = [n for n in program.main.graph if n.op_type in ("Attention", "MultiHeadAttention")]
    before = [v.producer() for n in nodes for v in n.inputs if v is not None]
    after = [user for n in nodes for v in n.outputs for user in v.consumers()]
    return {n.op_type for n in (*before, *after) if n is not None}


_TEXT = {"Attention": 2, "LayerNormalization": 5, "Gelu": 2}
_LLAMA = {"Attention": 2, "RMSNormalization": 5, "planish::SwiGLU": 2, "RotaryEmbedding": 4}
EXPORTED: dict[str, dict[str, int]] = {
    "BERT": _TEXT,
    "DistilBERT": _TEXT,
    "RoBERTa": _TEXT,
    "ALBERT": _TEXT,
    "MiniLM": {"Attention": 6, "LayerNormalization": 13, "Gelu": 6},
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


TORCHSCRIPT: dict[str, tuple[int, int]] = {"BERT": (2, 5), "MiniLM": (6, 13), "ViT": (2, 5), "GPT-2": (2, 5)}


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
