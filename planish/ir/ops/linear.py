"""planish::Linear and its relatives: a product with a weight, and what follows it in one kernel.

==================  ============================================
Linear              x W + b
LinearRelu          max(x W + b, 0)
LinearGelu          gelu(x W + b), with erf
LinearGeluTanh      gelu(x W + b), with tanh
LinearSilu          silu(x W + b)
LinearQuickGelu     h sigmoid(1.702 h), h = x W + b
LinearAdd           x W + b + residual
LinearTransposed    x Wᵀ + b, for a weight that is used otherwise too: an embedding that is the head
LinearSwiGLU        silu(x W_gate) * (x W_up) (arXiv:2002.05202)
==================  ============================================

An operator each, since the body of a function has neither optional inputs nor choices. Weights may be stored as
bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.schemas import DIALECT_DOMAIN

_FLOAT = frozenset({ir.DataType.FLOAT})
_WEIGHT = frozenset({ir.DataType.FLOAT, ir.DataType.BFLOAT16})
#: The attribute of the operands' dtype in the product, as ONNX counts dtypes: float32, or bfloat16 (then both are
#: rounded to it, and sums stay float32).
COMPUTE_TYPE = "compute_type"
COMPUTE_TYPES = (int(ir.DataType.FLOAT), int(ir.DataType.BFLOAT16))
#: Operator → activation, for those of one product.
ACTIVATIONS: dict[str, str | None] = {
    "Linear": None,
    "LinearRelu": "relu",
    "LinearGelu": "gelu",
    "LinearGeluTanh": "gelu_tanh",
    "LinearSilu": "silu",
    "LinearQuickGelu": "quick_gelu",
    "LinearAdd": None,
}
#: The operator whose weight has a row per output, (N, K).
TRANSPOSED = "LinearTransposed"
_QUICK = 1.702


def linear_schema(name: str, inputs: Sequence[str], doc: str) -> Schema:
    """The schema of an operator whose products have a `compute_type`."""
    compute = Attribute(COMPUTE_TYPE, ir.AttributeType.INT, default=COMPUTE_TYPES[0])
    operands = tuple(Operand(n, _WEIGHT, "W") if n.endswith("weight") else Operand(n, _FLOAT) for n in inputs)
    return Schema(name, operands, (Operand("y", _FLOAT),), (compute,), doc)


def _infer(weights: int, *, transposed: bool = False) -> Any:
    """The rule for an operator over x (..., K), `weights` weights (K, N), a bias (N), and a residual of y's shape.

    With `transposed` a weight is (N, K).
    """

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        if attributes[COMPUTE_TYPE] not in COMPUTE_TYPES:
            raise InferenceError(f"{COMPUTE_TYPE} is {attributes[COMPUTE_TYPE]}; it must be one of {COMPUTE_TYPES}")
        known = [item or TensorInfo() for item in inputs]
        others = (known[0], *known[1 + weights :])
        dtype = next((item.dtype for item in others if item.dtype is not None), None)
        rows: Dim = None
        columns: Dim = None
        for weight in known[1 : 1 + weights]:
            if weight.dims is None:
                continue
            if len(weight.dims) != 2:
                raise InferenceError(f"a weight has rank {len(weight.dims)}; it must have 2")
            depth, width = reversed(weight.dims) if transposed else weight.dims
            rows, columns = same_dim(rows, depth, "weights"), same_dim(columns, width, "weights")
        bias, residual = (*(item.dims for item in known[1 + weights :]), None, None)[:2]
        if bias is not None:
            if len(bias) != 1:
                raise InferenceError(f"the bias has rank {len(bias)}; it must have 1")
            columns = same_dim(columns, bias[0], "the weight's columns and the bias")
        x = known[0].dims
        if x is None:
            return [TensorInfo(dtype, residual)]
        if not x:
            raise InferenceError("x has rank 0; it must have columns")
        same_dim(x[-1], rows, f"the columns of x and the weight's {'columns' if transposed else 'rows'}")
        dims: tuple[Dim, ...] = (*x[:-1], columns)
        if residual is not None:
            if len(residual) != len(dims):
                raise InferenceError(f"the result has rank {len(dims)} and the residual {len(residual)}")
            dims = tuple(same_dim(a, b, "the result and the residual") for a, b in zip(dims, residual, strict=True))
        return [TensorInfo(dtype, dims)]

    return infer


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], _: Mapping[str, Any]) -> int:
    x = inputs[0]
    assert x is not None
    return 2 * outputs[0].elements * x.sizes[-1]


class LinearBody:
    """Builds the graph of a function."""

    def __init__(self, name: str, inputs: Sequence[str], opset: int) -> None:
        self._name, self._opset = name, opset
        self.values = {item: ir.Value(name=item) for item in inputs}
        self._nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        label = f"{op.lower()}_{len(self._nodes)}"
        outputs = [ir.Value(name=f"{label}_out")]
        node = ir.node(op, list(inputs), attributes=attributes, name=label, outputs=outputs)
        self._nodes.append(node)
        return node.outputs[0]

    def product(self, x: str | ir.Value, weight: str, *, transposed: bool = False) -> ir.Value:
        """x times a weight, with both rounded to the compute type."""
        right = self._rounded(weight)
        return self.add("MatMul", self._rounded(x), self.add("Transpose", right, perm=[1, 0]) if transposed else right)

    def _rounded(self, given: str | ir.Value) -> ir.Value:
        to = ir.RefAttr("to", COMPUTE_TYPE, ir.AttributeType.INT)
        value = self.values[given] if isinstance(given, str) else given
        return self.add("Cast", self.add("Cast", value, to=to), to=int(ir.DataType.FLOAT))

    def activation(self, name: str | None, x: ir.Value) -> ir.Value:
        if name is None:
            return x
        if name == "relu":
            return self.add("Relu", x)
        if name in ("gelu", "gelu_tanh"):
            return self.add("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
        factor = x
        if name == "quick_gelu":
            number = self.add("Constant", value_float=_QUICK)
            factor = self.add("Mul", x, number)
        return self.add("Mul", x, self.add("Sigmoid", factor))

    def function(self, result: ir.Value) -> ir.Function:
        result.name = "y"
        inputs = list(self.values.values())
        graph = ir.Graph(inputs, [result], nodes=self._nodes, opset_imports={"": self._opset}, name=self._name)
        attributes = [ir.Attr(COMPUTE_TYPE, ir.AttributeType.INT, COMPUTE_TYPES[0])]
        return ir.Function(DIALECT_DOMAIN, self._name, graph=graph, attributes=attributes)


def _activated(name: str | None, x: np.ndarray) -> np.ndarray:
    """An activation in float64."""
    if name is None:
        return x
    if name == "relu":
        positive: np.ndarray = np.maximum(x, 0)
        return positive
    if name == "gelu":
        gate = 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))
    elif name == "gelu_tanh":
        gate = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        gate = 0.5 * (1 + np.tanh(x * (_QUICK if name == "quick_gelu" else 1.0) / 2))
    product: np.ndarray = x * gate
    return product


def rounded_operand(array: np.ndarray, compute_type: int) -> np.ndarray:
    """An operand as a product of that type takes it, in float64."""
    if compute_type == int(ir.DataType.BFLOAT16):
        import ml_dtypes

        array = np.asarray(array, np.float32).astype(ml_dtypes.bfloat16)
    return np.asarray(array).astype(np.float64)


def _one_product(name: str) -> DialectOp:
    activation, residual = ACTIVATIONS.get(name), name == "LinearAdd"
    inputs = ("x", "weight", "bias", *(["residual"] if residual else []))
    after = "plus residual" if residual else f"then {activation}" if activation else "and no activation"
    transposed = name == TRANSPOSED
    factor = "the transpose of weight (N, K)" if transposed else "weight (K, N)"
    schema = linear_schema(name, inputs, f"x (..., K) times {factor} plus bias (N), {after}; y is (..., N).")

    def body(opset: int) -> ir.Function:
        made = LinearBody(name, inputs, opset)
        product = made.product("x", "weight", transposed=transposed)
        y = made.activation(activation, made.add("Add", product, made.values["bias"]))
        return made.function(made.add("Add", y, made.values["residual"]) if residual else y)

    def reference(
        x: np.ndarray, weight: np.ndarray, bias: np.ndarray, *more: np.ndarray, compute_type: int = COMPUTE_TYPES[0]
    ) -> tuple[np.ndarray, ...]:
        right = rounded_operand(weight, compute_type)
        y = rounded_operand(x, compute_type) @ (right.T if transposed else right) + bias.astype(np.float64)
        y = _activated(activation, y)
        return (y + sum(item.astype(np.float64) for item in more),)

    return DialectOp(schema, _infer(1, transposed=transposed), body, reference, _flops, min_opset=20)


def _swiglu() -> DialectOp:
    name, inputs = "LinearSwiGLU", ("x", "gate_weight", "up_weight")
    schema = linear_schema(name, inputs, "silu(x gate_weight) * (x up_weight); x (..., K), weights (K, N), y (..., N).")

    def body(opset: int) -> ir.Function:
        made = LinearBody(name, inputs, opset)
        gate = made.activation("silu", made.product("x", "gate_weight"))
        return made.function(made.add("Mul", gate, made.product("x", "up_weight")))

    def reference(
        x: np.ndarray, gate_weight: np.ndarray, up_weight: np.ndarray, compute_type: int = COMPUTE_TYPES[0]
    ) -> tuple[np.ndarray, ...]:
        rows, gate, up = (rounded_operand(array, compute_type) for array in (x, gate_weight, up_weight))
        return (_activated("silu", rows @ gate) * (rows @ up),)

    def flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
        return 2 * _flops(inputs, outputs, attributes)

    return DialectOp(schema, _infer(2), body, reference, flops, min_opset=20)


#: The family, by name.
LINEAR: dict[str, DialectOp] = {**{name: _one_product(name) for name in ACTIVATIONS}, "LinearSwiGLU": _swiglu()}
#: The one whose weight has a row per output.
LINEAR_TRANSPOSED = _one_product(TRANSPOSED)
