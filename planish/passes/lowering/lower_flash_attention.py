"""Gives long attention without a mask to ONNX Runtime's flash kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass


@register
@dataclass(frozen=True)
class LowerFlashAttention(RewritePass):
    """Replaces ``Attention(Q, K, V)`` over many keys by com.microsoft's MultiHeadAttention.

    On the CPU that operator has a blocked kernel that never holds all scores (Dao et al. 2022, arXiv:2205.14135),
    used only without mask, bias and cache. At 1024 keys it is 1.1 to 1.2 times as fast as Attention, at 2048 1.14 to
    1.28 times, and at 384 it is up to 9% behind (`benchmarks/flash_attention.py`; 1.31.1, one thread).

    Args:
        from_length: the least number of keys; it must be known, since one artifact may see short inputs too.
    """

    from_length: int = 1024

    name: ClassVar[str] = "lower-flash-attention"
    min_opset: ClassVar[int] = 23

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        node = match.root
        if match.target.name != "ort-cpu":
            raise Decline(f"target {match.target.name} has its own attention kernels")
        if any(match.dtype(name) != ir.DataType.FLOAT for name in "qkv"):
            raise Decline("it is not float32, for which the flash kernel is")
        if any(match.rank(name) != 3 for name in "qkv"):
            raise Decline("its heads are an axis of their own; the flash kernel reads (batch, length, hidden)")
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            raise Decline("it has a mask, which the flash kernel does not take")
        if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
            raise Decline("it reads or writes a cache, or gives its scores")
        if node.attributes.get_int("is_causal", 0):
            raise Decline("it is causal, which the flash kernel is not")
        if node.attributes.get_float("softcap", 0.0):
            raise Decline("its scores are capped, which the flash kernel does not do")
        heads, kv_heads = (node.attributes.get_int(f"{n}_num_heads", 0) for n in ("q", "kv"))
        if heads != kv_heads:
            raise Decline(f"{heads} heads of queries share {kv_heads} of keys; the flash kernel wants one each")
        length = (match.shape("k") or (None,) * 3)[1]
        if not isinstance(length, int):
            raise Decline(f"the number of keys is {length or 'unknown'}, and short ones are faster as they are")
        if length < self.from_length:
            raise Decline(f"it has {length} keys, and the flash kernel pays from {self.from_length} on")

    def rewrite(self, op: Any, match: Match, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        node = match.root
        heads, scale = node.attributes.get_int("q_num_heads"), node.attributes.get("scale")
        fused: ir.Value = op.MultiHeadAttention(q, k, v, num_heads=heads, scale=scale, _domain="com.microsoft")
        fused.type, fused.shape = match.output.type, match.output.shape
        return fused
