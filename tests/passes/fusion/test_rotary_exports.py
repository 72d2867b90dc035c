"""Rotary embeddings as torch's exporter writes them at its default opset, in the architectures that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.ir.printer import op_counts
from planish.passes.defaults import default_pipeline
from planish.passes.testing import check_numerics

# No kernel of these is under test, so the pipeline ends before those that choose among them.
PIPELINE = default_pipeline("ort-cpu").split(",lower-", 1)[0]
_BASE = {"vocab_size": 100, "max_position_embeddings": 64, "num_hidden_layers": 2, "use_cache": False}
_SIZE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
_SHARED = {"num_key_value_heads": 2}
_GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "rotary_dim": 8, "n_positions": 64}

# Configuration, and the number of Transposes left: NeoX has queries, keys and values of a head side by side.
ARCHITECTURES: dict[str, tuple[dict[str, Any], int]] = {
    "Llama": ({**_SIZE, **_SHARED}, 0),
    "Mistral": ({**_SIZE, **_SHARED}, 0),
    "Gemma": ({**_SIZE, **_SHARED, "head_dim": 16}, 0),
    "Qwen3": ({**_SIZE, **_SHARED, "head_dim": 16}, 0),
    "Cohere": ({**_SIZE, **_SHARED}, 0),
    "StableLm": ({**_SIZE, **_SHARED}, 0),
    "Phi": ({**_SIZE, "partial_rotary_factor": 0.5}, 0),
    "GPTNeoX": ({**_SIZE, "rotary_pct": 0.25}, 4),
    "GPTJ": (_GPTJ, 0),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rotary_architectures(name: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from planish.frontends.onnx import load_onnx

    sizes, transposes = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**_BASE, **sizes)
    config._attn_implementation = "eager" if name in ("GPTJ", "Gemma") else "sdpa"
    module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    example = (torch.randint(4, 100, (2, 12)), torch.ones(2, 12, dtype=torch.int64))
    sizes_of_both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.inner(input_ids=ids, attention_mask=mask).logits

    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits(), example, path, dynamo=True, input_names=["ids", "mask"],
        dynamic_shapes=(sizes_of_both, sizes_of_both), verbose=False,
    )  # fmt: skip
    source = load_onnx(path, "ort-cpu")
    for batch, length in ((1, 1), (1, 7), (3, 12)):
        mask = np.ones((batch, length), np.int64)
        mask[1:, length - 2 :] = 0
        ids = np.random.default_rng(0).integers(4, 100, (batch, length))
        counts = op_counts(check_numerics(PIPELINE, source, {"ids": ids, "mask": mask}).main)
    found = {kind: counts.get(kind, 0) for kind in ("Attention", "RotaryEmbedding", "Transpose", "Neg", "Slice")}
    assert found == {"Attention": 2, "RotaryEmbedding": 4, "Transpose": transposes, "Neg": 0, "Slice": 0}
