"""One artifact serves every batch and length: equal to eager where no row is wholly masked, to plain ORT everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import planish
import planish.frontends.onnx
from planish.ir.budget import Budget
from planish.ir.compare import compare_outputs
from planish.ir.target import Target
from planish.runtime.ort import compile_ort
from tests.architectures import ARCHITECTURES, TEXT

transformers = pytest.importorskip("transformers")

#: Relative L2 to eager float32.
LIMIT = 1e-5
SIZES = (
    (1, 1), (2, 1), (1, 2), (3, 7), (1, 15), (2, 16), (1, 17), (2, 64), (1, 129),
    (1, 192), (2, 193), (1, 200), (1, 255), (2, 256), (1, 301),
)  # fmt: skip
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_LONG = {"vocab_size": 100, "max_position_embeddings": 320}


def _gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=320, vocab_size=100, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def _llama() -> Any:
    config = transformers.LlamaConfig(**_TINY, **_LONG, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config)


MODELS = {
    "BERT": lambda: transformers.BertModel(transformers.BertConfig(**_TINY, **_LONG)),
    "MiniLM": lambda: ARCHITECTURES["MiniLM"].build(True),
    "GPT-2": _gpt2,
    "Llama": _llama,
}


class Flat(torch.nn.Module):
    """Ids and mask in by place, the tensors of the result out."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(input_ids=input_ids, attention_mask=attention_mask)
        return tuple(v for v in result.values() if isinstance(v, torch.Tensor))


def inputs(batch: int, length: int, masking: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 100, (batch, length), generator=torch.Generator().manual_seed(batch * 1000 + length))
    mask = torch.ones(batch, length, dtype=torch.int64)
    if masking == "right":
        mask[-1, max(1, length // 2) :] = 0
    elif masking == "left":
        mask[-1, : length // 2] = 0
    elif masking == "whole row":
        mask[-1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.slow
# MiniLM is a BERT with trained weights, of twelve times the cost: once is enough.
@pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n in MODELS for a in ("sdpa", "eager") if (n, a) != ("MiniLM", "eager")]
)
def test_every_length(name: str, attention: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.config._attn_implementation = attention
    module = Flat(model).eval()
    path = tmp_path / "model.onnx"
    dims = dict.fromkeys(TEXT, torch.export.Dim.DYNAMIC)
    example = tuple(inputs(2, 24, "right").values())
    torch.onnx.export(
        module, example, path, dynamo=True, input_names=["input_ids", "attention_mask"],
        dynamic_shapes=(dims, dims), verbose=False,
    )  # fmt: skip
    target = Target.parse("ort-cpu:threads=1")
    optimized = planish.optimize(path, target, budget=Budget(gates=False))
    plain = compile_ort(planish.frontends.onnx.load_onnx(path, target).main, target)
    for size in SIZES:
        for masking in ("none", "right", "left", "whole row"):
            if masking == "whole row" and size[0] > 2:
                continue
            feed = inputs(*size, masking)
            arrays = {key: value.numpy() for key, value in feed.items()}
            got, expected = optimized.run(arrays), plain.run(arrays)
            error = compare_outputs(expected, got)
            assert error.relative_l2 < LIMIT, (size, masking, error)
            if masking in ("none", "right"):
                with torch.no_grad():
                    eager = dict(zip(got, (v.numpy() for v in module(**feed)), strict=True))
                error = compare_outputs(eager, got)
                assert error.relative_l2 < LIMIT, (size, masking, error)


@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_an_empty_batch_answers_as_before(name: str) -> None:
    model = MODELS[name]().eval()
    shapes = {"input_ids": TEXT, "attention_mask": TEXT}
    example = inputs(2, 12, "none")
    optimized = planish.optimize(model, "ort-cpu:threads=1", example_inputs=example, dynamic_shapes=shapes)
    got = optimized.run({key: np.zeros((0, 200), np.int64) for key in shapes})
    first = next(iter(got.values()))
    assert first.shape[:2] == (0, 200)
