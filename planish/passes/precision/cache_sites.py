"""The caches of a causal language model: which step reads them, and what stands against a cache in fewer bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from planish.ir.block_sparsity import SLOTS
from planish.ir.causal_lm import DECODE, PREFILL, TASK, cache_layer, past_name, present_name
from planish.ir.graphs import dims_of
from planish.ir.ops.cache_attention import CACHE_STEPS
from planish.ir.program import Program
from planish.passes.base import Decline

GROUP_QUERY, MICROSOFT = "GroupQueryAttention", "com.microsoft"
#: Inputs of GroupQueryAttention.
BIAS, KEY_SCALE = 10, 12


@dataclass(frozen=True)
class CacheSite:
    """A layer's caches.

    Attributes:
        layer: its number, which is part of their names.
        node: the step of ``decode`` that writes and reads them, com.microsoft's GroupQueryAttention.
        heads, kv_heads, size: of queries, of keys and values, and the numbers of each.
        scale: of the scores.
        window: tokens that a token sees, its own included; None for all.
        tokens: new tokens of a step: 1, or (None) any number.
    """

    layer: int
    node: ir.Node
    heads: int
    kv_heads: int
    size: int
    scale: float
    window: int | None
    tokens: int | None

    @property
    def past(self) -> tuple[ir.Value, ir.Value]:
        """The inputs of ``decode`` with keys and values."""
        key, value = self.node.inputs[3:5]
        assert key is not None and value is not None
        return key, value

    @property
    def keys(self) -> ir.Value:
        """The keys of a step's new tokens."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def presents(self) -> tuple[str, str]:
        """The names under which ``prefill`` gives them."""
        return present_name(self.layer, "key"), present_name(self.layer, "value")


def layers_of(program: Program) -> list[int]:
    """The layers that have caches; none if the program has no pair of entries over caches."""
    if {PREFILL, DECODE} - set(program.entries) or program.provenance.get("task") != TASK:
        return []
    found = {cache_layer(value.name or "") for value in program.entry(DECODE).graph.inputs}
    return sorted(layer for layer in found if layer is not None)


def site_of(program: Program, layer: int) -> CacheSite:
    """The caches of a layer.

    Raises:
        Decline: they are in fewer bits already, or their step has no form over such.
    """
    graphs = {name: program.entry(name).graph for name in (PREFILL, DECODE)}
    inputs = {value.name: value for value in graphs[DECODE].inputs}
    past = [inputs.get(past_name(layer, part)) for part in ("key", "value")]
    if any(value is not None and SLOTS in value.metadata_props for value in past):
        raise Decline("its cache keeps some tokens only, in an order of its own (shard-attention{evict=True})")
    if any(value is None or len(value.uses()) != 1 for value in past):
        raise Decline("its keys and values are not read once each")
    if len(nodes := {use.node for value in past if value is not None for use in value.uses()}) != 1:
        raise Decline("its keys and values are not read by one attention")
    node = nodes.pop()
    if node.op_type in CACHE_STEPS or any(v.dtype != ir.DataType.FLOAT for v in past if v is not None):
        kind = past[0].dtype if past[0] is not None else None
        raise Decline(f"its cache is {kind.name.lower() if kind is not None else 'of unknown type'} already")
    if (node.domain, node.op_type) != (MICROSOFT, GROUP_QUERY):
        raise Decline(f"its step is {node.op_type}, which copies the cache; {GROUP_QUERY} writes in place")
    given = {value.name for value in graphs[PREFILL].outputs}
    if not {present_name(layer, "key"), present_name(layer, "value")} <= given:
        raise Decline("prefill does not give its cache")
    return _measured(layer, node)


def _measured(layer: int, node: ir.Node) -> CacheSite:
    dims: Any = dims_of(node.inputs[3]) if node.inputs[3] is not None else None
    heads, kv_heads = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    size = dims[3] if dims is not None and len(dims) == 4 else None
    if not isinstance(size, int) or heads < 1 or kv_heads < 1:
        raise Decline("the sizes of its cache are unknown")
    if node.attributes.get_float("softcap", 0.0):
        raise Decline("its scores are capped, which no form over fewer bits does")
    if any(value is None for value in node.inputs[:7]) or any(value is not None for value in node.inputs[7:]):
        biased = len(node.inputs) > BIAS and node.inputs[BIAS] is not None
        raise Decline(f"its step {'adds a bias to scores' if biased else 'does more than attend over the cache'}")
    if node.attributes.get_int("do_rotary", 0) or node.attributes.get_int("smooth_softmax", 0):
        raise Decline("its step does more than attend over the cache")
    read: Any = dims_of(node.inputs[0]) if node.inputs[0] is not None else None
    window = node.attributes.get_int("local_window_size", -1)
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(size)
    tokens = 1 if read is not None and read[1] == 1 else None
    return CacheSite(layer, node, heads, kv_heads, size, scale, window if window >= 0 else None, tokens)
