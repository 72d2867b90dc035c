"""What tests need to export modules of transformers."""

from __future__ import annotations

from typing import Any

import torch


def with_attention(module: torch.nn.Module, kind: str) -> Any:
    """`module` with every part set to "sdpa" or "eager" attention."""
    for part in module.modules():
        if hasattr(getattr(part, "config", None), "_attn_implementation"):
            part.config._attn_implementation = kind
    return module


class Flat(torch.nn.Module):
    """A module whose arguments come by position and whose outputs are a tuple of tensors."""

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.module(**dict(zip(self.names, values, strict=True)))
        return tuple(v for v in outputs.values() if isinstance(v, torch.Tensor))


class Decoder(torch.nn.Module):
    """A causal language model with its cache as flat tensors: keys and values of each layer, in and out."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        found = self.module(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        grown = found.past_key_values.layers
        return found.logits, *(tensor for layer in grown for tensor in (layer.keys, layer.values))


def decoder_example(module: Any, batch: int, new: int, past: int) -> dict[str, Any]:
    """Inputs of `Decoder`: left-padded rows over a cache of random numbers."""
    config = module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (batch, heads, past, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator().manual_seed(batch + new + past)
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    mask[-1, : past // 2] = 0
    return {
        "input_ids": torch.randint(0, 100, (batch, new), generator=generator),
        "attention_mask": mask,
        "past": [torch.randn(shape, generator=generator) for _ in range(2 * config.num_hidden_layers)],
    }
