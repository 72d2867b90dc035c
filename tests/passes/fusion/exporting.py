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
