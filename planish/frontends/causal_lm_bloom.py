"""BLOOM's attention, which transformers does not call through its attention interface, and its bias by position."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from planish.frontends.causal_lm_attention import current


def is_bloom(module: torch.nn.Module) -> bool:
    """Whether `module` is an attention layer of BLOOM."""
    return type(module).__name__ == "BloomAttention" and type(module).__module__.startswith("transformers.")


@contextlib.contextmanager
def replaced(model: torch.nn.Module) -> Iterator[None]:
    """Gives BLOOM's attention layers a forward that attends through the recorder meanwhile."""
    layers = [module for module in model.modules() if is_bloom(module)]
    for layer in layers:
        layer.__dict__["forward"] = _forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def slopes_of(heads: int) -> torch.Tensor:
    """The slope of each head, (heads): powers of 2^(-8/n) for n a power of two, those between for the heads above n.

    Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation", 2022.
    """
    below = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(heads - below)]
    return torch.tensor(first + between, dtype=torch.float32)


def _forward(layer: Any) -> Callable[..., Any]:
    slopes = slopes_of(layer.num_heads)

    def forward(hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query, keys, values = layer._reshape(layer.query_key_value(hidden_states))
        recorder = current()
        keys, values = recorder.update(keys, values, layer.layer_idx)
        scale = float(layer.inv_norm_factor)
        context = recorder.attend(query, keys, values, scale=scale, slopes=slopes.to(query.dtype))
        return layer.dense(context.flatten(2)) + residual, None

    return forward
