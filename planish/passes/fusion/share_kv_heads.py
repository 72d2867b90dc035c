"""Grouped-query attention without copies: lets Attention read the key and value heads that several queries share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.fusion.sizes import contents, sizes
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass


@register
@dataclass(frozen=True)
class ShareKvHeads(RewritePass):
    """Removes the repetition of key and value heads (Unsqueeze, Expand, Reshape) in front of Attention.

    Attention maps query head i to key head i // (query heads / key heads), as ``repeat_kv`` and
    ``repeat_interleave`` do (Ainslie et al. 2023, arXiv:2305.13245).
    """

    name: ClassVar[str] = "share-kv-heads"
    min_opset: ClassVar[int] = 23
    remove_nodes: ClassVar[bool] = False

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        k = Var("k", check=lambda _, value: _expanded(value) is not None)
        v = Var("v", check=lambda _, value: _expanded(value) is not None)
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True)

    def rewrite(self, op: Any, match: Match, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        root = match.root
        if any(x is not None for x in root.inputs[4:]) or len(root.outputs) > 1:
            raise Decline("the attention reads or writes a cache")
        heads = (sizes(q) or (None,) * 2)[1]
        keys, values = _shared("keys", k, heads), _shared("values", v, heads)
        if keys[1] != values[1]:
            raise Decline(f"keys have {keys[1]} heads and values have {values[1]}")
        match.nodes = (root, *_chain(k), *_chain(v))
        fused: ir.Value = op.Attention(q, keys[0], values[0], *root.inputs[3:4], **dict(root.attributes))
        return fused


def _expanded(value: ir.Value | None) -> ir.Value | None:
    """What was repeated, if `value` is ``Reshape(Expand(Unsqueeze(x, 2), ...), ...)``."""
    node = value.producer() if value is not None else None
    for expected in ("Reshape", "Expand", "Unsqueeze"):
        if not is_op(node, expected):
            return None
        value = node.inputs[0]  # type: ignore[union-attr]
        if expected != "Unsqueeze":
            node = value.producer() if value is not None else None
    axis = contents(node.inputs[1])  # type: ignore[union-attr]
    return value if axis == (2,) or axis == (-3,) else None


def _chain(value: ir.Value) -> list[ir.Node]:
    reshape = value.producer()
    expand = reshape.inputs[0].producer()  # type: ignore[union-attr]
    return [reshape, expand, expand.inputs[0].producer()]  # type: ignore


def _shared(role: str, value: ir.Value, heads: Any) -> tuple[ir.Value, int]:
    """(what was repeated, its number of heads); the repetition must be of heads and of nothing else."""
    base = _expanded(value)
    expand = value.producer().inputs[0]  # type: ignore[union-attr]
    before, middle, after = sizes(base), sizes(expand), sizes(value)
    if base is None or before is None or middle is None or after is None or not len(before) == len(after) == 4:
        raise Decline(f"the shapes around the repetition of the {role} are unknown")
    kv_heads, depth = before[1], before[3]
    if not (isinstance(kv_heads, int) and isinstance(heads, int) and isinstance(depth, int)):
        raise Decline(f"the number or the depth of the heads of the {role} is unknown")
    if after[1] != heads or heads % kv_heads or len(middle) != 5:
        raise Decline(f"{kv_heads} heads of the {role} are not repeated for {heads} heads of queries")
    # Batch and length must come through as they are: by name or number, or else the Expand might repeat them too.
    kept = (before[0], kv_heads, heads // kv_heads, before[2], depth)
    if middle != kept or (after[0], after[2], after[3]) != (before[0], before[2], depth):
        raise Decline(f"batch or length of the {role} may change where their heads are repeated")
    return base, kv_heads
