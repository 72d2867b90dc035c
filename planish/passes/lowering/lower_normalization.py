"""Normalization over the last axis, with the residual before it, as operators that have generated kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.graphs import constant_tensor
from planish.ir.ops import DIALECT_DOMAIN
from planish.passes.base import Decline
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import DialectRewritePass, Match, Rule


@register
@dataclass(frozen=True)
class LowerNormalization(DialectRewritePass):
    """Replaces LayerNormalization and RMSNormalization, and an addition in front, by planish::LayerNorm and relatives.

    A row is read once from memory and stays in cache for its statistics; the sum is written in the same pass, where it
    is the residual of the next block. In front of a product with a kernel the addition is in that one's epilogue
    already (`lower-linear` comes first), and only the normalization is left.
    """

    name: ClassVar[str] = "lower-normalization"
    min_opset: ClassVar[int] = 23
    remove_nodes: ClassVar[bool] = False

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(f"{label}-{kind}", pattern(op_type, bias), rewrite, _check, self.min_opset, False)
            for label, pattern, rewrite in (("add", _added, _rewrite_added), ("norm", _plain, _rewrite_plain))
            for kind, op_type, bias in (("layer", "LayerNormalization", True), ("rms", "RMSNormalization", False))
        ]


def _plain(op_type: str, bias: bool) -> Callable[..., Any]:
    def pattern(op: Any, x: Any, scale: Any) -> Any:
        operands = [x, scale, *([Var("bias")] if bias else [])]
        return getattr(op, op_type)(*operands, _allow_other_attributes=True)

    return pattern


def _added(op_type: str, bias: bool) -> Callable[..., Any]:
    def pattern(op: Any, x: Any, residual: Any, scale: Any) -> Any:
        total = op.Add(x, residual, _outputs=["total"])
        operands = [total, scale, *([Var("bias")] if bias else [])]
        return getattr(op, op_type)(*operands, _allow_other_attributes=True), total

    return pattern


def _operands(match: Match) -> list[ir.Value]:
    return [match[name] for name in ("scale", "bias") if name in match.values]


def _settings(match: Match) -> dict[str, Any]:
    return {"epsilon": match.root.attributes.get_float("epsilon", 1e-5), "_domain": DIALECT_DOMAIN}


def _rewrite_plain(op: Any, match: Match) -> Any:
    made = op.LayerNorm if match.root.op_type == "LayerNormalization" else op.RMSNorm
    return made(match["x"], *_operands(match), **_settings(match))


def _rewrite_added(op: Any, match: Match) -> Any:
    x, residual = match["x"], match["residual"]
    shapes = match.shape(x), match.shape(residual)
    if None in shapes or None in (shapes[0] or ()) or shapes[0] != shapes[1]:
        raise Decline(f"summands of shapes {shapes[0]} and {shapes[1]} are not proved to have one shape")
    if any(constant_tensor(value) is not None for value in (x, residual)):
        raise Decline("a summand is a constant")
    made = op.AddLayerNormalization if match.root.op_type == "LayerNormalization" else op.AddRMSNormalization
    return made(x, residual, *_operands(match), **_settings(match), _outputs=2)


def _check(match: Match) -> None:
    if match.target.device != "cpu" or not match.target.generates:
        raise Decline(f"target '{match.target}' has no generated kernels; 'ort-cpu:kernels' has")
    if match.dtype(match.output) != ir.DataType.FLOAT:
        raise Decline("it is not float32, which alone has kernels")
    rank, axis = match.rank(match.output), match.root.attributes.get_int("axis", -1)
    if axis != -1 and axis + 1 != rank:
        raise Decline(f"it normalizes from axis {axis} of rank {rank or 'unknown'} on; kernels take the last axis")
    if len([value for value in match.root.outputs if value.uses() or value.is_graph_output()]) > 1:
        raise Decline("its mean or deviation is used")
    if any(match.rank(value) != 1 for value in _operands(match)):
        raise Decline("its scale or bias is no vector")
