"""The same on a GPU. Without one: the call that makes it says so."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from planish.driver import optimize
from planish.ir.budget import Budget
from planish.ir.errors import UnsupportedError
from planish.ir.target import Target
from planish.offload import optimize_budgeted
from planish.runtime.cuda import driver
from planish.runtime.offload.device import HostDevice

GPU = driver.available() and "CUDAExecutionProvider" in ort.get_available_providers()
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU, or no onnxruntime-gpu")
VOCABULARY, NEW = 500, 8


def decoder() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
        vocab_size=VOCABULARY, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(4.0)
    return model.half()


@needs_gpu
@pytest.mark.parametrize(
    ("memory", "prompt"), [(112 << 20, 300), (86 << 20, 300), (100 << 20, 3000)], ids=["free", "weights", "caches"]
)
def test_a_capped_model_generates_the_tokens_of_a_simulated_device(memory: int, prompt: int) -> None:
    options = {"task": "causal-lm", "budget": Budget(gates=False)}
    exe = optimize(decoder(), f"ort-cuda:memory={memory}", **options)
    reference = optimize_budgeted(decoder(), Target.parse("ort-cuda:memory=1GiB"), device=HostDevice(), **options)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (2, prompt))
    mask = np.ones_like(ids)
    mask[1, : prompt // 3] = 0
    found = exe.generate(ids, NEW, attention_mask=mask)
    wanted = reference.generate(ids, NEW, attention_mask=mask)
    assert (found == wanted).mean() > 0.99
    engine = exe.runners["prefill"].engine  # type: ignore[attr-defined]
    assert engine.device.account.peak <= memory


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_nothing_is_captured() -> None:
    with pytest.raises(UnsupportedError, match="ort-cuda"):
        optimize(torch.nn.Linear(2, 2), "ort-cuda:memory=1GiB", task="causal-lm")
