"""Keeps ONNX Runtime from fusing a residual into a layer normalization, where its CPU kernel for both is slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule


@register
@dataclass(frozen=True)
class LowerResidualAdd(RewritePass):
    """Writes the residual in front of LayerNormalization as Sum, with the bias of the product before it.

    ONNX Runtime makes SkipLayerNormalization of ``LayerNormalization(Add(x, residual))``. On the CPU that kernel
    takes five to eight times as long as the two apart (`benchmarks/residual_norm.py`; 1.31.1: 233 µs against 45 µs for
    128×384 floats on one thread). Sum computes the same and is not fused.
    """

    name: ClassVar[str] = "lower-residual-add"
    min_opset: ClassVar[int] = 17

    def rules(self) -> Sequence[Rule]:
        # With the bias first: three terms in one pass over memory instead of two.
        return [
            Rule("lower-residual-add-bias", _with_bias, _rewrite, _check, self.min_opset),
            Rule("lower-residual-add", _plain, _rewrite, _check, self.min_opset),
        ]


def _normalized(op: Any, total: Any) -> Any:
    return op.LayerNormalization(total, _allow_other_inputs=True, _allow_other_attributes=True)


def _plain(op: Any, x: Any, residual: Any) -> Any:
    return _normalized(op, op.Add(x, residual))


def _with_bias(op: Any, x: Any, bias: Any, residual: Any) -> Any:
    # Of a product's bias only: around anything else a sum of three may round far from a sum of two.
    product = Var("x", check=lambda _, value: is_op(value.producer(), "MatMul"))
    constant = Var("bias", check=lambda _, value: value.const_value is not None and len(value.const_value.shape) == 1)
    return _normalized(op, op.Add(op.Add(product, constant), residual))


def _rewrite(op: Any, match: Match) -> Any:
    terms = [match[name] for name in ("x", "bias", "residual") if name in match.values]
    return op.LayerNormalization(op.Sum(*terms), *match.root.inputs[1:], **dict(match.root.attributes))


def _check(match: Match) -> None:
    if match.target.name != "ort-cpu":
        raise Decline(f"target {match.target.name} has its own kernels for a residual and a normalization")
    if match.dtype(match.output) != ir.DataType.FLOAT:
        raise Decline("it is not float32, for which this was measured")
