"""Masks of attention without what is the same for all queries written out for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.sizes import sizes
from planish.passes.lowering.mask_parts import MaskParts, mask_parts
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass

_KEPT = ("q_num_heads", "kv_num_heads")


@register
@dataclass(frozen=True)
class NarrowAttentionMask(RewritePass):
    """Leaves of a mask what hides keys alone, (batch, 1, 1, keys): causal masks become `is_causal`.

    Flash kernels take a bias of each key, and compute nothing of blocks that are after all of their queries; a mask of
    (batch, 1, queries, keys) has them write all scores to memory.
    """

    name: ClassVar[str] = "narrow-attention-mask"
    min_opset: ClassVar[int] = 23

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        node = match.root
        if match.target.name != "tvm-cuda":
            raise Decline(f"target '{match.target}' lowers masks itself; this is for 'tvm-cuda'")
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None:
            raise Decline("it has no mask")
        if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
            raise Decline("it reads or writes a cache, or gives its scores")
        if node.attributes.get_float("softcap", 0.0):
            raise Decline("its scores are capped")
        dims = sizes(mask)
        if dims is None or (len(dims) == 4 and dims[1:3] == (1, 1)):
            raise Decline("its mask is narrow, or of unknown rank")

    def rewrite(self, op: Any, match: Match, q: ir.Value, k: ir.Value, v: ir.Value) -> Any:
        node = match.root
        parts = _parts(node)
        attributes: dict[str, Any] = {
            name: node.attributes.get_int(name, 0) for name in _KEPT if name in node.attributes
        }
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes["scale"].as_float()
        causal = parts.causal or bool(node.attributes.get_int("is_causal", 0))
        mask = _padding(op, match, node.inputs[3], parts)
        inputs = [q, k, v] if mask is None else [q, k, v, mask]
        return op.Attention(*inputs, is_causal=int(causal), **attributes)


def _parts(node: ir.Node) -> MaskParts:
    mask = node.inputs[3]
    lengths = []
    for value in node.inputs[:2]:
        dims = sizes(value)
        if dims is None or len(dims) < 3:
            raise Decline("the shapes of its queries or keys are unknown")
        lengths.append(dims[1 if len(dims) == 3 else 2])
    assert mask is not None
    parts = mask_parts(mask, lengths[0], lengths[1])
    if parts.causal and lengths[0] != lengths[1]:
        raise Decline("it is causal, and its queries and keys are not known to be as many")
    return parts


def _padding(op: Any, match: Match, mask: ir.Value | None, parts: MaskParts) -> Any:
    """The condition on keys in the dtype of the mask that was there; None if there is none."""
    assert mask is not None
    if not parts.keys:
        return None
    seen = _four_axes(op, parts.keys[0])
    for value in parts.keys[1:]:
        seen = op.And(seen, _four_axes(op, value))
    if mask.dtype == ir.DataType.BOOL:
        return seen
    assert mask.dtype is not None
    kind = mask.dtype.numpy()
    hidden = np.array(max(parts.hidden, float(np.finfo(kind).min)), kind)
    return op.Where(seen, op.initializer(np.zeros((), kind)), op.initializer(hidden))


def _four_axes(op: Any, value: ir.Value) -> Any:
    missing = 4 - len(sizes(value) or ())
    return op.Unsqueeze(value, list(range(missing))) if missing else value
