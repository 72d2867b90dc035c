"""Queries, keys and values that one product packs, with the parts as an axis of their own in front of the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.sizes import rank, sizes
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_PERM = [2, 0, 3, 1, 4]


@register
@dataclass(frozen=True)
class SplitPackedHeads(RewritePass):
    """Splits ``Transpose(Reshape(x, [batch, length, 3, heads, size]), [2, 0, 3, 1, 4])[i]`` before the heads.

    ``x`` is split along its last axis, and each part has its heads for itself, as `unpack-qkv` and
    `merge-attention-heads` look for them: one copy of everything is gone. Vision transformers are written so.
    """

    name: ClassVar[str] = "split-packed-heads"
    min_opset: ClassVar[int] = 18

    def rules(self) -> Sequence[Rule]:
        patterns = {"gather": _gathered, "split": _unbound}
        return [Rule(f"split-packed-heads-{name}", p, _split, None, self.min_opset) for name, p in patterns.items()]


def _packed(op: Any, x: Any, shape: Any) -> Any:
    apart = op.Reshape(x, shape, _allow_other_attributes=True, _outputs=["apart"])
    return op.Transpose(apart, perm=_PERM)


def _gathered(op: Any, x: Any, shape: Any) -> Any:
    parts = _packed(op, x, shape)
    return tuple(op.Gather(parts, i, axis=0) for i in range(3))


def _unbound(op: Any, x: Any, shape: Any) -> Any:
    parts = op.Split(_packed(op, x, shape), axis=0, _allow_other_inputs=True, _outputs=["a", "b", "c"])
    return tuple(op.Squeeze(part, [0]) for part in parts)


def _split(op: Any, match: Match, x: ir.Value, apart: ir.Value) -> list[ir.Value]:
    dims = sizes(apart)
    if rank(x) != 3 or dims is None or len(dims) != 5 or dims[2] != 3:
        raise Decline("it does not take (batch, length, 3 · heads · size) apart")
    heads, size = dims[3:]
    before = sizes(x)
    if not isinstance(heads, int) or not isinstance(size, int) or before is None or before[2] != 3 * heads * size:
        raise Decline("the number or the size of the heads is unknown")
    if before[0] != dims[0] and before[1] != dims[1]:
        raise Decline("its batch and length are not known to be those of the heads")
    results = []
    for part, output in zip(op.Split(x, axis=-1, num_outputs=3, _outputs=3), match.outputs, strict=True):
        part.type = x.type
        if x.shape is not None:
            part.shape = ir.Shape([*list(x.shape)[:2], heads * size])
        split = op.Reshape(part, [0, 0, heads, size])
        split.type = x.type
        if x.shape is not None:
            split.shape = ir.Shape([*list(x.shape)[:2], heads, size])
        turned = op.Transpose(split, perm=[0, 2, 1, 3])
        turned.type, turned.shape = output.type, output.shape
        results.append(turned)
    return results
