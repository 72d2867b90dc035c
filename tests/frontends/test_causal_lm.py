from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from planish.frontends.causal_lm import capture_causal_lm
from planish.frontends.causal_lm_bloom import slopes_of
from planish.ir.causal_lm import DECODE, PREFILL, CausalLM, Facts, cache_layer
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.verify import verify
from planish.runtime.ort import compile_ort
from tests.causal_models import causal_model


def run(program: Any, entry: str, inputs: Any) -> Any:
    return compile_ort(program.entries[entry], program.target, optimize=False).run(inputs)


def other(name: str, config: str, **options: Any) -> Any:
    import transformers

    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
    return getattr(transformers, name)(getattr(transformers, config)(**tiny, **options)).eval()


def test_entries_weights_and_comparison() -> None:
    model = causal_model("Qwen2")
    before = {k: v.clone() for k, v in model.state_dict().items()}, model.config._attn_implementation
    captured = capture_causal_lm(model)
    program = captured.program
    verify(program, full=True)
    assert captured.check(run).relative_l2 < 1e-5
    inputs = {e: {s.name: s.shape for s in program.inputs(e)} for e in (PREFILL, DECODE)}
    assert inputs[PREFILL] == {"input_ids": ("batch", "sequence"), "lengths": ("batch",)}
    cache = ("batch", 2, "capacity", 8)
    assert inputs[DECODE] == {
        "input_ids": ("batch", 1),
        "lengths": ("batch",),
        **{f"past_{layer}_{part}": cache for layer in range(2) for part in ("key", "value")},
    }
    outputs = [s.name for s in program.outputs(DECODE)]
    assert outputs == [s.name for s in program.outputs(PREFILL)]
    assert [cache_layer(name) for name in outputs] == [None, 0, 0, 1, 1]
    # The tied head is the embedding, and both entries hold the module's own memory.
    weights = sum(p.numel() * 4 for p in model.parameters())
    table = model.get_input_embeddings().weight
    extra = table.numel() * 4  # so small a table the exporter also keeps transposed, for the head
    assert weights <= program.weight_bytes() < weights + extra + 4096
    held = [t for t in program.weights.values() if t.numpy().shape == tuple(table.shape)]
    assert len(held) == 1 and held[0].numpy().ctypes.data == table.data_ptr()
    assert model.config._attn_implementation == before[1]
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())


def test_examples_with_a_mask_become_inputs_of_both_entries() -> None:
    ids, mask = np.array([[0, 0, 5, 6], [7, 8, 9, 10]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    captured = capture_causal_lm(causal_model("GPT-2"), {"input_ids": torch.from_numpy(ids), "attention_mask": mask})
    (prefill,), (decode,) = captured.example[PREFILL], captured.example[DECODE]
    np.testing.assert_array_equal(prefill["input_ids"], [[5, 6, 0, 0], [7, 8, 9, 10]])
    np.testing.assert_array_equal(prefill["lengths"], [2, 4])
    np.testing.assert_array_equal(decode["lengths"], [2, 4])
    assert not captured.synthetic
    assert (decode["past_0_key"][0, :, 2:] == 0).all() and (decode["past_0_key"][0, :, :2] != 0).any()
    assert captured.check(run).relative_l2 < 1e-5


def test_a_capture_that_differs_is_refused() -> None:
    captured = capture_causal_lm(causal_model("GPT-2"))

    def wrong(program: Any, entry: str, inputs: Any) -> Any:
        found = run(program, entry, inputs)
        return found | {"logits": found["logits"] * 1.01} if entry == DECODE else found

    with pytest.raises(InputError, match=r"entry 'decode' captured from GPT2LMHeadModel differs .* output 'logits'"):
        captured.check(wrong)


@pytest.mark.parametrize(
    ("name", "config", "options", "message"),
    [
        (
            "GPTJForCausalLM",
            "GPTJConfig",
            {"rotary_dim": 4},
            "0 of 1 layers attend through transformers' attention interface",
        ),
        ("FalconForCausalLM", "FalconConfig", {}, "does not go through transformers' attention interface"),
        (
            "GptOssForCausalLM",
            "GptOssConfig",
            {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
            "its attention takes 's_aux', which has no form here",
        ),
        ("BertModel", "BertConfig", {}, "such as GPT2LMHeadModel; BertModel is none"),
        ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_kv": 8}, "is an encoder with a decoder"),
        (
            "LlamaForCausalLM",
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embeddings of type 'dynamic'",
        ),
    ],
)
def test_what_can_not_be_captured(name: str, config: str, options: dict[str, Any], message: str) -> None:
    model = other(name, config, **options)
    with pytest.raises((UnsupportedError, InputError), match=message) as caught:
        capture_causal_lm(model)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("task 'causal-lm'") and text.endswith(".")


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (torch.nn.Linear(2, 2), None, "is for causal language models of transformers, .* Linear is none"),
        ("GPT-2", {"ids": np.ones((1, 2), int)}, "task 'causal-lm' takes input_ids and attention_mask"),
        ("GPT-2", {"attention_mask": np.ones((1, 2), int)}, "the examples hold no input_ids"),
        ("GPT-2", np.ones((1, 64), int), "an example has 64 tokens; the model has 64 positions"),
        ("GPT-2", np.full((1, 3), 100), "the examples hold the token 100; the vocabulary has 100"),
    ],
)
def test_wrong_examples(model: Any, example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture_causal_lm(causal_model(model) if isinstance(model, str) else model, example)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "float64"), (torch.bfloat16, "bfloat16")])
def test_dtypes_without_a_kernel(dtype: torch.dtype, name: str) -> None:
    model = other("LlamaForCausalLM", "LlamaConfig").to(dtype)
    with pytest.raises(UnsupportedError, match=f"is {name}; attention over a cache runs in float32 and float16"):
        capture_causal_lm(model)


def test_weights_that_are_not_there() -> None:
    with pytest.raises(InputError, match="is on device 'meta'; planish captures on the CPU"):
        capture_causal_lm(other("LlamaForCausalLM", "LlamaConfig").to("meta"))


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 20])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(slopes_of(heads), theirs)


def test_options_and_facts() -> None:
    with pytest.raises(InputError, match="Did you mean 'causal-lm'"):
        CausalLM.parse("causal_lm")
    with pytest.raises(InputError, match="Known: all, last"):
        CausalLM(logits="first")
    with pytest.raises(InputError, match="task is a int"):
        CausalLM.parse(3)  # type: ignore[arg-type]
    facts = Facts(64, (2, 5), 0)
    assert Facts.from_provenance(facts.to_provenance()) == facts
    assert Facts.from_provenance({}) == Facts()
    with pytest.raises(InputError, match="damaged"):
        Facts.from_provenance({"max_positions": "many"})
