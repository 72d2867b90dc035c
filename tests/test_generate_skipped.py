"""Greedy decoding with layers left out of `decode` equals torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import planish
from planish.ir.causal_lm import DECODE, PREFILL, cache_layer
from tests.causal_models import causal_model, prompts

LAYERS = {
    "GPT-2": "transformer.h",
    "Llama": "model.layers",
    "Qwen2": "model.layers",
    "Mistral": "model.layers",
    "OPT": "model.decoder.layers",
}
SKIPPED = (1, 2)
COUNT = 8


def without_layers(model: Any, path: str) -> Any:
    """A copy of the model without the skipped layers; those that stay keep their place in the cache."""
    reduced = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    layers = reduced.get_submodule(path)
    kept = torch.nn.ModuleList(layer for k, layer in enumerate(layers) if k not in SKIPPED)
    setattr(reduced.get_submodule(parent), name, kept)
    return reduced


def reference(model: Any, reduced: Any, row: np.ndarray) -> list[int]:
    cache = DynamicCache()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(row)[None], past_key_values=cache, use_cache=True).logits
        tokens = [int(logits[0, -1].argmax())]
        while len(tokens) < COUNT:
            step = torch.tensor([tokens[-1:]])
            logits = reduced(input_ids=step, past_key_values=cache, use_cache=True).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("name", LAYERS)
def test_twenty_prompts_of_mixed_length(name: str) -> None:
    model = causal_model(name, layers=4)
    exe = planish.optimize(
        model,
        "ort-cpu:threads=1",
        task="causal-lm",
        passes=f"skip-layers{{layers={list(SKIPPED)}}}",
        budget=planish.Budget(gates=False),
    )
    ids, mask = prompts(20, 12)
    got = exe.generate(ids, COUNT, attention_mask=mask)[:, ids.shape[1] :]
    reduced = without_layers(model, LAYERS[name])
    for row in range(len(ids)):
        assert got[row].tolist() == reference(model, reduced, ids[row, mask[row] == 1])
    assert exe.program is not None
    kept = [0, 0, 3, 3]
    for specs in (exe.program.inputs(DECODE), exe.program.outputs(DECODE), exe.program.outputs(PREFILL)):
        assert [layer for spec in specs if (layer := cache_layer(spec.name)) is not None] == kept
