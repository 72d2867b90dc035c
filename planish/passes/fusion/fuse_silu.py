"""Recovers SiLU, x * sigmoid(x), from graphs that wrote the sigmoid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.pattern import OrValue
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@register
@dataclass(frozen=True)
class FuseSilu(RewritePass):
    """Replaces x / (1 + exp(-x)), and x times the reciprocal, by x * Sigmoid(x) (Elfwing et al., arXiv:1702.03118).

    The product and not the Swish of opset 24: ONNX Runtime's CPU provider has no kernel for that one, and makes its
    QuickGelu of the product by itself.
    """

    name: ClassVar[str] = "fuse-silu"
    anchors: ClassVar[tuple[str, ...]] = ("Exp",)

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(f"fuse-silu-{number}", pattern, _rewrite, _check, self.min_opset)
            for number, pattern in enumerate(_FORMS)
        ]


def _denominator(op: Any, x: Any) -> Any:
    return op.Add(op.Exp(OrValue([op.Neg(x), op.Mul(x, -1.0)])), 1.0)


_FORMS: tuple[Callable[..., Any], ...] = (
    lambda op, x: op.Div(x, _denominator(op, x)),
    lambda op, x: op.Mul(x, op.Div(1.0, _denominator(op, x))),
    lambda op, x: op.Mul(x, op.Reciprocal(_denominator(op, x))),
)


def _rewrite(op: Any, x: ir.Value) -> Any:
    return op.Mul(x, op.Sigmoid(x))


def _check(match: Match) -> None:
    dtype = match.dtype("x")
    if dtype not in _DTYPES:
        shown = dtype.name if dtype else "of unknown dtype"
        raise Decline(f"x is {shown}; Sigmoid has a kernel for float32 and float64")
