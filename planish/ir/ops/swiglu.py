"""planish::SwiGLU: the gated unit of Llama-like feed-forward blocks (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import DialectOp, InferenceError, Operand, Schema, TensorInfo
from planish.ir.schemas import DIALECT_DOMAIN

_SCHEMA = Schema(
    "SwiGLU",
    inputs=(Operand("gate"), Operand("up")),
    outputs=(Operand("y"),),
    doc="y = gate * sigmoid(gate) * up, elementwise; gate and up have the same shape (no broadcasting).",
)


def _infer(inputs: Sequence[TensorInfo | None], _: Mapping[str, Any]) -> Sequence[TensorInfo]:
    gate, up = inputs
    assert gate is not None and up is not None
    dtype = gate.dtype or up.dtype
    if gate.dims is None or up.dims is None:
        return [TensorInfo(dtype, gate.dims or up.dims)]
    if len(gate.dims) != len(up.dims):
        raise InferenceError(f"gate has rank {len(gate.dims)} and up has rank {len(up.dims)}; they must be equal")
    dims = []
    for axis, (a, b) in enumerate(zip(gate.dims, up.dims, strict=True)):
        if isinstance(a, int) and isinstance(b, int) and a != b:
            raise InferenceError(f"axis {axis}: gate has size {a} and up has size {b}; SwiGLU does not broadcast")
        # Equal sizes are part of the definition, so the more precise of the two holds for both.
        dims.append(a if isinstance(a, int) or b is None else b if isinstance(b, int) or a is None else a)
    return [TensorInfo(dtype, tuple(dims))]


def _body(opset: int) -> ir.Function:
    gate, up = ir.Value(name="gate"), ir.Value(name="up")
    sigmoid = ir.node("Sigmoid", [gate], name="sigmoid", outputs=[ir.Value(name="s")])
    silu = ir.node("Mul", [gate, sigmoid.outputs[0]], name="silu", outputs=[ir.Value(name="a")])
    product = ir.node("Mul", [silu.outputs[0], up], name="product", outputs=[ir.Value(name="y")])
    graph = ir.Graph(
        [gate, up], product.outputs, nodes=[sigmoid, silu, product], opset_imports={"": opset}, name="SwiGLU"
    )
    return ir.Function(DIALECT_DOMAIN, "SwiGLU", graph=graph, attributes=[])


def _reference(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, ...]:
    gate, up = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    # exp of a non-positive number only, so that large gates do not overflow.
    small = np.exp(-np.abs(gate))
    sigmoid = np.where(gate >= 0, 1.0, small) / (1.0 + small)
    return (gate * sigmoid * up,)


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], _: Mapping[str, Any]) -> int:
    # exp, add, divide, and two products for each element.
    return 5 * outputs[0].elements


SWIGLU = DialectOp(_SCHEMA, _infer, _body, _reference, _flops)
