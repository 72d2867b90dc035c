"""Recovers the Attention operator (opset 23) from matrix products and a softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.attention_mask import BuiltMask, build_mask
from planish.passes.fusion.attention_match import Attention, match_attention, softmax_behind
from planish.passes.fusion.sizes import Term, sizes
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass


@register
@dataclass(frozen=True)
class FuseAttention(RewritePass):
    """Replaces softmax(scale * Q K^T + mask) V by ``Attention(Q, K, V, mask)`` over heads, (B, H, S, D).

    Understands what torch writes for scaled_dot_product_attention below opset 23 (both factors scaled, keys
    transposed through three dimensions, NaN guard), eager attention of transformers, and TorchScript graphs; masks
    added, filled in, or both, scales before or after the product, a softcap. A mask is kept as a mask, causal ones
    too. Attention gives zeros for a row whose keys are all at ``-inf``, where the graph has NaN: a mask that may hold
    such rows (one that is an input, say) goes to com.microsoft.MultiHeadAttention, which has the meaning of the graph.
    """

    name: ClassVar[str] = "fuse-attention"
    min_opset: ClassVar[int] = 23
    remove_nodes: ClassVar[bool] = False

    def pattern(self, op: Any, weights: Any, v: Any) -> Any:
        weights = Var("weights", check=lambda _, value: softmax_behind(value) is not None)
        return op.MatMul(weights, v)

    def rewrite(self, op: Any, match: Match) -> ir.Value:
        found = match_attention(match.root)
        lengths = _require_heads(found)
        if found.scale <= 0:
            raise Decline(f"the scores are scaled by {found.scale:g}, and Attention takes positive scales")
        mask = build_mask(op, found, lengths, match.graph)
        if mask.plain and match.target.runtime != "ort":
            raise Decline("the mask may hold -inf: a row of them is NaN here and zeros in Attention")
        if found.softcap and found.masks and match.target.runtime != "ort":
            raise Decline("scores are capped before they are masked, which is the order of ONNX Runtime's kernel alone")
        # Nodes of the chain that nothing else needs leave with the match.
        match.nodes = tuple(found.nodes)
        if mask.plain:
            return _multi_head(op, found, mask)
        key = op.Transpose(found.k, perm=found.k_perm) if found.k_perm else found.k
        inputs = [found.q, key, found.v] + ([mask.value] if mask.value is not None else [])
        fused: ir.Value = op.Attention(*inputs, scale=found.scale, softcap=found.softcap or None)
        if not match.output.is_graph_output() and found.q.shape is not None and found.v.shape is not None:
            # Names of sizes that broadcasting over the mask had lost.
            fused.shape = ir.Shape([*found.q.shape[:3], found.v.shape[3]])
        return fused


def _multi_head(op: Any, found: Attention, mask: BuiltMask) -> ir.Value:
    """The plain meaning, which is that of com.microsoft.MultiHeadAttention: (B, S, H * D) for queries and output."""
    if found.softcap:
        raise Decline("the mask may hold -inf next to a softcap, and no operator has both")
    q, v = sizes(found.q), sizes(found.v)
    assert q is not None and v is not None
    if not isinstance(q[3], int) or not isinstance(v[3], int):
        raise Decline("the depth of the heads is unknown, and the mask may hold -inf, which Attention takes for zeros")
    heads: int = q[1]  # type: ignore[assignment]
    key = found.k if found.k_perm else op.Transpose(found.k, perm=[0, 2, 1, 3])
    parts = (
        op.Reshape(op.Transpose(found.q, perm=[0, 2, 1, 3]), [0, 0, heads * q[3]]),
        op.Reshape(key, [0, 0, heads * q[3]]),
        op.Reshape(op.Transpose(found.v, perm=[0, 2, 1, 3]), [0, 0, heads * v[3]]),
    )
    joined = op.MultiHeadAttention(
        *parts, None, None, mask.value, num_heads=heads, scale=found.scale, _domain="com.microsoft"
    )
    # onnx has no rule for operators of other domains.
    joined.type, joined.shape = found.q.type, ir.Shape([found.q.shape[0], found.q.shape[2], heads * v[3]])  # type: ignore
    if mask.guarded:
        joined = op.Where(op.IsNaN(joined), np.float32(0.0), joined)
    out: ir.Value = op.Transpose(op.Reshape(joined, [0, 0, heads, v[3]]), perm=[0, 2, 1, 3])
    return out


def _require_heads(found: Attention) -> tuple[Term, Term]:
    """Checks that q, k, v are (batch, heads, length, depth) as Attention reads them; returns both lengths."""
    for role, value in (("queries", found.q), ("keys", found.k), ("values", found.v)):
        if value.dtype != ir.DataType.FLOAT:
            raise Decline(f"the {role} are {value.dtype.name if value.dtype else 'of unknown dtype'}, not float32")
    q, v, k = sizes(found.q), sizes(found.v), sizes(found.k)
    if q is None or k is None or v is None:
        raise Decline("the rank of queries, keys or values is unknown")
    if not len(q) == len(k) == len(v) == 4:
        raise Decline(f"queries, keys and values have ranks {len(q)}, {len(k)}, {len(v)}; Attention takes 4")
    if found.k_perm is not None:
        k = tuple(k[i] for i in found.k_perm)
    for axis, what in ((0, "batch"), (1, "heads")):
        known = [d[axis] for d in (q, k, v)]
        numbers = {d for d in known if isinstance(d, int)}
        # One broadcast over another is not what Attention means by it; names that differ may still be equal.
        if len(numbers) > 1 or (numbers == {1} and not all(d == 1 for d in known)):
            raise Decline(f"queries, keys and values differ in {what}: {', '.join(map(_shown, known))}")
        if axis == 1 and len(numbers) != 1:
            raise Decline("the number of heads is unknown")
    return q[2], k[2]


def _shown(term: Term) -> str:
    return "?" if isinstance(term, tuple) else str(term)
