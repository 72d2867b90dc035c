"""Decoding: lets Attention append to the key-value cache, so that what is cached is copied once and not twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.merge_attention_heads import Heads, split_heads, turned
from planish.passes.fusion.sizes import sizes
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass


@register
@dataclass(frozen=True)
class FuseKvCache(RewritePass):
    """Replaces ``Attention(q, Concat(past_k, k), Concat(past_v, v))`` by the form of Attention with a past.

    Its outputs `present_key` and `present_value` take the place of the concatenations. Queries and new keys and values
    are read as (batch, length, hidden) where that is what they were split from. On ONNX Runtime's CPU kernel one
    token over a cache of 512 to 2048 takes 0.7 to 0.9 of the time with 12 heads, and 0.95 to 0.97 with 16 heads on 4
    (``benchmarks/attention_forms.py``), and is faster there than MultiHeadAttention and GroupQueryAttention.
    """

    name: ClassVar[str] = "fuse-kv-cache"
    min_opset: ClassVar[int] = 23
    remove_nodes: ClassVar[bool] = False

    def pattern(self, op: Any, q: Any, past_k: Any, k: Any, past_v: Any, v: Any) -> Any:
        keys = op.Concat(past_k, k, _allow_other_attributes=True, _outputs=["keys"])
        values = op.Concat(past_v, v, _allow_other_attributes=True, _outputs=["values"])
        out = op.Attention(q, keys, values, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["out"])
        return out, keys, values

    def rewrite(self, op: Any, match: Match, **_: Any) -> Sequence[ir.Value]:
        node = match["out"].producer()
        assert node is not None
        _check(node, match)
        parts = [match["q"], match["k"], match["v"]]
        attributes = {name: a for name, a in node.attributes.items() if name not in ("q_num_heads", "kv_num_heads")}
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        try:
            split: list[Heads] = [split_heads(r, x) for r, x in zip(("queries", "keys", "values"), parts, strict=True)]
        except Decline:
            out, keys, values = op.Attention(*parts, mask, match["past_k"], match["past_v"], _outputs=3, **attributes)
            return _named(match, out, keys, values)
        flat = [turned(op, *part) for part in split]
        heads = {"q_num_heads": split[0][1], "kv_num_heads": split[1][1]}
        joined, keys, values = op.Attention(
            *flat, mask, match["past_k"], match["past_v"], _outputs=3, **heads, **attributes
        )
        source, depth = split[0][0].shape, split[2][2]
        if source is not None:
            joined.shape = ir.Shape([source[0], source[1], split[0][1] * depth])
        joined.type = match["out"].type
        apart = op.Reshape(joined, [0, 0, split[0][1], depth])
        return _named(match, op.Transpose(apart, perm=[0, 2, 1, 3]), keys, values)


def _named(match: Match, out: ir.Value, keys: ir.Value, values: ir.Value) -> Sequence[ir.Value]:
    for new, old in ((keys, match["keys"]), (values, match["values"])):
        new.shape, new.type = old.shape, old.type
    return out, keys, values


def _check(node: ir.Node, match: Match) -> None:
    if any(x is not None for x in node.inputs[4:]) or len(node.outputs) > 1:
        raise Decline("the attention reads or writes a cache already")
    if node.attributes.get_int("is_causal", 0):
        raise Decline("the attention is causal, which counts positions from elsewhere when there is a past")
    for role in ("keys", "values"):
        concat = match[role].producer()
        assert concat is not None
        if len(concat.inputs) != 2:
            raise Decline(f"the {role} are put together from {len(concat.inputs)} parts")
        dims = [sizes(x) for x in (*concat.inputs, match[role])]
        if any(d is None or len(d) != 4 for d in dims):
            raise Decline(f"the {role} are not known to be (batch, heads, length, depth)")
        if concat.attributes.get_int("axis", 0) not in (2, -2):
            raise Decline(f"the {role} are put together along axis {concat.attributes.get_int('axis', 0)}, not length")
        if match[role].dtype != ir.DataType.FLOAT:
            raise Decline(f"the {role} are not float32")
    others = {user for role in ("keys", "values") for user in match[role].consumers() if user is not node}
    if others and _needs(node, others):
        raise Decline("what the attention reads is computed from its keys or values with the past in them")


def _needs(node: ir.Node, others: set[ir.Node]) -> bool:
    """Whether `node` needs a result of `others`."""
    queue, seen = deque([node]), {node}
    while queue:
        for value in queue.popleft().inputs:
            before = value.producer() if value is not None else None
            if before in others:
                return True
            if before is not None and before not in seen:
                seen.add(before)
                queue.append(before)
    return False
