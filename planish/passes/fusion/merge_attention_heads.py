"""Lets Attention take and give (batch, length, hidden), so that no copy splits and joins the heads around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.fusion.sizes import contents, rank, sizes, transposed_with
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_SWAP = (0, 2, 1, 3)
Heads = tuple[ir.Value, int, int, ir.Node | None]


@register
@dataclass(frozen=True)
class MergeAttentionHeads(RewritePass):
    """Replaces Attention between ``Reshape, Transpose(0 2 1 3)`` on each side by its three-dimensional form.

    A RotaryEmbedding of queries and keys in between is put into its three-dimensional form as well.

    On ONNX Runtime's CPU kernel this is 1.3 to 1.6 times as fast at up to 128 tokens, and 1.1 times at 512.
    """

    name: ClassVar[str] = "merge-attention-heads"
    min_opset: ClassVar[int] = 23

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("merge-attention-heads", _attention_pattern, _merge, None, self.min_opset),
            Rule("merge-attention-heads-output", _reshape_pattern, _drop_reshape, None, self.min_opset),
        )


def _attention_pattern(op: Any, q: Any, k: Any, v: Any) -> Any:
    heads = op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["heads"])
    return op.Transpose(heads, perm=list(_SWAP))


def _merge(op: Any, match: Match, heads: ir.Value) -> ir.Value:
    node = heads.producer()
    assert node is not None
    if any(v is not None for v in node.inputs[4:]) or len(node.outputs) > 1:
        raise Decline("the attention reads or writes a cache")
    split = [split_heads(role, v) for role, v in zip(("queries", "keys", "values"), node.inputs, strict=False)]
    (_, q_heads, _, _), (_, kv_heads, _, _), (_, v_heads, depth, _) = split
    if kv_heads != v_heads:
        raise Decline(f"keys have {kv_heads} heads and values have {v_heads}")
    flat = [turned(op, *part) for part in split]
    attributes = {name: a for name, a in node.attributes.items() if name not in ("q_num_heads", "kv_num_heads")}
    mask = list(node.inputs[3:4])
    out = op.Attention(*flat, *mask, q_num_heads=q_heads, kv_num_heads=kv_heads, **attributes)
    source = split[0][0].shape
    if source is not None:
        out.shape = ir.Shape([source[0], source[1], q_heads * depth])
    out.type = heads.type
    result: ir.Value = op.Reshape(out, [0, 0, q_heads, depth])
    return result


def split_heads(role: str, value: ir.Value | None) -> Heads:
    """(value before the Transpose, heads, depth, the rotary embedding after the Transpose if there is one)."""
    node = value.producer() if value is not None else None
    rotary = node if is_op(node, "RotaryEmbedding") else None
    if rotary is not None:
        node = rotary.inputs[0].producer() if rotary.inputs[0] is not None else None
    if not transposed_with(node, *_SWAP):
        raise Decline(f"the {role} are not split into heads by a Transpose of axes 1 and 2")
    before = node.inputs[0]  # type: ignore[union-attr]
    dims = sizes(before)
    if before is None or dims is None or not isinstance(dims[2], int) or not isinstance(dims[3], int):
        raise Decline(f"the number or the depth of the heads of the {role} is unknown")
    return before, dims[2], dims[3], rotary


def turned(op: Any, value: ir.Value, heads: int, depth: int, rotary: ir.Node | None) -> ir.Value:
    """`value`, (B, S, heads, depth), as (B, S, heads * depth), with the rotary embedding, which takes either form."""
    joined = _joined(op, value, heads, depth)
    if rotary is None:
        return joined
    attributes = {name: a for name, a in rotary.attributes.items() if name != "num_heads"}
    turned: ir.Value = op.RotaryEmbedding(joined, *rotary.inputs[1:], num_heads=heads, **attributes)
    turned.type, turned.shape = joined.type, joined.shape
    return turned


def _joined(op: Any, value: ir.Value, heads: int, depth: int) -> ir.Value:
    """The same without rotary embedding: what `value` was reshaped from if that is proved to have this shape."""
    node = value.producer()
    if is_op(node, "Reshape"):
        source = node.inputs[0]  # type: ignore[union-attr]
        if _same_rows(source, value, heads * depth):
            return source  # type: ignore[return-value]
    joined: ir.Value = op.Reshape(value, [0, 0, heads * depth])
    if value.shape is not None:
        joined.shape = ir.Shape([value.shape[0], value.shape[1], heads * depth])
    joined.type = value.type
    return joined


def _same_rows(source: ir.Value | None, other: ir.Value, hidden: int) -> bool:
    """Whether `source`, (B, S, hidden), has the batch and length of `other`, of as many elements."""
    before, after = sizes(source), sizes(other)
    if before is None or after is None or len(before) != 3 or before[2] != hidden:
        return False
    if len(after) == 3 and after[2] != hidden:
        return False
    # One axis that agrees determines the other.
    return before[0] == after[0] or before[1] == after[1]


def _reshape_pattern(op: Any, q: Any, k: Any, v: Any, apart: Any, shape: Any) -> Any:
    merged = op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["merged"])
    return op.Reshape(op.Reshape(merged, apart), shape, _allow_other_attributes=True)


def _drop_reshape(op: Any, match: Match, merged: ir.Value, shape: ir.Value) -> ir.Value:
    node = merged.producer()
    assert node is not None
    if rank(merged) != 3 or merged.shape is None:
        raise Decline("the attention is not in its three-dimensional form")
    attributes = dict(node.attributes)
    hidden = merged.shape[2]
    if rank(match.output) == 3 and isinstance(hidden, int) and _same_rows(merged, match.output, hidden):
        again: ir.Value = op.Attention(*node.inputs, **attributes)
        return again
    items = contents(shape)
    if items is None or 0 in items[2:]:
        raise Decline("the shape that the heads are joined to is unknown")
    out = op.Attention(*node.inputs, **attributes)
    out.shape, out.type = merged.shape, merged.type
    keep = match.root.attributes.get_int("allowzero", 0)
    result: ir.Value = op.Reshape(out, shape, allowzero=keep or None)
    return result
