"""Integer tensors that count along one axis, which masks are compared of, and the lengths they start from.

`index_vector` reads ``value[..., n, ...] = n + offset`` off a graph: ranges, moved, expanded, shifted, and gathered by
one another. Axes are counted from the end (-1 is the last), as broadcasting aligns them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op
from planish.passes.fusion.sizes import Product, Term, contents, reshaped, sizes

_DEPTH = 24
_MOST_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Offset:
    """A number plus lengths: ``number + sum(count * length)``. Lengths are names or axes of values."""

    number: int = 0
    lengths: frozenset[tuple[Term, int]] = field(default_factory=frozenset)

    def plus(self, other: Offset, sign: int = 1) -> Offset:
        counts = dict(self.lengths)
        for length, count in other.lengths:
            counts[length] = counts.get(length, 0) + sign * count
        return Offset(self.number + sign * other.number, frozenset((t, n) for t, n in counts.items() if n))

    def minus(self, other: Offset) -> Offset:
        return self.plus(other, -1)

    @property
    def never_negative(self) -> bool:
        return self.number >= 0 and all(count > 0 for _, count in self.lengths)


@dataclass(frozen=True)
class Index:
    """Elements are ``n + offset`` with n the position on `axis`; the same number everywhere if `axis` is None."""

    axis: int | None
    offset: Offset


def offset_of(term: Term | None) -> Offset | None:
    """A length as an offset; sums of names, ``"past + new"``, are taken apart."""
    if term is None or isinstance(term, Product):
        return None
    if isinstance(term, int):
        return Offset(term)
    if isinstance(term, tuple):
        return Offset(0, frozenset({(term, 1)}))
    total = Offset()
    parts = [part.strip() for part in term.split("+")]
    if not all(part.isdigit() or part.isidentifier() for part in parts):
        parts = [term]
    for part in parts:
        total = total.plus(Offset(int(part)) if part.isdigit() else Offset(0, frozenset({(part, 1)})))
    return total


def scalar_offset(value: ir.Value | None, depth: int = _DEPTH) -> Offset | None:
    """An integer tensor of one element as an offset, or None."""
    items = contents(value)
    if items is not None:
        return offset_of(items[0]) if len(items) == 1 else None
    node = value.producer() if value is not None else None
    if depth == 0 or node is None or node.domain:
        return None
    if node.op_type in ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Cast"):
        return scalar_offset(node.inputs[0], depth - 1)
    if node.op_type in ("Add", "Sub") and all(sizes(v) in ((), (1,)) for v in node.inputs):
        a, b = (scalar_offset(v, depth - 1) for v in node.inputs)
        return None if a is None or b is None else a.plus(b, 1 if node.op_type == "Add" else -1)
    return None


def dims_at(value: ir.Value | None, axis: int) -> Term | None:
    """The size of an axis counted from the end; 1 for an axis that the value lacks; None if the rank is unknown."""
    dims = sizes(value)
    if dims is None:
        return None
    return dims[axis] if -axis <= len(dims) else 1


def through(source: ir.Value | None, result: ir.Value | None, axis: int) -> bool:
    """Whether position n on `axis` of `result` is position n of `source`, which is broadcast to it."""
    size = dims_at(source, axis)
    return size is not None and size == dims_at(result, axis)


def index_vector(value: ir.Value | None, depth: int = _DEPTH) -> Index | None:
    """How `value` counts, or None if that is unknown."""
    if value is None or depth == 0:
        return None
    array = constant_array(value, _MOST_ELEMENTS)
    if array is not None:
        return _of_array(array)
    if sizes(value) in ((), (1,)):
        offset = scalar_offset(value)
        return None if offset is None else Index(None, offset)
    node = value.producer()
    if node is None or node.domain:
        return None
    reader = _READERS.get(node.op_type)
    found = reader(node, depth - 1) if reader is not None else None
    if found is not None and found.axis is not None and dims_at(value, found.axis) == 1:
        return Index(None, found.offset)
    return found


def _of_array(array: np.ndarray) -> Index | None:
    if array.dtype.kind not in "iu" or not array.size:
        return None
    first = int(array.ravel()[0])
    if (array == first).all():
        return Index(None, Offset(first))
    for axis in range(-array.ndim, 0):
        steps = np.arange(array.shape[axis]).reshape([-1] + [1] * (-axis - 1))
        if (array == first + steps).all():
            return Index(axis, Offset(first))
    return None


def _range(node: ir.Node, depth: int) -> Index | None:
    start, step = scalar_offset(node.inputs[0]), scalar_offset(node.inputs[2])
    return Index(-1, start) if start is not None and step == Offset(1) else None


def _same(node: ir.Node, depth: int) -> Index | None:
    return index_vector(node.inputs[0], depth)


def _cast(node: ir.Node, depth: int) -> Index | None:
    dtype = node.outputs[0].dtype
    whole = dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return index_vector(node.inputs[0], depth) if whole else None


def _moved(node: ir.Node, depth: int) -> Index | None:
    source = index_vector(node.inputs[0], depth)
    if source is None or source.axis is None:
        return source
    axis = destination(node, source.axis)
    return None if axis is None else Index(axis, source.offset)


def _expand(node: ir.Node, depth: int) -> Index | None:
    source = index_vector(node.inputs[0], depth)
    if source is None or source.axis is None:
        return source
    return source if through(node.inputs[0], node.outputs[0], source.axis) else None


def _tile(node: ir.Node, depth: int) -> Index | None:
    source, repeats = index_vector(node.inputs[0], depth), contents(node.inputs[1])
    if source is None or source.axis is None:
        return source
    return source if repeats is not None and repeats[source.axis] == 1 else None


def _sum(node: ir.Node, depth: int) -> Index | None:
    a, b = (index_vector(v, depth) for v in node.inputs)
    if a is None or b is None or (a.axis is not None and b.axis is not None):
        return None
    if node.op_type == "Sub" and b.axis is not None:
        return None
    counting, other = (a, node.inputs[0]) if b.axis is None else (b, node.inputs[1])
    if counting.axis is not None and not through(other, node.outputs[0], counting.axis):
        return None
    return Index(counting.axis, a.offset.plus(b.offset, 1 if node.op_type == "Add" else -1))


def _slice(node: ir.Node, depth: int) -> Index | None:
    source = index_vector(node.inputs[0], depth)
    if source is None or source.axis is None:
        return source
    start = slice_start(node, source.axis)
    return None if start is None else Index(source.axis, source.offset.plus(start))


def _gather(node: ir.Node, depth: int) -> Index | None:
    data, picks = index_vector(node.inputs[0], depth), index_vector(node.inputs[1], depth)
    dims = sizes(node.inputs[0])
    if data is None or dims is None or picks is None:
        return None
    axis = node.attributes.get_int("axis", 0)
    axis = axis - len(dims) if axis >= 0 else axis
    if data.axis is None:
        return data
    if data.axis != axis or not picks.offset.never_negative:
        return None  # negative picks count from the end
    behind = -axis - 1
    return Index(None if picks.axis is None else picks.axis - behind, data.offset.plus(picks.offset))


def _gather_nd(node: ir.Node, depth: int) -> Index | None:
    data = index_vector(node.inputs[0], depth)
    if data is None or data.axis is None:
        return data
    picks = gathered_by(node, data.axis, depth)
    return None if picks is None else Index(picks.axis, data.offset.plus(picks.offset))


def gathered_by(node: ir.Node, axis: int, depth: int = _DEPTH) -> Index | None:
    """Of a GatherND of single elements: the index it uses on `axis` of the data, as counted in the result."""
    dims, joined = sizes(node.inputs[0]), node.inputs[1].producer() if node.inputs[1] is not None else None
    rank, batched = len(sizes(node.inputs[1]) or ()), node.attributes.get_int("batch_dims", 0)
    if dims is None or batched or not is_op(joined, "Concat"):
        return None
    assert joined is not None
    if joined.attributes.get_int("axis", 0) not in (-1, rank - 1) or len(joined.inputs) != len(dims):
        return None
    column = joined.inputs[len(dims) + axis]
    if any(dims_at(v, -1) != 1 for v in joined.inputs):
        return None
    picks = index_vector(column, depth)
    if picks is None or not picks.offset.never_negative or picks.axis == -1:
        return None
    # The axis of the coordinates is gone in the result.
    return Index(None if picks.axis is None else picks.axis + 1, picks.offset)


def slice_start(node: ir.Node, axis: int) -> Offset | None:
    """Where a Slice with step 1 starts on an axis counted from the end; None if unknown or from the end."""
    dims = sizes(node.inputs[0])
    given = [*node.inputs[1:], None, None, None][:4]
    starts, axes, steps = given[0], given[2], given[3]
    items = _items(starts)
    if dims is None or items is None:
        return None
    where = constant_array(axes, 64) if axes is not None else np.arange(len(items))
    by = constant_array(steps, 64) if steps is not None else np.ones(len(items), dtype=np.int64)
    if where is None or by is None or not len(where) == len(by) == len(items):
        return None
    for item, at, step in zip(items, where.tolist(), by.tolist(), strict=True):
        if (at - len(dims) if at >= 0 else at) == axis:
            return item if step == 1 and item is not None and item.never_negative else None
    return Offset()


def _items(value: ir.Value | None) -> list[Offset | None] | None:
    found = contents(value)
    if found is not None:
        return [offset_of(item) for item in found]
    node = value.producer() if value is not None else None
    if is_op(node, "Concat"):
        assert node is not None
        return [scalar_offset(v) for v in node.inputs] if all(sizes(v) == (1,) for v in node.inputs) else None
    return [scalar_offset(value)] if sizes(value) == (1,) else None


def destination(node: ir.Node, axis: int) -> int | None:
    """Where a Reshape, Squeeze, Unsqueeze or Transpose puts an axis of its input, both counted from the end."""
    for place in range(-len(sizes(node.outputs[0]) or ()), 0):
        if origin(node, place) == axis:
            return place
    return None


def origin(node: ir.Node, axis: int) -> int | None:
    """Which axis of its input such a node puts at `axis`, both counted from the end; None: it is new, or unknown."""
    before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
    if before is None or (after is None and node.op_type != "Reshape"):
        return None
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", None) or tuple(reversed(range(len(before))))
        return int(perm[axis]) - len(before)
    if node.op_type == "Reshape" and (after is None or any(isinstance(d, tuple) for d in after)):
        told = reshaped(node)
        after = None if told is None or None in told else tuple(t for t in told if t is not None)
    if after is None or -axis > len(after):
        return None
    if node.op_type == "Unsqueeze":
        axes = constant_array(node.inputs[1], 64)
        if axes is None:
            return None
        added = {int(a) % len(after) for a in axes.ravel()}
        kept = [n for n in range(len(after)) if n not in added]
        place = axis + len(after)
        return kept.index(place) - len(before) if place in kept else None
    # A Squeeze, or a Reshape that only puts in and takes out axes of size 1.
    old = [n for n, d in enumerate(before) if d != 1]
    new = [n for n, d in enumerate(after) if d != 1]
    if [before[n] for n in old] != [after[n] for n in new] and node.op_type != "Squeeze":
        return None
    if len(old) != len(new) or axis + len(after) not in new:
        return None
    return old[new.index(axis + len(after))] - len(before)


_READERS = {
    "Range": _range,
    "Identity": _same,
    "Cast": _cast,
    "Unsqueeze": _moved,
    "Squeeze": _moved,
    "Reshape": _moved,
    "Transpose": _moved,
    "Expand": _expand,
    "Tile": _tile,
    "Add": _sum,
    "Sub": _sum,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
}

__all__ = ["Index", "Offset", "gathered_by", "index_vector", "offset_of", "origin", "slice_start", "through"]
