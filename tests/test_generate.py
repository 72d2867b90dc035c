"""Greedy decoding equals that of transformers on the eager model, token for token."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

import planish
from planish.ir.analyses.layers import find_layers
from planish.ir.causal_lm import DECODE, PREFILL
from tests.causal_models import VOCABULARY, WINDOW, causal_executable, causal_model, greedy, prompts

LONG, SHORT = 20, 6
ROUTES: tuple[Literal["scopes", "structure"], ...] = ("scopes", "structure")


def check(name: str, count: int) -> None:
    model, exe = causal_model(name), causal_executable(name)
    ids, mask = prompts(count, 3 * WINDOW)
    expected = greedy(model, ids, mask, 20)
    got = exe.generate(ids, 20, attention_mask=mask)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(got[:, ids.shape[1] :])) > 8, "a model that repeats itself shows little"
    for entry in (PREFILL, DECODE):
        assert exe.program is not None
        scopes, structure = (find_layers(exe.program.entry(entry), route=route) for route in ROUTES)
        assert [[(k.hidden_in, k.hidden_out, k.nodes) for k in stack.layers] for stack in scopes.stacks] == [
            [(k.hidden_in, k.hidden_out, k.nodes) for k in stack.layers] for stack in structure.stacks
        ]
        assert [[part.kind for part in k.parts] for k in scopes.stacks[0].layers] == [["attention", "ffn"]] * 2


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Qwen2", "Mistral", "OPT"])
def test_twenty_prompts_of_mixed_length(name: str) -> None:
    check(name, LONG)


@pytest.mark.parametrize("name", ["BLOOM", "Qwen3", "Gemma", "Gemma 2", "Gemma 3", "Phi", "odd heads"])
def test_other_decoders(name: str) -> None:
    check(name, SHORT)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_without_padding(batch: int) -> None:
    ids, mask = prompts(batch, 9)
    ids[mask == 0] = 7
    expected = greedy(causal_model("Llama"), ids, np.ones_like(mask), 12)
    np.testing.assert_array_equal(causal_executable("Llama").generate(ids, 12), expected)


def test_padding_on_the_right_counts_as_padding_on_the_left() -> None:
    exe = causal_executable("GPT-2")
    ids, mask = prompts(4, 9)
    left = exe.generate(ids, 8, attention_mask=mask)[:, 9:]
    lengths = mask.sum(1)
    shifted = np.stack([np.roll(row, n) for row, n in zip(ids, lengths, strict=True)])
    right = (np.arange(9) < lengths[:, None]).astype(np.int64)
    np.testing.assert_array_equal(exe.generate(shifted, 8, attention_mask=right)[:, 9:], left)


@pytest.mark.parametrize("several", [False, True])
def test_rows_end_by_themselves_and_are_filled(several: bool) -> None:
    model, exe = causal_model("GPT-2"), causal_executable("GPT-2")
    ids, mask = prompts(6, 9)
    free = greedy(model, ids, mask, 16)[:, 9:]
    ends = [int(free[0, 3]), int(free[1, 7])]  # tokens that come up at different places of the rows
    eos = ends if several else ends[0]
    expected = greedy(model, ids, mask, 16, eos_token_id=eos, pad_token_id=99)
    got = exe.generate(ids, 16, attention_mask=mask, eos_token_id=eos, pad_token_id=99)
    np.testing.assert_array_equal(got, expected)
    first = 9 + int(np.argmax(np.isin(free[0], eos)))
    assert int(got[0, first]) in ends and (got[0, first + 1 :] == 99).all()


def test_stops_when_every_row_has_ended() -> None:
    ids, mask = prompts(1, 9)
    free = causal_executable("GPT-2").generate(ids, 16, attention_mask=mask)[0, 9:]
    first = int(np.argmax(free == free[2]))
    got = causal_executable("GPT-2").generate(ids, 16, attention_mask=mask, eos_token_id=int(free[2]))
    assert got.shape == (1, 9 + first + 1)


def test_repetition_penalty_is_that_of_transformers() -> None:
    ids, mask = prompts(5, 9)
    expected = greedy(causal_model("Llama"), ids, mask, 16, repetition_penalty=1.7)
    got = causal_executable("Llama").generate(ids, 16, attention_mask=mask, repetition_penalty=1.7)
    np.testing.assert_array_equal(got, expected)


def test_torch_in_torch_out_and_stream() -> None:
    ids, _ = prompts(2, 5)
    ids[ids == 0] = 5
    steps: list[np.ndarray] = []
    got = causal_executable("GPT-2").generate(torch.from_numpy(ids), 4, stream=steps.append)
    assert isinstance(got, torch.Tensor) and got.shape == (2, 9)
    np.testing.assert_array_equal(np.stack(steps, axis=1), got[:, 5:].numpy())


def test_as_many_tokens_as_there_are_positions() -> None:
    ids, mask = prompts(2, 40)
    expected = greedy(causal_model("OPT"), ids, mask, 24)
    np.testing.assert_array_equal(causal_executable("OPT").generate(ids, 24, attention_mask=mask), expected)


def test_logits_of_all_positions() -> None:
    exe, model = causal_executable("Llama"), causal_model("Llama")
    every = planish.optimize(model, task=planish.CausalLM(logits="all"), budget=planish.Budget(gates=False))
    ids, mask = prompts(3, 8)
    assert every.runners[PREFILL].outputs[0].shape == ("batch", "sequence", VOCABULARY)
    assert exe.runners[PREFILL].outputs[0].shape == ("batch", VOCABULARY)
    np.testing.assert_array_equal(
        every.generate(ids, 6, attention_mask=mask), exe.generate(ids, 6, attention_mask=mask)
    )


def test_weights_are_one_store() -> None:
    exe = causal_executable("Qwen2")  # tied: the head is the embedding
    assert exe.program is not None
    stored = sum(t.nbytes for t in exe.program.weights.values())
    model = sum(p.numel() * 4 for p in causal_model("Qwen2").parameters())
    assert exe.program.weight_bytes() == stored
    table = VOCABULARY * 32 * 4  # small enough for fold-constants to keep the head transposed as well
    assert stored < model + table + 4096, "weights, and constants of a few bytes"
    names = [set(exe.program.entries[e].graph.initializers) for e in (PREFILL, DECODE)]
    large = [{n for n in found if exe.program.weights[n].nbytes > 1024} for found in names]
    assert large[0] == large[1]
