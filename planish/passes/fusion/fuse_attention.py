"""Recovers the Attention operator (opset 23) from matrix products and a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.fusion.attention_flat import lifted, one_head_mask, proved, shaped, unflattened_mask
from planish.passes.fusion.attention_mask import BuiltMask, build_mask
from planish.passes.fusion.attention_match import Attention, match_attention, softmax_behind
from planish.passes.fusion.sizes import Term, product, rank, size_vector, sizes, transposed_with
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_SWAP = (0, 2, 1, 3)


@register
@dataclass(frozen=True)
class FuseAttention(RewritePass):
    """Replaces softmax(scale * Q K^T + mask) V by ``Attention(Q, K, V, mask)`` over heads, (B, H, S, D).

    Products of rank 3, over heads that were joined to the batch (torch.bmm, torch.baddbmm), become the same; those of
    (B, S, D) without heads become Attention with one head, which the passes that lower Attention know.

    Understands what torch writes for scaled_dot_product_attention below opset 23 (both factors scaled, keys
    transposed through three dimensions, NaN guard), eager attention of transformers, and TorchScript graphs; masks
    added, filled in, or both, scales before or after the product, a softcap. A mask is kept as a mask, causal ones
    too. Attention gives zeros for a row whose keys are all at ``-inf``, where the graph has NaN: a mask that may hold
    such rows (one that is an input, say) goes to com.microsoft.MultiHeadAttention, which has the meaning of the graph.
    """

    name: ClassVar[str] = "fuse-attention"
    min_opset: ClassVar[int] = 23

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("fuse-attention", _product, _fuse, None, self.min_opset, remove_nodes=False),
            Rule("fuse-attention-parted", _parted, _drop_parting, None, self.min_opset, remove_nodes=False),
            Rule("fuse-attention-turned", _turned, _turn, None, self.min_opset),
            Rule("fuse-attention-flat-turned", _flat_turned, _turn, None, self.min_opset),
        )


def _product(op: Any, weights: Any, v: Any) -> Any:
    weights = Var("weights", check=lambda _, value: softmax_behind(value) is not None)
    return op.MatMul(weights, v)


def _fuse(op: Any, match: Match) -> ir.Value:
    found = match_attention(match.root)
    # Nodes of the chain that nothing else needs leave with the match.
    match.nodes = tuple(found.nodes)
    _lift(op, found, match.graph)
    lengths = _require_heads(found)
    if found.scale <= 0:
        raise Decline(f"the scores are scaled by {found.scale:g}, and Attention takes positive scales")
    mask = build_mask(op, found, lengths, match.graph)
    if mask.plain and match.target.runtime != "ort":
        raise Decline("the mask may hold -inf: a row of them is NaN here and zeros in Attention")
    if found.softcap and found.masks and match.target.runtime != "ort":
        raise Decline("scores are capped before they are masked, which is the order of ONNX Runtime's kernel alone")
    fused = _multi_head(op, found, mask) if mask.plain else _attention(op, found, mask)
    joined = found.flat and found.rows is not None
    if (joined or not match.output.is_graph_output()) and found.q.shape is not None and found.v.shape is not None:
        # Names of sizes that broadcasting over the mask had lost.
        fused.type, fused.shape = found.q.type, ir.Shape([*found.q.shape[:-1], found.v.shape[-1]])
    if not joined:
        return fused
    q, v = sizes(found.q), sizes(found.v)
    assert q is not None and v is not None
    tail = [size_vector(op, q[2], found.q, 2, match.graph), size_vector(op, v[3], found.v, 3, match.graph)]
    flat: ir.Value = op.Reshape(fused, op.Concat(np.array([-1], dtype=np.int64), *tail, axis=0))
    return flat


def _attention(op: Any, found: Attention, mask: BuiltMask) -> ir.Value:
    key = op.Transpose(found.k, perm=found.k_perm) if found.k_perm else found.k
    inputs = [found.q, key, found.v] + ([mask.value] if mask.value is not None else [])
    heads = {} if rank(found.q) == 4 else {"q_num_heads": 1, "kv_num_heads": 1}
    fused: ir.Value = op.Attention(*inputs, scale=found.scale, softcap=found.softcap or None, **heads)
    return fused


def _lift(op: Any, found: Attention, graph: ir.Graph) -> None:
    """Puts heads that were joined to the batch, or cut out next to it, into an axis of their own."""
    if found.rows is not None:
        found.q, found.k, found.v = (lifted(op, rows) for rows in found.rows)
    for mask in found.masks if found.flat else ():
        if not mask.flat:
            continue
        rows = found.rows
        made = one_head_mask(op, mask.value) if rows is None else unflattened_mask(op, mask.value, rows[0], graph)
        if made is None:
            raise Decline(f"'{mask.value.name}' is not seen to be a mask of each head of each batch")
        mask.value = made


def _attended(value: ir.Value) -> bool:
    """Whether it is the output of Attention, or of MultiHeadAttention with the axes of that."""
    node = value.producer()
    if transposed_with(node, *_SWAP):
        node = node.inputs[0].producer()  # type: ignore[union-attr]
        return is_op(node, "Reshape") and _attended_flat(node.inputs[0])  # type: ignore[union-attr]
    return is_op(node, "Attention") and rank(value) == 4


def _attended_flat(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if is_op(node, "Where"):
        node = node.inputs[2].producer()  # type: ignore[union-attr]
    return node is not None and node.op_type == "MultiHeadAttention"


def _parted(op: Any, whole: Any, flat: Any, shape: Any) -> Any:
    whole = Var("whole", check=lambda _, value: _attended(value))
    return op.Reshape(op.Reshape(whole, flat, _allow_other_attributes=True), shape, _allow_other_attributes=True)


def _drop_parting(op: Any, match: Match, whole: ir.Value) -> ir.Value:
    dims = sizes(whole)
    if dims is None or rank(match.output) != 4 or not proved(match.root, dims):
        raise Decline("the heads are not seen to be parted as they were")
    return whole


def _flat_turned(op: Any, heads: Any, flat: Any) -> Any:
    heads = Var("heads", check=lambda _, value: _attended(value))
    return op.Transpose(op.Reshape(heads, flat, _allow_other_attributes=True), perm=[1, 0, 2])


def _turned(op: Any, heads: Any) -> Any:
    return op.Transpose(Var("heads", check=lambda _, value: _attended(value)), perm=[2, 0, 1, 3])


def _turn(op: Any, match: Match, heads: ir.Value) -> ir.Value:
    """(length, batch) from (batch, heads, length, depth) by way of (batch, length, hidden)."""
    dims = sizes(heads)
    if dims is None or not isinstance(dims[1], int) or not isinstance(dims[3], int):
        raise Decline("the number or the depth of the heads is unknown")
    batch, length, count, depth = dims[0], dims[2], dims[1], dims[3]
    attention = heads.producer()
    if is_op(attention, "Attention") and not all(transposed_with(v.producer(), *_SWAP) for v in attention.inputs[:3]):  # type: ignore
        raise Decline("queries, keys and values are not transposed, and turning their product so would be a copy more")
    inner = match.root.inputs[0].producer()  # type: ignore[union-attr]
    if rank(match.output) == 3 and not proved(inner, (product(batch, count), length, depth)):
        raise Decline("the heads are not seen to be joined to the batch")
    split = shaped(op.Transpose(heads, perm=[0, 2, 1, 3]), heads, (batch, length, count, depth))
    hidden = shaped(op.Reshape(split, [0, 0, count * depth]), heads, (batch, length, count * depth))
    turned = shaped(op.Transpose(hidden, perm=[1, 0, 2]), heads, (length, batch, count * depth))
    result: ir.Value = op.Reshape(turned, [0, 0, count, depth] if rank(match.output) == 4 else [0, -1, depth])
    return result


def _multi_head(op: Any, found: Attention, mask: BuiltMask) -> ir.Value:
    """The plain meaning, which is that of com.microsoft.MultiHeadAttention: (B, S, H * D) for queries and output."""
    if found.softcap:
        raise Decline("the mask may hold -inf next to a softcap, and no operator has both")
    q, v = sizes(found.q), sizes(found.v)
    assert q is not None and v is not None
    if not isinstance(q[-1], int) or not isinstance(v[-1], int):
        raise Decline("the depth of the heads is unknown, and the mask may hold -inf, which Attention takes for zeros")
    if len(q) == 3:
        key = op.Transpose(found.k, perm=found.k_perm) if found.k_perm else found.k
        return _plain(op, found, mask, (found.q, key, found.v), 1)
    heads, depth, v_depth = q[1], q[3], v[3]
    assert isinstance(heads, int) and isinstance(depth, int) and isinstance(v_depth, int)
    key = found.k if found.k_perm else op.Transpose(found.k, perm=[0, 2, 1, 3])
    parts = (
        op.Reshape(op.Transpose(found.q, perm=[0, 2, 1, 3]), [0, 0, heads * depth]),
        op.Reshape(key, [0, 0, heads * depth]),
        op.Reshape(op.Transpose(found.v, perm=[0, 2, 1, 3]), [0, 0, heads * v_depth]),
    )
    joined = _plain(op, found, mask, parts, heads)
    # onnx has no rule for operators of other domains.
    joined.type, joined.shape = found.q.type, ir.Shape([found.q.shape[0], found.q.shape[2], heads * v_depth])  # type: ignore
    out: ir.Value = op.Transpose(op.Reshape(joined, [0, 0, heads, v_depth]), perm=[0, 2, 1, 3])
    return out


def _plain(op: Any, found: Attention, mask: BuiltMask, parts: Sequence[ir.Value], heads: int) -> ir.Value:
    joined: ir.Value = op.MultiHeadAttention(
        *parts, None, None, mask.value, num_heads=heads, scale=found.scale, _domain="com.microsoft"
    )
    joined.type = found.q.type
    return op.Where(op.IsNaN(joined), np.float32(0.0), joined) if mask.guarded else joined


def _require_heads(found: Attention) -> tuple[Term, Term]:
    """Checks that q, k, v are (batch, heads, length, depth) as Attention reads them; returns both lengths."""
    for role, value in (("queries", found.q), ("keys", found.k), ("values", found.v)):
        if value.dtype != ir.DataType.FLOAT:
            raise Decline(f"the {role} are {value.dtype.name if value.dtype else 'of unknown dtype'}, not float32")
    q, v, k = sizes(found.q), sizes(found.v), sizes(found.k)
    if q is None or k is None or v is None:
        raise Decline("the rank of queries, keys or values is unknown")
    if not len(q) == len(k) == len(v) or len(q) not in (3, 4):
        raise Decline(f"queries, keys and values have ranks {len(q)}, {len(k)}, {len(v)}; Attention takes 3 or 4")
    if found.k_perm is not None:
        k = tuple(k[i] for i in found.k_perm)
    for axis, what in enumerate(("batch", "heads")[: len(q) - 2]):
        known = [d[axis] for d in (q, k, v)]
        numbers = {d for d in known if isinstance(d, int)}
        # One broadcast over another is not what Attention means by it; names that differ may still be equal.
        if len(numbers) > 1 or (numbers == {1} and not all(d == 1 for d in known)):
            raise Decline(f"queries, keys and values differ in {what}: {', '.join(map(_shown, known))}")
        if axis == 1 and len(numbers) != 1:
            raise Decline("the number of heads is unknown")
    return q[-2], k[-2]


def _shown(term: Term) -> str:
    return "?" if isinstance(term, tuple) else str(term)
