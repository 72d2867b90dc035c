"""Recovers the gated unit SwiGLU, an operator of the planish dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.ops import DIALECT_DOMAIN
from planish.passes.base import Decline
from planish.passes.fusion.sizes import sizes
from planish.passes.registry import register
from planish.passes.rewrite import DialectRewritePass, Match


@register
@dataclass(frozen=True)
class FuseSwiglu(DialectRewritePass):
    """Replaces gate * sigmoid(gate) * up by planish::SwiGLU(gate, up) (Shazeer 2020, arXiv:2002.05202).

    Its body comes along as a function of the model. ONNX Runtime inlines that and then fuses gate * sigmoid(gate)
    itself, so a model with it is as fast as one without; a kernel for the whole is what it is there for.
    """

    name: ClassVar[str] = "fuse-swiglu"
    min_opset: ClassVar[int] = 18
    anchors: ClassVar[tuple[str, ...]] = ("Sigmoid",)

    def pattern(self, op: Any, gate: Any, up: Any) -> Any:
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)

    def check(self, match: Match) -> None:
        gate, up = sizes(match["gate"]), sizes(match["up"])
        if match.dtype("gate") is None:
            raise Decline("the dtype of the gate is unknown")
        if gate is None or gate != up:
            raise Decline("gate and up are not proved to have one shape, and SwiGLU does not broadcast")

    def rewrite(self, op: Any, match: Match, gate: ir.Value, up: ir.Value) -> Any:
        return op.SwiGLU(gate, up, _domain=DIALECT_DOMAIN)
