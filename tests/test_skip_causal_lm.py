"""Layers left out of decode only: greedy tokens are those of the module whose later steps run without these layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import planish  # noqa: E402

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 6, "n_head": 4, "vocab_size": 99, "n_positions": 64}
NO_END = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}

#: name → (class, options, path of the list of layers)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama": ("Llama", {**SIZES, "num_key_value_heads": 2}, "model.layers"),
    "GPT-2": ("GPT2", GPT2, "transformer.h"),
    "Qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 2}, "model.layers"),
    "Mistral": ("Mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": 8}, "model.layers"),
    "OPT": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers"),
}
STEPS = 6


def build(name: str) -> Any:
    import transformers

    kind, options, _ = MODELS[name]
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**options, **NO_END)
    module = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():  # so that tokens are not near-ties
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return module


def reference(module: Any, path: str, kept: tuple[int, ...], ids: Any) -> Any:
    """Greedy tokens; the prompt runs through all layers, what follows through those that are kept."""
    shorter = copy.deepcopy(module)
    layers = shorter.get_submodule(path)
    parent, _, last = path.rpartition(".")
    setattr(shorter.get_submodule(parent), last, torch.nn.ModuleList([layers[i] for i in kept]))
    shorter.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        output = module(ids, use_cache=True)
        tokens = [output.logits[:, -1].argmax(-1)]
        for _ in range(STEPS - 1):
            output = shorter(tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
            tokens.append(output.logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_decode_without_layers_gives_the_tokens_of_the_module_without_them(name: str) -> None:
    module, path = build(name), MODELS[name][2]
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    for options, kept in (("speedup=2", (0, 2, 5)), ("layers=[1,2,3,4]", (0, 5))):
        exe = planish.optimize(
            module,
            "ort-cpu:threads=1",
            task="causal-lm",
            passes=f"skip-layers{{{options}}}",
            budget=planish.Budget(gates=False),
        )
        assert exe.report is not None and exe.report.ledger["skip-layers"].fired == 6 - len(kept)
        got = exe.generate(ids, max_new_tokens=STEPS)
        assert torch.equal(torch.as_tensor(got)[:, 7:], reference(module, path, kept, ids))
