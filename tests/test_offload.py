"""`optimize` with a memory budget, on a simulated device: the same tokens, in lower precision if the error allows."""

from __future__ import annotations

import copy
import functools

import numpy as np
import onnx_ir as ir
import pytest
import torch

from planish.ir.budget import Budget
from planish.ir.errors import InputError
from planish.ir.target import Target
from planish.offload import optimize_budgeted
from planish.runtime.executable import Executable
from planish.runtime.offload import engine
from planish.runtime.offload.account import MemoryBudgetError
from planish.runtime.offload.device import HostDevice
from planish.runtime.offload.plan import Rates, Request
from planish.runtime.offload.planner import place
from tests.causal_models import causal_model, greedy, prompts

TARGET = Target.parse("ort-cuda:sm_80,threads=1,memory=1MiB")


@functools.cache
def budgeted(limit: int, budget: Budget | None = None) -> tuple[Executable, HostDevice]:
    device = HostDevice(limit)
    given = budget or Budget(gates=False)
    return optimize_budgeted(causal_model("Llama"), TARGET, task="causal-lm", budget=given, device=device), device


def test_generate_under_a_budget_is_that_of_transformers() -> None:
    exe, device = budgeted(90_000)
    ids, mask = prompts(3, 11)
    tokens = exe.generate(ids, 6, attention_mask=mask)
    np.testing.assert_array_equal(tokens, greedy(causal_model("Llama"), ids, mask, 6))
    assert device.account.peak <= 90_000
    plan = exe.runners["prefill"].plan  # type: ignore[attr-defined]
    assert plan.streamed()
    assert exe.report is not None and any("on the device, planned of" in note for note in exe.report.ledger.notes)
    text = exe.runners["prefill"].table()  # type: ignore[attr-defined]
    assert "a step is estimated at" in text and text.endswith("the median of 5")
    logits = exe.run({"input_ids": ids[:1], "lengths": np.array([11])})["logits"]
    assert logits[0].argmax() == tokens[0, 11]


def test_a_prompt_that_is_longer_than_activations_allow_is_read_in_chunks(slow_link: None) -> None:
    roomy, _ = budgeted(1 << 20)
    facts = roomy.runners["prefill"].engine.parts.facts()  # type: ignore[attr-defined]
    request, kept = Request(1, 50, 6), {"resident": range(3), "kv_device": range(2), "slots": 0, "kv_slots": 0}
    whole, chunked = (place(facts, request, Rates(), chunk=chunk, **kept).total for chunk in (50, 16))
    assert chunked < whole
    exe, device = budgeted(chunked)
    ids, mask = prompts(1, 50)
    tokens = exe.generate(ids, 6, attention_mask=mask)
    np.testing.assert_array_equal(tokens, greedy(causal_model("Llama"), ids, mask, 6))
    plan = exe.runners["prefill"].plan  # type: ignore[attr-defined]
    assert plan.chunk == 16 and not plan.streamed() and not plan.kv_host()
    assert device.account.peak <= chunked < whole


def test_what_does_not_fit_is_an_error_in_words() -> None:
    with pytest.raises(MemoryBudgetError, match=r"take at least .* more than the budget of 20 KiB"):
        budgeted(20_000)
    exe, _ = budgeted(90_000)
    with pytest.raises(MemoryBudgetError, match=r"64 x \(11 \+ 20\) tokens take at least"):
        exe.generate(np.full((64, 11), 7), 20)
    ids = np.full((1, 4), 7)
    assert exe.generate(ids, 2).shape == (1, 6)  # goes on


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where what streams decides about the time of a step."""
    rates = Rates(link=1e6, device=1e12, host=1e5, launch=1e-7)
    monkeypatch.setattr(engine, "measure_rates", lambda parts, device: rates)


def test_weights_get_a_lower_precision_where_the_error_allows(slow_link: None) -> None:
    limit = 60_000
    exact, _ = budgeted(limit, Budget(error=1e-9, seconds=0.5))
    assert exact.report is not None and any("float16 was taken back: error" in n for n in exact.report.ledger.notes)
    smaller, device = budgeted(limit, Budget(error=0.02, seconds=0.5))
    assert smaller.report is not None
    note = next(n for n in smaller.report.ledger.notes if n.startswith("float16 for the memory budget: weights"))
    assert "a step is estimated at" in note
    ids, mask = prompts(2, 9)
    tokens = smaller.generate(ids, 4, attention_mask=mask)
    plan = smaller.runners["prefill"].plan  # type: ignore[attr-defined]
    assert not plan.streamed() and device.account.peak <= limit
    np.testing.assert_array_equal(tokens, greedy(causal_model("Llama"), ids, mask, 4))


def test_a_lower_precision_must_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where starting layers takes longer than copying them, weights stream as they are."""
    monkeypatch.setattr(engine, "measure_rates", lambda parts, device: Rates(link=1e9, launch=1.0))
    exe, _ = budgeted(90_000, Budget(error=0.03, seconds=0.5))
    assert exe.report is not None
    notes = exe.report.ledger.notes
    assert any(n.startswith("float16 was taken back: error") and "in the place of" in n for n in notes)
    assert exe.program is not None and exe.program.weight_bytes() > 70_000


@pytest.mark.parametrize("half", [False, True])
def test_weights_in_few_bits_where_half_precision_is_not_enough(slow_link: None, half: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, num_hidden_layers=2, vocab_size=256, max_position_embeddings=64)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(5.0)
    device = HostDevice(624 << 10)
    limits = Budget(error=0.2, seconds=0.5)
    given = copy.deepcopy(model).half() if half else model
    exe = optimize_budgeted(given, TARGET, task="causal-lm", budget=limits, device=device)
    assert exe.report is not None
    text = "\n".join(exe.report.ledger.notes)
    note = "quantize-weights,float16 for the memory budget: weights 1.3 MiB → 327 KiB"
    assert ("quantize-weights for the memory budget: weights 640 KiB → 326 KiB" if half else note) in text
    assert not exe.runners["prefill"].engine.plan(Request(2, 16, 2)).streamed()  # type: ignore[attr-defined]
    ids = np.random.default_rng(0).integers(3, 256, (2, 12))
    first = exe.run({"input_ids": ids, "lengths": np.array([12, 12])})["logits"]
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits[:, -1].numpy()
    assert np.linalg.norm(first - wanted) < 0.2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("asked", ["target", "pass", "with quantized weights"])
def test_half_precision_that_is_asked_for(asked: str) -> None:
    """With gates off and on; of it the CPU, on which the program is compared, has nothing."""
    approximate = {"pass": "float16", "with quantized weights": "quantize-weights,float16"}.get(asked)
    target = Target.parse(f"ort-cuda:threads=1,memory=1GiB{',dtype=float16' * (asked == 'target')}")
    for limits in (Budget(gates=False), Budget(error=0.2, seconds=0.5)):
        exe = optimize_budgeted(
            causal_model("Llama"), target, task="causal-lm", approximate=approximate, budget=limits, device=HostDevice()
        )
        assert exe.program is not None and exe.report is not None
        assert {spec.dtype for spec in exe.program.inputs("decode") if "past" in spec.name} == {ir.DataType.FLOAT16}
        notes = [note for note in exe.report.ledger.notes if note.startswith("float16: error ")]
        assert len(notes) == limits.gates
        ids, mask = prompts(2, 9)
        want = greedy(causal_model("Llama"), ids, mask, 4)
        assert asked == "with quantized weights" or (exe.generate(ids, 4, attention_mask=mask) == want).mean() > 0.9


def test_half_precision_that_loses_too_much_is_taken_back() -> None:
    target = Target.parse("ort-cuda:threads=1,memory=1GiB,dtype=float16")
    exe = optimize_budgeted(
        causal_model("Llama"), target, task="causal-lm", budget=Budget(error=1e-7, seconds=0.5), device=HostDevice()
    )
    assert exe.program is not None and exe.report is not None
    assert any(note.startswith("float16 was taken back: error ") for note in exe.report.ledger.notes)
    assert {spec.dtype for spec in exe.program.inputs("decode") if "past" in spec.name} == {ir.DataType.FLOAT}
    with pytest.raises(InputError, match="a memory budget takes float16, whose error the CPU can measure"):
        optimize_budgeted(causal_model("Llama"), Target.parse("ort-cuda:memory=1GiB,dtype=bfloat16"), task="causal-lm")


def test_what_can_not_be_cut_says_so() -> None:
    with pytest.raises(InputError, match="can not run on a program that a memory budget will cut"):
        optimize_budgeted(
            causal_model("Llama"), TARGET, task="causal-lm", approximate="fuse-gelu", device=HostDevice(90_000)
        )
    with pytest.raises(InputError, match="'quantize-entries' chooses by times on the CPU"):
        optimize_budgeted(
            causal_model("Llama"), TARGET, task="causal-lm", approximate="quantize-entries", device=HostDevice(90_000)
        )
