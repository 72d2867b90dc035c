"""The same on a GPU. Without one: the call that makes it says so."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

import planish
from planish.driver import optimize
from planish.ir.budget import Budget
from planish.ir.causal_lm import DECODE
from planish.ir.errors import UnsupportedError
from planish.ir.target import Target
from planish.offload import optimize_budgeted, split_for
from planish.runtime.cuda import driver
from planish.runtime.executable import Executable
from planish.runtime.offload.device import HostDevice
from planish.runtime.offload.engine import Engine
from planish.runtime.offload.plan import Rates, Request
from planish.runtime.offload.planner import place

GPU = driver.available() and "CUDAExecutionProvider" in ort.get_available_providers()
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU, or no onnxruntime-gpu")
VOCABULARY, NEW = 500, 8


def decoder(half: bool = True) -> torch.nn.Module:
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
    return model.half() if half else model


@needs_gpu
@pytest.mark.parametrize(
    ("memory", "prompt"), [(112 << 20, 300), (86 << 20, 300), (100 << 20, 3000)], ids=["free", "weights", "caches"]
)
def test_a_capped_model_generates_the_tokens_of_a_simulated_device(memory: int, prompt: int, tmp_path: Path) -> None:
    exe = optimize(decoder(), f"ort-cuda:memory={memory}", task="causal-lm", budget=Budget(gates=False))
    reference = simulated()
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (2, prompt))
    mask = np.ones_like(ids)
    mask[1, : prompt // 3] = 0
    found = exe.generate(ids, NEW, attention_mask=mask)
    wanted = reference.generate(ids, NEW, attention_mask=mask)
    assert (found == wanted).mean() > 0.99
    engine = exe.runners["prefill"].engine  # type: ignore[attr-defined]
    assert engine.device.account.peak <= memory
    engine.close()
    loaded = planish.load(exe.export(tmp_path / "artifact"))
    assert (loaded.generate(ids, NEW, attention_mask=mask) == wanted).mean() > 0.99
    assert loaded.runners["prefill"].engine.device.account.peak <= memory  # type: ignore[attr-defined]


@functools.cache
def simulated() -> Executable:
    target = Target.parse("ort-cuda:memory=1GiB")
    return optimize_budgeted(decoder(), target, task="causal-lm", budget=Budget(gates=False), device=HostDevice())


@needs_gpu
@pytest.mark.parametrize(
    "precision",
    [None, "float16", "quantize-weights{bits=8},float16", "quantize-weights{bits=4},float16", "quantize-weights"],
)
def test_other_precisions_stream(precision: str | None) -> None:
    """With all weights on the host, caches copied or attended to there, against the simulated device."""
    options = {"task": "causal-lm", "budget": Budget(gates=False), "approximate": precision}
    exe = optimize(decoder(half=False), "ort-cuda:memory=1GiB", **options)
    assert exe.program is not None
    here = exe.runners["prefill"].engine  # type: ignore[attr-defined]
    reference = Engine(split_for(exe.program.entries[DECODE], exe.target), HostDevice(), exe.target)
    ids = np.random.default_rng(2).integers(3, VOCABULARY, 100)
    limit = 0.01 if precision and "float16" in precision else 1e-4
    for attended in ((), (0, 2), (0, 1, 2, 3)):
        found, wanted = (steps(engine, ids, attended) for engine in (here, reference))
        assert np.linalg.norm(found - wanted) < limit * np.linalg.norm(wanted)


def steps(engine: Engine, ids: np.ndarray, attended: tuple[int, ...]) -> np.ndarray:
    """Logits of a prompt and of three tokens after it, (4, vocabulary) float64; nothing stays on the device."""
    request = Request(1, len(ids), NEW)
    plan = place(engine.parts.facts(), request, Rates(), chunk=32, attended=attended)
    found = [engine.prompt([ids], plan)] + [engine.step(np.array([token])) for token in (5, 17, 300)]
    engine.close()
    return np.concatenate(found).astype(np.float64)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_nothing_is_captured() -> None:
    with pytest.raises(UnsupportedError, match="ort-cuda"):
        optimize(torch.nn.Linear(2, 2), "ort-cuda:memory=1GiB", task="causal-lm")
