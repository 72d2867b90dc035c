"""Tables of rotations for all positions, which take the place of angles that a graph computes for its tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from planish.ir.causal_lm import IDS
from planish.ir.graphs import constant_tensor, is_op
from planish.passes.base import Decline

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MOST = 1 << 26  # elements of a table


class RotationTables:
    """Tables (positions, columns) by the values that they are for, each computed once.

    Args:
        positions: that the model has; None: no end of them.
    """

    def __init__(self, positions: int | None) -> None:
        self.positions = positions
        self._made: dict[ir.Value, np.ndarray] = {}

    def of(self, value: ir.Value, inputs: Mapping[str, np.ndarray], axis: int) -> np.ndarray:
        """What a value of rank 3 is for every position.

        Args:
            inputs: of the graph, so that `axis` has all positions, and the other of the first two has one element.

        Raises:
            Decline: it depends on more, is no such table, or positions have no end.
        """
        if value not in self._made:
            found = evaluate(value, inputs)
            shape = [1, 1]
            shape[axis] = self.positions or 0
            if found.ndim != 3 or list(found.shape[:2]) != shape or found.size > _MOST:
                raise Decline(f"'{value.name}' is no table of one row for each position")
            assert value.dtype is not None
            self._made[value] = np.ascontiguousarray(found.squeeze(1 - axis).astype(value.dtype.numpy()))
        return self._made[value]

    def end(self) -> int:
        """The number of positions.

        Raises:
            Decline: they have no end.
        """
        if self.positions is None:
            raise Decline("the model's positions have no end, so that there is no table of all rotations")
        return self.positions


def check_columns(size: object, columns: int) -> None:
    """Raises Decline if GroupQueryAttention does not rotate heads of a size by so many angles."""
    if not isinstance(size, int) or size % 16 or columns % 8 or columns > size // 2:
        raise Decline("the operator rotates heads of a multiple of 16, by a multiple of 8 angles")


def evaluate(value: ir.Value, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """A value that is computed from these inputs of its graph, and constants, alone; of ids only the shape may count.

    Raises:
        Decline: it is not.
    """
    known: dict[ir.Value, np.ndarray] = {}
    pending = [value]
    while pending:
        item = pending[-1]
        tensor, node = constant_tensor(item), item.producer()
        if item in known:
            pending.pop()
        elif tensor is not None:
            known[item] = np.asarray(tensor.numpy())
        elif item.is_graph_input() and item.name in inputs:
            known[item] = inputs[item.name or ""]
        elif node is None or node.domain or len(node.outputs) != 1 or len(pending) > 64 or _reads_ids(node):
            raise Decline(f"'{value.name}' depends on more than the position")
        elif missing := [v for v in node.inputs if v is not None and v not in known]:
            pending += missing
        else:
            names = {v.name or "": known[v] for v in node.inputs if v is not None}
            try:
                (known[item],) = ReferenceEvaluator(ir.to_proto(node)).run(None, names)
            except Exception as error:
                raise Decline(f"'{value.name}' can not be computed beforehand: {error}") from error
    return known[value]


def _reads_ids(node: ir.Node) -> bool:
    return not is_op(node, "Shape") and any(v is not None and v.is_graph_input() and v.name == IDS for v in node.inputs)
