"""Attention as an operator that has a generated kernel."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.ops import DIALECT_DOMAIN
from planish.passes.base import Decline
from planish.passes.fusion.sizes import sizes
from planish.passes.lowering.mask_parts import MaskParts, mask_parts
from planish.passes.registry import register
from planish.passes.rewrite import DialectRewritePass, Match


@register
@dataclass(frozen=True)
class LowerAttention(DialectRewritePass):
    """Replaces Attention by planish::FlashAttention, without its mask where the mask is causal.

    The kernel never holds all scores (Dao 2023, arXiv:2307.08691), and does not compute blocks of keys that are after
    all of their queries. What else a mask hides must be the same for all queries, as padding is: then it is a vector
    for each sequence. Masks that are neither stay with ONNX Runtime's operator.
    """

    name: ClassVar[str] = "lower-attention"
    min_opset: ClassVar[int] = 23

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        node = match.root
        if match.target.name != "ort-cpu" or not match.target.kernels:
            raise Decline(f"target '{match.target}' has no generated kernels; 'ort-cpu:kernels' has")
        if any(match.dtype(name) != ir.DataType.FLOAT for name in "qkv"):
            raise Decline("it is not float32, which alone has kernels")
        if any(match.rank(name) != 3 for name in "qkv"):
            raise Decline("its heads are an axis of their own; kernels read (batch, length, heads and their size)")
        if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
            raise Decline("it reads or writes a cache, or gives its scores")
        if node.attributes.get_float("softcap", 0.0):
            raise Decline("its scores are capped, which kernels do not do")
        if match.graph is not match.model.graph:
            raise Decline("it is inside of a branch, which chose it already")
        if (match.shape("q") or (None,) * 3)[1] == 1:
            raise Decline("it has one query, and kernels take many at a time")
        if not isinstance((match.shape("q") or (None,) * 3)[2], int):
            raise Decline("the size of its heads is unknown")
        if match.shape("k") is not None and match.shape("v") is not None and _widths_differ(match):
            raise Decline("its heads of keys and of values differ in size")

    def rewrite(self, op: Any, match: Match, q: ir.Value, k: ir.Value, v: ir.Value) -> Any:
        node = match.root
        heads, kv_heads = (node.attributes.get_int(f"{name}_num_heads", 0) for name in ("q", "kv"))
        width = (match.shape("q") or (None,) * 3)[2]
        assert isinstance(width, int)
        parts = self._parts(node)
        settings: dict[str, Any] = {
            "q_num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": node.attributes.get_float("scale", 1 / math.sqrt(width // heads)),
            "is_causal": int(parts.causal or bool(node.attributes.get_int("is_causal", 0))),
            "_domain": DIALECT_DOMAIN,
        }
        if not parts.keys:
            return op.FlashAttention(q, k, v, **settings)
        mask = functools.reduce(op.And, [_of_rank_4(op, value) for value in parts.keys])
        return op.FlashAttentionKeyMask(q, k, v, mask, hidden_score=parts.hidden, **settings)

    def _parts(self, node: ir.Node) -> MaskParts:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None:
            return MaskParts()
        q, k = (sizes(value) for value in node.inputs[:2])
        assert q is not None and k is not None
        return mask_parts(mask, q[1], k[1])


def _of_rank_4(op: Any, value: ir.Value) -> ir.Value:
    missing = 4 - len(sizes(value) or ())
    wide: ir.Value = op.Unsqueeze(value, list(range(missing))) if missing else value
    return wide


def _widths_differ(match: Match) -> bool:
    k, v = match.shape("k"), match.shape("v")
    return k is None or v is None or k[2] != v[2]
