"""Products that an exporter wrote over flattened rows, as products over the tensor itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.sizes import sizes
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass

_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


@register
@dataclass(frozen=True)
class UnflattenGemm(RewritePass):
    """Replaces ``Reshape, Gemm, Reshape`` by MatMul and Add where the reshapes join the rows and part them again.

    GPT-2's Conv1D arrives like this. MatMul and Add are 1.03 to 1.09 times as fast as Gemm from 32 rows on, and 0.96
    times for one (`benchmarks/fused_kernels.py`); behind a Reshape no activation or residual fuses with the bias.
    Where no size is a symbol ONNX Runtime writes the Gemm back by itself, at no measurable cost. Runs after
    fuse-matmul-add, which stores the weights as Gemm and MatMul read them without a flag.
    """

    name: ClassVar[str] = "unflatten-gemm"
    min_opset: ClassVar[int] = 7
    remove_nodes: ClassVar[bool] = False  # three products may share one flattened input

    def pattern(self, op: Any, x: Any, rows: Any, w: Any, shape: Any) -> Any:
        flat = op.Reshape(x, rows, _allow_other_attributes=True)
        product = op.Gemm(flat, w, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["product"])
        return op.Reshape(product, shape, _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        gemm = match["product"].producer()
        if len(match["product"].uses()) > 1 or match["product"].is_graph_output():
            raise Decline(f"inner value '{match['product'].name}' is also used elsewhere")
        odd = {n: a.value for n, a in gemm.attributes.items() if n in _PLAIN and a.value != _PLAIN[n]}
        if odd:
            raise Decline(f"the Gemm has {', '.join(f'{n} = {v}' for n, v in odd.items())}")
        if not match.is_constant("w"):
            raise Decline("the second matrix is no weight")
        before, after, weight = sizes(match["x"]), sizes(match.output), match.shape("w")
        if before is None or after is None or weight is None or len(before) < 3:
            raise Decline("the sizes around the product are unknown, or there are two")
        if before[-1] != weight[0] or after != (*before[:-1], weight[1]):
            raise Decline("the reshapes do not only join the rows and part them again")
        bias = _bias(match)
        if bias is not None and match.shape(bias) not in ((weight[1],), (1, weight[1]), (1,), ()):
            raise Decline(f"the summand has shape {match.shape(bias)}; a bias has ({weight[1]},)")

    def rewrite(self, op: Any, match: Match, x: ir.Value, w: ir.Value) -> ir.Value:
        product: ir.Value = op.MatMul(x, w)
        bias = _bias(match)
        if bias is None:
            return product
        product.shape, product.type = match.output.shape, match.output.type
        result: ir.Value = op.Add(product, bias)
        return result


def _bias(match: Match) -> ir.Value | None:
    inputs = match["product"].producer().inputs
    return inputs[2] if len(inputs) > 2 else None
