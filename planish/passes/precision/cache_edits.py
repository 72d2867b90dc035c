"""Gives the caches of a layer another form, in ``decode``, which reads and writes them, and in ``prefill``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir.causal_lm import DECODE, PREFILL, scale_name
from planish.ir.ops import DIALECT_DOMAIN
from planish.passes.precision.cache_sites import KEY_SCALE, MICROSOFT, CacheSite
from planish.passes.sparsity.splice import Splicer

Floats = npt.NDArray[np.float32]
_INT8, _FLOAT16 = ir.DataType.INT8, ir.DataType.FLOAT16


def by_token(splicer: Splicer, site: CacheSite, channels: Floats) -> None:
    """int8 with a scale for each token and head, which becomes a cache of its own.

    Args:
        channels: (heads, size) what keys are divided by.
    """
    added = [_scale_input(splicer, past) for past in site.past]
    more = {} if site.window is None else {"window": site.window}

    def step(op: Any) -> Sequence[ir.Value]:
        made: Sequence[ir.Value] = op.CacheAttention(
            *site.node.inputs[:5], *added, site.node.inputs[5], channels, _domain=DIALECT_DOMAIN, _outputs=5,
            q_num_heads=site.heads, kv_num_heads=site.kv_heads, scale=site.scale, **more,
        )  # fmt: skip
        return made

    scales = _replace_step(splicer, site, step, _INT8)
    for value, past in zip(scales, added, strict=True):
        _add_output(splicer, DECODE, value, past.name or "", list(past.shape or ()))
    for name, by in zip(site.presents, (channels, np.ones_like(channels)), strict=True):

        def prompt(op: Any, whole: ir.Value, by: Floats = by) -> Sequence[ir.Value]:
            made: Sequence[ir.Value] = op.QuantizeCache(whole, by, _domain=DIALECT_DOMAIN, _outputs=2)
            return made

        codes, factors = _replace_prompt(splicer, name, prompt, _INT8)
        _add_output(splicer, PREFILL, factors, scale_name(name), [*list(codes.shape or ())[:3], 1])


def fixed(splicer: Splicer, site: CacheSite, key: Floats, value: Floats) -> None:
    """int8 with scales (1, heads, 1, size) that are fixed."""
    # Values of one scale are what "PER_CHANNEL" can have too; "PER_TENSOR" would be one for all heads.
    kinds: dict[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}

    def step(op: Any) -> Sequence[ir.Value]:
        rest = [None] * (KEY_SCALE - 7)
        return _group_query(op, site, [*site.node.inputs[:7], *rest, key, value], kinds)

    _replace_step(splicer, site, step, _INT8)
    for name, scales in zip(site.presents, (key, value), strict=True):

        def prompt(op: Any, whole: ir.Value, scales: Floats = scales) -> Sequence[ir.Value]:
            # With a scale of 1 that is rounding to nearest even, and clipping.
            codes: ir.Value = op.QuantizeLinear(op.Mul(whole, 1 / scales), np.float32(1), np.int8(0))
            return [codes]

        _replace_prompt(splicer, name, prompt, _INT8)


def half(splicer: Splicer, site: CacheSite, kernels: bool) -> None:
    """float16, which has no scales; `kernels`: by a generated one, for steps of one token."""
    more = {} if site.window is None else {"window": site.window}

    def step(op: Any) -> Sequence[ir.Value]:
        if not kernels or site.tokens != 1:
            return _group_query(op, site, list(site.node.inputs), {})
        made: Sequence[ir.Value] = op.CacheAttentionFloat16(
            *site.node.inputs[:6], _domain=DIALECT_DOMAIN, _outputs=3,
            q_num_heads=site.heads, kv_num_heads=site.kv_heads, scale=site.scale, **more,
        )  # fmt: skip
        return made

    _replace_step(splicer, site, step, _FLOAT16)
    for name in site.presents:

        def prompt(op: Any, whole: ir.Value) -> Sequence[ir.Value]:
            largest = np.float32(np.finfo(np.float16).max)
            return [op.Cast(op.Clip(whole, -largest, largest), to=int(_FLOAT16))]

        _replace_prompt(splicer, name, prompt, _FLOAT16)


def _group_query(op: Any, site: CacheSite, inputs: list[Any], more: dict[str, Any]) -> Sequence[ir.Value]:
    made: Sequence[ir.Value] = op.GroupQueryAttention(
        *inputs, _domain=MICROSOFT, _outputs=3, **dict(site.node.attributes), **more
    )
    return made


def _replace_step(
    splicer: Splicer, site: CacheSite, make: Callable[[Any], Sequence[ir.Value]], dtype: ir.DataType
) -> list[ir.Value]:
    """Puts what `make` builds in the place of the step; returns its outputs beyond three."""
    node = site.node
    for value in (*site.past, *node.outputs[1:3]):
        value.type = ir.TensorType(dtype)
    made = splicer.build(splicer.program.entry(DECODE), node, make, [node])
    splicer.replace(node, made[:3])
    return made[3:]


def _replace_prompt(
    splicer: Splicer, name: str, make: Callable[[Any, ir.Value], Sequence[ir.Value]], dtype: ir.DataType
) -> list[ir.Value]:
    """Lets `prefill` give what `make` builds from a cache, under its name; returns all that it builds."""
    model = splicer.program.entry(PREFILL)
    old = next(value for value in model.graph.outputs if value.name == name)
    source = old.producer()
    assert source is not None
    made = splicer.build(model, None, lambda op: make(op, old), [source])
    made[0].type, made[0].shape = ir.TensorType(dtype), old.shape
    splicer.replace_output(model.graph, old, made[0])
    return made


def _scale_input(splicer: Splicer, past: ir.Value) -> ir.Value:
    """A new input of `decode`: the scales of a cache, which lost what the cache lost."""
    assert past.name is not None and past.shape is not None
    value = ir.Value(name=scale_name(past.name), type=ir.TensorType(ir.DataType.FLOAT))
    value.shape = ir.Shape([*list(past.shape)[:3], 1])
    value.metadata_props.update(past.metadata_props)
    splicer.program.entry(DECODE).graph.inputs.append(value)
    return value


def _add_output(splicer: Splicer, entry: str, value: ir.Value, name: str, dims: list[Any]) -> None:
    value.name = name.replace("past_", "present_", 1)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(dims)
    splicer.program.entry(entry).graph.outputs.append(value)
