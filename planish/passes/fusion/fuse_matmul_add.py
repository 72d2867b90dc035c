"""Products of matrices in the form that ONNX Runtime runs fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.sizes import rank
from planish.passes.pattern import AttrVar, Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@register
@dataclass(frozen=True)
class FuseMatmulAdd(RewritePass):
    """Two-dimensional MatMul and Add become Gemm, and constant weights are transposed beforehand.

    Products of more dimensions stay MatMul and Add: as Gemm they need reshapes, and then no bias fuses with the
    activation after it.

    Attributes:
        limit: largest weight that is transposed, in bytes. One that several nodes read is left as it is.
    """

    name: ClassVar[str] = "fuse-matmul-add"

    limit: int = 1 << 28

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("matmul-add-to-gemm", _matmul_add, _to_gemm, _check_gemm, 7),
            Rule("gemm-transposed-weight", _gemm, self._transpose_b, None, 7),
            Rule("matmul-transposed-weight", _matmul_transpose, self._fold_transpose, None, 1, False),
        )

    def _transpose_b(self, op: Any, match: Match, w: ir.Value) -> ir.Value:
        root = match.root
        attributes = {name: a for name, a in root.attributes.items() if name != "transB"}
        weight = self._transposed(op, match, w, (1, 0))
        fused: ir.Value = op.Gemm(root.inputs[0], weight, *root.inputs[2:], **attributes)
        return fused

    def _fold_transpose(self, op: Any, match: Match, a: ir.Value, w: ir.Value, perm: ir.Attr) -> ir.Value:
        order = tuple(perm.as_ints()) if perm is not None else tuple(reversed(range(match.rank(w) or 0)))
        fused: ir.Value = op.MatMul(a, self._transposed(op, match, w, order))
        return fused

    def _transposed(self, op: Any, match: Match, w: ir.Value, order: tuple[int, ...]) -> ir.Value:
        if not match.is_constant(w):
            raise Decline(f"'{w.name}' is transposed at run time: it is no constant")
        others = [u for u in w.consumers() if u not in match.nodes]
        if others:
            reader = f"{others[0].op_type} '{others[0].name}'"
            raise Decline(f"'{w.name}' is also read by {reader}, and would be stored twice")
        array = match.constant(w)
        assert array is not None
        if array.nbytes > self.limit:
            raise Decline(f"'{w.name}' has {array.nbytes} bytes, and the limit is {self.limit}")
        placed: ir.Value = op.initializer(np.ascontiguousarray(np.transpose(array, order)), name=f"{w.name}_t")
        return placed


def _matmul_add(op: Any, a: Any, w: Any, bias: Any) -> Any:
    # Products of more dimensions are no near miss, so they are not declined but passed over.
    return op.Add(op.MatMul(Var("a", check=_is_matrix), Var("w", check=_is_matrix)), bias)


def _is_matrix(_: Any, value: ir.Value) -> bool:
    return rank(value) == 2


def _to_gemm(op: Any, a: ir.Value, w: ir.Value, bias: ir.Value) -> Any:
    return op.Gemm(a, w, bias)


def _check_gemm(match: Match) -> None:
    if match.dtype("a") not in _DTYPES:
        raise Decline(f"Gemm has no fast kernel for {match.dtype('a')}")
    if not match.is_constant("w"):
        raise Decline("the second matrix is no weight")
    columns, bias = match.shape("w")[1], match.shape("bias")  # type: ignore[index]
    if bias not in ((columns,), (1, columns)) or not isinstance(columns, int):
        raise Decline(f"the summand has shape {bias}; a bias has ({columns},)")


def _gemm(op: Any, a: Any, w: Any) -> Any:
    return op.Gemm(a, w, transB=1, _allow_other_inputs=True, _allow_other_attributes=True)


def _matmul_transpose(op: Any, a: Any, w: Any) -> Any:
    weight = Var("w", check=lambda match, value: match.is_constant(value))
    return op.MatMul(a, op.Transpose(weight, perm=AttrVar("perm", optional=True)))
