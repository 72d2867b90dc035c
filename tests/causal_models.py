"""Small causal language models of transformers with random weights, and what their own greedy decoding gives."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from planish.driver import optimize
from planish.ir.budget import Budget
from planish.runtime.executable import Executable

VOCABULARY = 100
_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_GROUPED = _TINY | {"num_key_value_heads": 2}
WINDOW = 6

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64},
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {k: v for k, v in _TINY.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "BLOOM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": VOCABULARY},
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED | {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 16}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": WINDOW}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", _TINY | {"num_key_value_heads": 1, "head_dim": 16}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED | {"head_dim": 16, "sliding_window": WINDOW}),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GROUPED | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi": ("PhiForCausalLM", "PhiConfig", _TINY),
    # Heads of 12, which ONNX Runtime's kernel does not take as they are.
    "odd heads": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | {"hidden_size": 48}),
}


@functools.cache
def causal_model(name: str, layers: int = 2) -> Any:
    """The model of that name; without a token that ends a row, so that tests decide about it."""
    import transformers

    cls, config, options = _MODELS[name]
    options = {key: layers if key in ("n_layer", "num_hidden_layers") else value for key, value in options.items()}
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = getattr(transformers, cls)(getattr(transformers, config)(**options, **special)).eval()
    model.generation_config.eos_token_id = None
    # Larger weights than training begins with: tokens then depend on what was read. Those of embeddings stay small,
    # or a head that is tied to them repeats the last token.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.mul_(10.0)
    return model


@functools.cache
def causal_executable(name: str, **options: Any) -> Executable:
    """The optimized model, without gates: they have tests of their own."""
    return optimize(causal_model(name), "ort-cpu:threads=1", task="causal-lm", budget=Budget(gates=False), **options)


def prompts(count: int, longest: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of mixed length, padded on the left: ids and mask, (count, longest) int64."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    lengths[0] = longest
    mask = (np.arange(longest) >= longest - lengths[:, None]).astype(np.int64)
    return random.integers(3, VOCABULARY, (count, longest)) * mask, mask


def greedy(model: Any, ids: np.ndarray, mask: np.ndarray, count: int, **options: Any) -> np.ndarray:
    """What transformers' own greedy decoding gives on the eager model."""
    with torch.no_grad():
        found = model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=count,
            do_sample=False,
            **options,
        )
    result: np.ndarray = found.numpy()
    return result
