"""What a transformers decoder is: whether it can be captured, and the facts that generation needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from planish.frontends import causal_lm_bloom
from planish.frontends.causal_lm_attention import INTERFACE, attention
from planish.ir.causal_lm import Facts
from planish.ir.errors import InputError, UnsupportedError

_INSTALL = "pip install 'planish[torch]' transformers"
#: Rotary tables that change with the length of what was read: the table of the prompt is not that of a later token.
_CHANGING_ROTARY = ("dynamic", "longrope")


def check_model(model: Any) -> None:
    """Raises InputError for what is no decoder of transformers with a language modeling head."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate") or not hasattr(config, "get_text_config"):
        raise InputError(
            f"task 'causal-lm' is for causal language models of transformers, such as GPT2LMHeadModel; {name} is none."
        )
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise UnsupportedError(f"task 'causal-lm': {name} is an encoder with a decoder; a decoder alone is captured.")
    if head(model) is None:
        raise InputError(f"task 'causal-lm': {name} has no language modeling head; give its …ForCausalLM class.")
    for key, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float16):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"task 'causal-lm': {name}: '{key}' is {dtype}; attention over a cache runs in float32 and float16: "
                "call model.float() first."
            )
    for kind in _rotary_kinds(text_config(model)):
        if kind in _CHANGING_ROTARY:
            raise UnsupportedError(
                f"task 'causal-lm': {name} has rotary embeddings of type '{kind}', whose table changes with the length."
            )


def text_config(model: Any) -> Any:
    """The configuration of the language model in `model`."""
    return model.config.get_text_config()


def head(model: Any) -> torch.nn.Module | None:
    """The module that computes the logits."""
    found = model.get_output_embeddings()
    return found if isinstance(found, torch.nn.Module) else None


def facts(model: Any) -> Facts:
    """Limits and special tokens, as `generate` of transformers has them."""
    config, generation = text_config(model), getattr(model, "generation_config", None)
    positions = next((getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")), None)
    eos = _ids(getattr(generation, "eos_token_id", None))
    pad = _ids(getattr(generation, "pad_token_id", None))
    return Facts(positions if isinstance(positions, int) else None, eos, pad[0] if pad else None)


def layer_count(model: Any) -> int:
    """How many layers the configuration says there are."""
    return int(text_config(model).num_hidden_layers)


def accepts_positions(model: Any) -> bool:
    """Whether forward takes ``position_ids``."""
    import inspect

    return "position_ids" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def attention_replaced(model: Any) -> Iterator[None]:
    """Makes every attention layer of `model` call :func:`causal_lm_attention.attention` meanwhile."""
    try:
        from transformers import AttentionInterface
    except ImportError as error:  # pragma: no cover - a model of transformers is at hand
        raise InputError(f"task 'causal-lm' needs transformers ({error}): {_INSTALL}.") from error
    AttentionInterface.register(INTERFACE, attention)
    configs = list({id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values())
    configs = [c for c in configs if hasattr(c, "_attn_implementation_internal")]
    before = [c._attn_implementation_internal for c in configs]
    for config in configs:
        config._attn_implementation_internal = INTERFACE
    try:
        with causal_lm_bloom.replaced(model):
            yield
    finally:
        for config, kept in zip(configs, before, strict=True):
            config._attn_implementation_internal = kept


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.reshape(-1).tolist()
    return tuple(int(v) for v in value) if isinstance(value, Sequence) else (int(value),)


def _rotary_kinds(config: Any) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return [str(p.get("rope_type", p.get("type", "default"))) for p in (nested or [parameters])]
