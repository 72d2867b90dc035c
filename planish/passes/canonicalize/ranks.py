"""Ranks where shape inference gives up: a Reshape to computed sizes has as many dimensions as there are sizes."""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.ir.infer import infer_shapes

#: Rounds of inference; each needs all ranks before it, and one serves unless ranks are computed from ranks.
_MAX_ROUNDS = 4


def infer_ranks(model: ir.Model) -> None:
    """Fills in types and shapes, in place, and at least the rank of what Reshape, Expand and ConstantOfShape make.

    A value whose sizes stay unknown gets a shape of as many unknown dimensions.
    """
    for _ in range(_MAX_ROUNDS):
        infer_shapes(model)
        if not sum(_fill(node) for graph in model.graphs() for node in graph):
            return


def _fill(node: ir.Node) -> bool:
    """Gives the output of a node its rank, if that is new; returns whether it was."""
    if not is_op(node, "Reshape", "Expand", "ConstantOfShape"):
        return False
    output = node.outputs[0]
    index = 0 if node.op_type == "ConstantOfShape" else 1
    if output.shape is not None or index >= len(node.inputs):
        return False
    rank = _length(node.inputs[index])
    if rank is not None and node.op_type == "Expand":
        data = node.inputs[0]
        rank = max(rank, len(data.shape)) if data is not None and data.shape is not None else None
    if rank is None:
        return False
    if output.type is None and index == 1 and node.inputs[0] is not None:
        output.type = node.inputs[0].type
    output.shape = ir.Shape([None] * rank)
    return True


def _length(value: ir.Value | None) -> int | None:
    """Number of elements of a vector."""
    if value is None or value.shape is None or len(value.shape) != 1:
        return None
    size = value.shape[0]
    return size if isinstance(size, int) else None
