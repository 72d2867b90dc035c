"""Writes nodes in front of a place of a graph, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.schemas import DIALECT_DOMAIN
from planish.passes.canonicalize.editing import Editor


class Emitter:
    """Inserts nodes before `before`, in the name of the pass of `editor`."""

    def __init__(self, editor: Editor, before: ir.Node) -> None:
        assert before.graph is not None and isinstance(before.graph, ir.Graph)
        self.editor, self.before, self.graph = editor, before, before.graph

    def add(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The first output of a new node."""
        return self.outputs(op, 1, *inputs, **attributes)[0]

    def outputs(self, op: str, count: int, *inputs: ir.Value | None, **attributes: Any) -> list[ir.Value]:
        """The outputs of a new node; an operator with a capital letter behind ``planish.`` is one of the dialect."""
        domain, _, name = op.rpartition(".")
        names = self.editor.names
        values = [ir.Value(name=names.fresh(f"{name}_planish")) for _ in range(count)]
        node = ir.node(
            name,
            list(inputs),
            attributes=attributes,
            domain=DIALECT_DOMAIN if domain else "",
            outputs=values,
            name=names.fresh(f"{name}_planish"),
        )
        self._insert(node)
        self.editor.mark(node, [self.before])
        return values

    def _insert(self, node: ir.Node) -> None:
        self.graph.insert_before(self.before, node)

    def constant(self, array: np.ndarray, stem: str = "tokens") -> ir.Value:
        """A new initializer."""
        return self.editor.constant(self.graph, array, stem)

    def ints(self, *numbers: int) -> ir.Value:
        """int64 of shape (count)."""
        return self.constant(np.array(numbers, np.int64))

    def scalar(self, number: int) -> ir.Value:
        """int64 of rank 0."""
        return self.constant(np.array(number, np.int64))

    def number(self, value: float, like: ir.Value) -> ir.Value:
        """A scalar of the dtype of another value."""
        dtype = (like.dtype or ir.DataType.FLOAT).numpy()
        return self.constant(np.array(value, dtype))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """A size, as int64 of shape (1)."""
        return self.add("Shape", value, start=axis, end=axis + 1)

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """0 copies a size, -1 is what is left."""
        return self.add("Reshape", value, self.ints(*sizes))

    def expand(self, value: ir.Value, *sizes: ir.Value) -> ir.Value:
        """To sizes of shape (1) each."""
        return self.add("Expand", value, self.add("Concat", *sizes, axis=0))

    def pick(self, value: ir.Value, indices: ir.Value) -> ir.Value:
        """value[b, indices[b, i]]: rows of each batch."""
        return self.add("GatherND", value, self.add("Unsqueeze", indices, self.ints(-1)), batch_dims=1)

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        return self.add("Transpose", value, perm=list(perm))

    def top(self, values: ir.Value, count: int) -> ir.Value:
        """The places of the largest along the last axis, best first; of equal ones the earlier one first."""
        return self.outputs("TopK", 2, values, self.ints(count), axis=-1)[1]


class Behind(Emitter):
    """The same behind a node, in the order that they are written in."""

    def __init__(self, editor: Editor, node: ir.Node) -> None:
        super().__init__(editor, node)
        self._last = node

    def _insert(self, node: ir.Node) -> None:
        self.graph.insert_after(self._last, node)
        self._last = node
