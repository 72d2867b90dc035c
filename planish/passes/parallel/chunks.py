"""Where a sequence is cut into chunks, and how values are: numbers where its length is one, else computed from it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import dims_of
from planish.passes.canonicalize.editing import Editor

#: Chunks of a length that is known begin at multiples of this, so that tiles of products are full.
_ALIGN = 64


@dataclass
class Bounds:
    """Beginnings and ends of chunks: int64 values of shape (1,), by chunk.

    Chunk i of a computed length n has the rows from min(i c, n - 1) to min((i + 1) c, n) for c = ceil(n / chunks). None
    is empty, so that the last ones repeat the last row where n is short; `joined` leaves what is repeated out.
    """

    begins: list[ir.Value]
    ends: list[ir.Value]
    sizes: list[int | None]
    length: ir.Value | None


@dataclass
class Chunker:
    """Makes the bounds of every length in a graph once.

    Args:
        chunks: how many.
        first: the node in front of which what is computed goes.
    """

    editor: Editor
    graph: ir.Graph
    chunks: int
    first: ir.Node
    _known: dict[object, Bounds] = field(default_factory=dict)
    _constants: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def number(self, *values: int) -> ir.Value:
        """A constant of one axis, the same for all who ask for these numbers."""
        if values not in self._constants:
            self._constants[values] = self.editor.constant(self.graph, np.array(values, np.int64), "chunk_sizes")
        return self._constants[values]

    def bounds(self, value: ir.Value, axis: int) -> Bounds:
        """Of the size of `value` along `axis`."""
        dims = dims_of(value)
        assert dims is not None
        size = dims[axis]
        key = size if size is not None else value
        if key not in self._known:
            self._known[key] = self._of_number(size) if isinstance(size, int) else self._computed(value, axis)
        return self._known[key]

    def _of_number(self, size: int) -> Bounds:
        unit = _ALIGN if size >= 2 * _ALIGN * self.chunks else 1
        ends = [round(size * i / self.chunks / unit) * unit for i in range(self.chunks)] + [size]
        sizes: list[int | None] = [b - a for a, b in itertools.pairwise(ends)]
        numbers = [self.number(n) for n in ends]
        return Bounds(numbers[:-1], numbers[1:], sizes, None)

    def _computed(self, value: ir.Value, axis: int) -> Bounds:
        editor, at = self.editor, self._place(value)

        def node(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
            made = editor.node(at, op, inputs, attributes)
            made.type, made.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((1,))
            return made

        rank = len(dims_of(value) or ())
        length = node("Shape", value, start=axis % rank, end=axis % rank + 1)
        one, count = self.number(1), self.number(self.chunks)
        step = node("Div", node("Add", length, self.number(self.chunks - 1)), count)
        last = node("Sub", length, one)
        begins = [self.number(0)]
        ends = [node("Min", step, length)] if self.chunks > 1 else [length]
        for i in range(1, self.chunks):
            begins.append(node("Min", node("Mul", step, self.number(i)), last))
            ends.append(node("Min", node("Mul", step, self.number(i + 1)), length))
        return Bounds(begins, ends, [None] * self.chunks, length)

    def _place(self, value: ir.Value) -> ir.Node:
        """The node behind the one that makes `value`."""
        producer = value.producer()
        if producer is None:
            return next(iter(self.graph))
        following = list(self.graph)
        return following[following.index(producer) + 1]

    def cut(
        self, at: ir.Node, value: ir.Value, axis: int, begin: ir.Value, end: ir.Value, size: int | None
    ) -> ir.Value:
        """Rows of `value`, in front of the node `at`."""
        inputs = [value, begin, end, self.number(axis)]
        made = self.editor.node(at, "Slice", inputs, sources=[at])
        made.type, made.shape = value.type, resized(value, axis, size)
        return made

    def joined(self, at: ir.Node, parts: list[ir.Value], axis: int, like: ir.Value, bounds: Bounds) -> ir.Value:
        """All chunks as one value again."""
        whole = self.editor.node(at, "Concat", parts, {"axis": axis}, like=like)
        if bounds.length is None:
            return whole
        whole.shape = resized(like, axis, None)
        inputs = [whole, self.number(0), bounds.length, self.number(axis)]
        return self.editor.node(at, "Slice", inputs, like=like)


def resized(value: ir.Value, axis: int, size: int | None) -> ir.Shape | None:
    """The shape of a value with another size along an axis."""
    if value.shape is None:
        return None
    dims: list[int | ir.SymbolicDim | None] = list(value.shape)
    dims[axis] = size
    return ir.Shape(dims)
