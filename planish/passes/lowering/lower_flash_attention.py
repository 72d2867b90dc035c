"""Gives long attention without a mask to ONNX Runtime's flash kernel."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.fusion.mask_allows import mask_allows
from planish.passes.fusion.sizes import size_vector, sizes
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass


@register
@dataclass(frozen=True)
class LowerFlashAttention(RewritePass):
    """Replaces ``Attention(Q, K, V)`` over many keys by com.microsoft's MultiHeadAttention.

    On the CPU that operator has a blocked kernel that never holds all scores (Dao et al. 2022, arXiv:2205.14135),
    used only without mask, bias and cache. At 1024 keys it is 1.1 to 1.2 times as fast as Attention, at 2048 1.14 to
    1.28 times, and at 384 it is up to 9% behind (`benchmarks/flash_attention.py`; 1.31.1, one thread). A mask is
    looked at when the model runs: where it hides nothing, as without padding, the flash kernel computes the same.

    Attributes:
        from_length: the least number of keys.
        symbolic: also where the number of keys is known only when the model runs. Each attention then costs an If
            more, about 1% of a small encoder with 32 tokens, so this is for models whose inputs are long.
    """

    from_length: int = 1024
    symbolic: bool = False

    name: ClassVar[str] = "lower-flash-attention"
    min_opset: ClassVar[int] = 23

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        node = match.root
        if match.target.name != "ort-cpu":
            raise Decline(f"target {match.target.name} has its own attention kernels")
        if match.graph is not match.model.graph:
            raise Decline("it is inside of a branch, which chose it already")
        if any(match.dtype(name) != ir.DataType.FLOAT for name in "qkv"):
            raise Decline("it is not float32, for which the flash kernel is")
        if any(match.rank(name) != 3 for name in "qkv"):
            raise Decline("its heads are an axis of their own; the flash kernel reads (batch, length, hidden)")
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is not None and match.is_constant(mask):
            raise Decline(f"its mask '{mask.name}' is a constant")
        if mask is not None and mask_allows(mask) is not None:
            raise Decline(f"its mask '{mask.name}' is causal, which the flash kernel is not")
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
        if not isinstance(length, int) and not self.symbolic:
            raise Decline(
                f"the number of keys is {length or 'unknown'}, and short ones are faster as they are "
                "(if they are long, say symbolic=True)"
            )
        if isinstance(length, int) and length < self.from_length:
            raise Decline(f"it has {length} keys, and the flash kernel pays from {self.from_length} on")

    def rewrite(self, op: Any, match: Match, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        node = match.root
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        conditions = []
        term = (sizes(k) or (0, (k, 1)))[1]
        if not isinstance(term, int):
            length = size_vector(op, term, k, 1, match.graph)
            conditions.append(op.GreaterOrEqual(length, np.array([self.from_length], dtype=np.int64)))
        if mask is not None:
            conditions.append(_hides_nothing(op, mask))

        def flash() -> list[ir.Value]:
            heads, scale = node.attributes.get_int("q_num_heads"), node.attributes.get("scale")
            made = op.MultiHeadAttention(q, k, v, num_heads=heads, scale=scale, _domain="com.microsoft")
            made.type, made.shape = match.output.type, match.output.shape
            return [made]

        def plain() -> list[ir.Value]:
            made = op.Attention(*node.inputs, **dict(node.attributes))
            made.type, made.shape = match.output.type, match.output.shape
            return [made]

        if not conditions:
            return flash()[0]
        condition = functools.reduce(op.And, conditions)
        branches = {"then_branch": op.graph(flash, "flash"), "else_branch": op.graph(plain, "plain")}
        chosen: ir.Value = op.If(condition, **branches)
        chosen.type, chosen.shape = match.output.type, match.output.shape
        return chosen


def _hides_nothing(op: Any, mask: ir.Value) -> ir.Value:
    """Whether all of a mask is true, or zero; an empty one hides nothing. A vector of one bool, shared by layers."""
    node = mask.producer()
    while is_op(node, "Expand") or is_op(node, "Unsqueeze"):  # reads less, and says the same
        assert node is not None and node.inputs[0] is not None
        mask = node.inputs[0]
        node = mask.producer()
    flat = op.Reshape(mask, np.array([-1], dtype=np.int64))
    if mask.dtype == ir.DataType.BOOL:
        ones = op.Concat(op.Cast(flat, to=ir.DataType.INT32), np.ones(1, dtype=np.int32), axis=0)
        kept: ir.Value = op.Equal(op.ReduceMin(ones, keepdims=1), np.array([1], dtype=np.int32))
        return kept
    zeros = op.Concat(op.Abs(flat), np.zeros(1, dtype=np.float32), axis=0)
    zero: ir.Value = op.Equal(op.ReduceMax(zeros, keepdims=1), np.array([0], dtype=np.float32))
    return zero
