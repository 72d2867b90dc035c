"""Products with weights, and what follows them, as one operator that has a generated kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, is_op
from planish.ir.ops import DIALECT_DOMAIN
from planish.passes.base import Decline
from planish.passes.lowering.weights import is_matrix, is_vector
from planish.passes.pattern import OrValue, Var
from planish.passes.registry import register
from planish.passes.rewrite import DialectRewritePass, Match, Rule

_QUICK = 1.702
_Build = Callable[..., Any]


@register
@dataclass(frozen=True)
class LowerLinear(DialectRewritePass):
    """Writes MatMul or Gemm by a weight, its bias, and an activation or a residual, as planish::Linear and relatives.

    Their kernels have the weight packed once and the rest in the epilogue, while a tile of the result is in registers:
    no pass over memory for bias, activation, gate or residual.

    Attributes:
        min_columns: weights with fewer rows or columns than this stay with ONNX Runtime.
    """

    name: ClassVar[str] = "lower-linear"
    min_opset: ClassVar[int] = 20

    min_columns: int = 16

    def rules(self) -> Sequence[Rule]:
        # A sweep goes from the end of the graph to its start, so larger forms are met before what is in them.
        opset = self.min_opset
        return [
            Rule("linear-swiglu", _swiglu, self._swiglu, _check, opset),
            *(Rule(f"linear-{op.lower()}", form, self._to(op), _check, opset) for op, form in _ACTIVATED),
            *(Rule(f"linear-add-{n}", form, self._residual, _check, opset) for n, form in enumerate(_RESIDUALS)),
            *(Rule(f"linear-{n}", form, self._to("Linear"), _check, opset) for n, form in enumerate(_PLAIN)),
        ]

    def _to(self, op_type: str) -> _Build:
        def rewrite(op: Any, match: Match) -> Any:
            weight = self._weight(op, match)
            return _call(op, op_type, match["x"], weight, _bias(op, match, weight))

        return rewrite

    def _residual(self, op: Any, match: Match) -> Any:
        x, residual, weight = match["x"], match["residual"], self._weight(op, match)
        bias = _bias(op, match, weight)
        rows, shape = match.shape(x), match.shape(residual)
        wanted = rows and (*rows[:-1], *_sizes(weight)[1:])
        if shape is None or wanted is None or None in shape or shape != wanted:
            raise Decline(f"the summand has shape {shape} and the product {wanted}: a residual has that of the product")
        if match.values.get("bias") is None and is_vector(None, residual):
            raise Decline("the summand is the bias")
        if residual.producer() is not None and residual.producer() in match.nodes:
            raise Decline("the summand is the product itself")
        return _call(op, "LinearAdd", x, weight, bias, residual)

    def _swiglu(self, op: Any, match: Match) -> Any:
        gate, up = match["w"], match["u"]
        self._require_size(gate)
        if match.shape(gate) != match.shape(up):
            raise Decline(f"the gate's weight is {match.shape(gate)} and the other {match.shape(up)}")
        return _call(op, "LinearSwiGLU", match["x"], gate, up)

    def _weight(self, op: Any, match: Match) -> ir.Value:
        """The weight (K, N) of a match; a Gemm may have its transpose, of which that is a view."""
        weight: ir.Value = match["w"]
        self._require_size(weight)
        gemm = _gemm_of(match)
        if gemm is None or not gemm.attributes.get_int("transB", 0):
            return weight
        tensor = constant_tensor(weight)
        assert tensor is not None
        made: ir.Value = op.initializer(ir.tensor(tensor.numpy().T), name=weight.name)
        return made

    def _require_size(self, weight: ir.Value) -> None:
        sizes = _sizes(weight)
        if min(sizes) < self.min_columns:
            raise Decline(f"the weight is {sizes[0]} by {sizes[1]}; kernels pay from {self.min_columns} on")


def _call(op: Any, op_type: str, *inputs: ir.Value) -> ir.Value:
    made: ir.Value = getattr(op, op_type)(*inputs, _domain=DIALECT_DOMAIN)
    return made


def _sizes(weight: ir.Value) -> list[int]:
    tensor = constant_tensor(weight)
    assert tensor is not None
    return [int(n) for n in tensor.shape.numpy()]


def _bias(op: Any, match: Match, weight: ir.Value) -> ir.Value:
    """The bias of a match, of zeros where it has none."""
    found: ir.Value | None = match.values.get("bias")
    if found is not None:
        return found
    zeros: ir.Value = op.initializer(np.zeros(_sizes(weight)[1], np.float32), name="no_bias")
    return zeros


def _product(op: Any, x: Any) -> Any:
    return op.MatMul(x, Var("w", check=is_matrix))


def _with_bias(op: Any, x: Any) -> Any:
    return op.Add(_product(op, x), Var("bias", check=is_vector))


def _gemm(op: Any, x: Any) -> Any:
    return op.Gemm(x, Var("w", check=is_matrix), Var("bias", check=is_vector), _allow_other_attributes=True)


def _linear(op: Any, x: Any) -> Any:
    return OrValue([_with_bias(op, x), _gemm(op, x), _product(op, x)], "h")


def _times_sigmoid(op: Any, h: Any, factor: float | None) -> Any:
    return op.Mul(h, op.Sigmoid(h if factor is None else op.Mul(h, factor)))


_ACTIVATED: tuple[tuple[str, _Build], ...] = (
    ("LinearRelu", lambda op, x: op.Relu(_linear(op, x))),
    ("LinearGelu", lambda op, x: op.Gelu(_linear(op, x), approximate="none")),
    ("LinearGeluTanh", lambda op, x: op.Gelu(_linear(op, x), approximate="tanh")),
    ("LinearSilu", lambda op, x: _times_sigmoid(op, _linear(op, x), None)),
    ("LinearQuickGelu", lambda op, x: _times_sigmoid(op, _linear(op, x), _QUICK)),
)
_PLAIN: tuple[_Build, ...] = (_with_bias, _gemm, _product)
_RESIDUALS: tuple[_Build, ...] = (
    lambda op, x, residual: op.Add(_linear(op, x), residual),
    lambda op, x, residual: op.Sum(_linear(op, x), residual),
    lambda op, x, residual: op.Sum(_product(op, x), Var("bias", check=is_vector), residual),
)


def _swiglu(op: Any, x: Any) -> Any:
    up = op.MatMul(x, Var("u", check=is_matrix))
    return op.SwiGLU(_product(op, x), up, _domain=DIALECT_DOMAIN)


def _gemm_of(match: Match) -> ir.Node | None:
    return next((node for node in match.nodes if is_op(node, "Gemm")), None)


def _check(match: Match) -> None:
    if match.target.device != "cpu" or not match.target.generates:
        raise Decline(f"target '{match.target}' has no generated kernels; 'ort-cpu:kernels' has")
    if match.dtype("w") != ir.DataType.FLOAT:
        raise Decline("it is not float32, which alone has kernels")
    gemm = _gemm_of(match)
    if gemm is None:
        return
    for name, wanted in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
        attribute = gemm.attributes.get(name)
        if attribute is not None and attribute.value != wanted:
            raise Decline(f"Gemm has {name} {attribute.value}, and a kernel takes {wanted}")
