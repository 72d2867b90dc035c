"""planish::LayerNorm and its relatives: normalization over the last axis, after an addition where the name says so.

======================  ==========================================================
LayerNorm               LayerNormalization(x) over the last axis
RMSNorm                 RMSNormalization(x) over the last axis
AddLayerNormalization   LayerNormalization(x + residual), and x + residual
AddRMSNormalization     RMSNormalization(x + residual), and x + residual
======================  ==========================================================

Both results are always given: ONNX Runtime refuses a call of a function that leaves one out.

Layer normalization: arXiv:1607.06450. RMS normalization: arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.schemas import DIALECT_DOMAIN

_FLOAT = frozenset({ir.DataType.FLOAT})
EPSILON = "epsilon"
_DEFAULT = 1e-5  # as in ONNX


def _schema(name: str, added: bool, bias: bool) -> Schema:
    inputs = ("x", *(["residual"] if added else []), "scale", *(["bias"] if bias else []))
    outputs = (Operand("y", _FLOAT), *([Operand("sum", _FLOAT)] if added else []))
    what = "x + residual (equal shapes, no broadcasting)" if added else "x"
    doc = f"y = {what} normalized over the last axis, times scale{' plus bias' * bias}, each of the axis' size."
    epsilon = Attribute(EPSILON, ir.AttributeType.FLOAT, default=_DEFAULT)
    return Schema(name, tuple(Operand(item, _FLOAT) for item in inputs), outputs, (epsilon,), doc)


def _infer(added: bool) -> Any:
    def infer(inputs: Sequence[TensorInfo | None], _: Mapping[str, Any]) -> Sequence[TensorInfo]:
        known = [item or TensorInfo() for item in inputs]
        matrices, vectors = known[: 1 + added], known[1 + added :]
        dtype = next((item.dtype for item in known if item.dtype is not None), None)
        shapes = [item.dims for item in matrices if item.dims is not None]
        if any(len(shape) != len(shapes[0]) for shape in shapes):
            raise InferenceError(f"x has rank {len(shapes[0])} and the residual {len(shapes[1])}; they must be equal")
        if shapes and not shapes[0]:
            raise InferenceError("x has rank 0; there is no axis to normalize over")
        width: Dim = None
        for vector in vectors:
            if vector.dims is not None and len(vector.dims) != 1:
                raise InferenceError(f"scale and bias must have rank 1, not shape {vector.dims}")
            width = same_dim(width, vector.dims[0] if vector.dims else None, "scale and bias")
        dims: tuple[Dim, ...] | None = None
        if shapes:
            merged = [shapes[0][axis] for axis in range(len(shapes[0]))]
            for shape in shapes[1:]:
                merged = [
                    same_dim(a, b, f"axis {axis} of x and residual")
                    for axis, (a, b) in enumerate(zip(merged, shape, strict=True))
                ]
            merged[-1] = same_dim(merged[-1], width, "the last axis of x, and scale")
            dims = tuple(merged)
        return [TensorInfo(dtype, dims)] * (1 + added)

    return infer


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], _: Mapping[str, Any]) -> int:
    # Mean, deviation, its square and their sum, and the affine map; one more for an addition.
    return (7 + (len(outputs) > 1)) * outputs[0].elements


def _normalization(name: str, standard: str, added: bool) -> DialectOp:
    layer = standard == "LayerNormalization"
    schema = _schema(name, added, bias=layer)

    def body(opset: int) -> ir.Function:
        values = {operand.name: ir.Value(name=operand.name) for operand in schema.inputs}
        inputs, nodes = list(values.values()), []
        row = values["x"]
        if added:
            nodes.append(ir.node("Add", [row, values["residual"]], name="add", outputs=[ir.Value(name="sum")]))
            row = nodes[0].outputs[0]
        attributes = {"axis": -1, "epsilon": ir.RefAttr("epsilon", EPSILON, ir.AttributeType.FLOAT)}
        operands = [row, *inputs[1 + added :]]
        nodes.append(ir.node(standard, operands, attributes, name="normalize", outputs=[ir.Value(name="y")]))
        outputs = [node.outputs[0] for node in reversed(nodes)]
        graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset}, name=name)
        return ir.Function(
            DIALECT_DOMAIN, name, graph=graph, attributes=[ir.Attr(EPSILON, ir.AttributeType.FLOAT, _DEFAULT)]
        )

    def reference(*arrays: np.ndarray, epsilon: float = _DEFAULT) -> tuple[np.ndarray, ...]:
        x, *rest = (np.asarray(array, np.float64) for array in arrays)
        total = x + rest.pop(0) if added else x
        sums = (total,) if added else ()
        if not total.shape[-1]:
            return (total, *sums)
        deviation = total - total.mean(-1, keepdims=True) if layer else total
        y = deviation / np.sqrt(np.square(deviation).mean(-1, keepdims=True) + epsilon) * rest[0]
        return (y + rest[1] if layer else y, *sums)

    return DialectOp(schema, _infer(added), body, reference, _flops, min_opset=17 if layer else 23)


#: The family, by name.
NORMS: dict[str, DialectOp] = {
    name: _normalization(name, standard, added)
    for name, standard, added in (
        ("LayerNorm", "LayerNormalization", False),
        ("RMSNorm", "RMSNormalization", False),
        ("AddLayerNormalization", "LayerNormalization", True),
        ("AddRMSNormalization", "RMSNormalization", True),
    )
}
