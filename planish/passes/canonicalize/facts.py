"""What is known of shapes, and of the contents of the small integer vectors that compute shapes.

An item of a known vector is an int, the name of a symbolic size (equal names are equal sizes; a size is never
negative, and may be zero), or None. `Facts.visit` takes one step from facts of the inputs, so that a walk in
order of execution is linear and needs no recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, dims_of

Item = int | str | None
_MAX_ITEMS = 64
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_KNOWN_DTYPES = (*_INTEGERS, ir.DataType.BOOL)


@dataclass(frozen=True)
class Vector:
    """Contents of an integer or bool tensor of rank 0 (`scalar`) or 1; bools are 0 and 1."""

    items: tuple[Item, ...]
    scalar: bool = False

    @property
    def ints(self) -> tuple[int, ...] | None:
        """The items if all are numbers."""
        return self.items if all(isinstance(i, int) for i in self.items) else None  # type: ignore[return-value]


def same_item(a: Item, b: Item) -> bool:
    """Whether two sizes are proved equal."""
    return a is not None and a == b


def same_dims(a: Sequence[Item] | None, b: Sequence[Item] | None) -> bool:
    """Whether two shapes are proved equal."""
    return a is not None and b is not None and len(a) == len(b) and all(map(same_item, a, b))


def static_dims(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape if every size is a number."""
    dims = dims_of(value)
    return dims if dims is not None and all(isinstance(d, int) for d in dims) else None  # type: ignore[return-value]


class Facts:
    """Known vectors of one model, filled while walking it."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Vector] = {}

    def vector(self, value: ir.Value | None) -> Vector | None:
        """What is known of the contents of `value`, whose producer was visited before."""
        if value is None:
            return None
        found = self._known.get(value)
        if found is None and (value.is_initializer() or value.producer() is not None):
            found = _constant(value)
            if found is not None:
                self._known[value] = found
        return found

    def visit(self, node: ir.Node) -> Vector | None:
        """Notes what follows for the first output of `node`, and returns it."""
        rule = _RULES.get(node.op_type) if not node.domain else None
        if rule is None or not node.outputs:
            return None
        found = rule(node, self)
        if found is not None and len(found.items) <= _MAX_ITEMS:
            self._known[node.outputs[0]] = found
            return found
        return None


def _constant(value: ir.Value) -> Vector | None:
    array = constant_array(value, _MAX_ITEMS)
    if array is None or array.ndim > 1 or ir.DataType.from_numpy(array.dtype) not in _KNOWN_DTYPES:
        return None
    return Vector(tuple(int(i) for i in array.ravel()), array.ndim == 0)


def _shape(node: ir.Node, facts: Facts) -> Vector | None:
    dims = dims_of(node.inputs[0])
    if dims is None:
        return None
    return Vector(dims[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", None))])


def _size(node: ir.Node, facts: Facts) -> Vector | None:
    dims = static_dims(node.inputs[0])
    return None if dims is None else Vector((int(np.prod(dims, dtype=object)),), scalar=True)


def _same(node: ir.Node, facts: Facts) -> Vector | None:
    return facts.vector(node.inputs[0])


def _cast(node: ir.Node, facts: Facts) -> Vector | None:
    source = facts.vector(node.inputs[0])
    target = node.attributes.get_int("to", 0)
    if source is None or target not in _INTEGERS:
        return None
    if target == ir.DataType.INT32 and any(isinstance(i, int) and not -(2**31) <= i < 2**31 for i in source.items):
        return None
    return source


def _gather(node: ir.Node, facts: Facts) -> Vector | None:
    data, index = (facts.vector(v) for v in node.inputs)
    if data is None or data.scalar or index is None or index.ints is None:
        return None
    size = len(data.items)
    if any(not -size <= i < size for i in index.ints):
        return None
    return Vector(tuple(data.items[i] for i in index.ints), index.scalar)


def _slice(node: ir.Node, facts: Facts) -> Vector | None:
    data = facts.vector(node.inputs[0])
    operands = [facts.vector(v) for v in node.inputs[1:]]
    if data is None or data.scalar or len(operands) < 2:
        return None
    if any(o is None and v is not None for o, v in zip(operands, node.inputs[1:], strict=True)):
        return None
    ints = [o.ints if o is not None else None for o in operands]
    start, end = ints[0], ints[1]
    step = ints[3] if len(ints) > 3 and node.inputs[4] is not None else (1,)
    if start is None or end is None or step is None or not len(start) == len(end) == len(step) == 1 or step[0] < 1:
        return None
    return Vector(data.items[start[0] : end[0] : step[0]])


def _concat(node: ir.Node, facts: Facts) -> Vector | None:
    parts: list[Item] = []
    for value in node.inputs:
        part = facts.vector(value)
        if part is None:
            dims = static_dims(value)
            if dims is None or len(dims) != 1 or dims[0] > _MAX_ITEMS or value is None or value.dtype not in _INTEGERS:
                return None
            part = Vector((None,) * dims[0])
        if part.scalar:
            return None
        parts.extend(part.items)
    return Vector(tuple(parts))


def _regroup(node: ir.Node, facts: Facts) -> Vector | None:
    """Squeeze, Unsqueeze and Reshape between a scalar and a vector."""
    source = facts.vector(node.inputs[0])
    dims = dims_of(node.outputs[0])
    if node.op_type == "Unsqueeze" and source is not None and source.scalar:
        axes = facts.vector(node.inputs[1]) if len(node.inputs) > 1 else None
        return Vector(source.items) if axes is not None and len(axes.items) == 1 else None
    if node.op_type == "Squeeze" and source is not None and len(source.items) == 1:
        return Vector(source.items, scalar=True) if not source.scalar else source
    if source is None or dims is None or len(dims) > 1:
        return None
    if not dims:
        return Vector(source.items, scalar=True) if len(source.items) == 1 else None
    return Vector(source.items)


def _arithmetic(node: ir.Node, facts: Facts) -> Vector | None:
    a, b = (facts.vector(v) for v in node.inputs)
    if a is None or b is None or len(node.inputs) != 2:
        return None
    length = max(len(a.items), len(b.items)) if len(a.items) and len(b.items) else 0
    if any(len(v.items) not in (1, length) for v in (a, b)):
        return None
    x, y = (v.items if len(v.items) == length else v.items * length for v in (a, b))
    operate = _OPERATIONS[node.op_type]
    return Vector(tuple(operate(i, j) for i, j in zip(x, y, strict=True)), a.scalar and b.scalar)


def _where(node: ir.Node, facts: Facts) -> Vector | None:
    condition, a, b = (facts.vector(v) for v in node.inputs)
    if condition is None or a is None or b is None:
        return None
    length = max(len(v.items) for v in (condition, a, b))
    if any(len(v.items) not in (1, length) for v in (condition, a, b)):
        return None
    c, x, y = (v.items if len(v.items) == length else v.items * length for v in (condition, a, b))
    items = (_chosen(k, i, j) for k, i, j in zip(c, x, y, strict=True))
    return Vector(tuple(items), condition.scalar and a.scalar and b.scalar)


def _chosen(condition: Item, a: Item, b: Item) -> Item:
    if isinstance(condition, int):
        return a if condition else b
    return a if same_item(a, b) else None


def _filled(node: ir.Node, facts: Facts) -> Vector | None:
    shape = facts.vector(node.inputs[0])
    attribute = node.attributes.get("value")
    if attribute is None or attribute.is_ref() or shape is None or shape.ints is None or len(shape.ints) > 1:
        return None
    tensor = attribute.as_tensor()
    length = shape.ints[0] if shape.ints else 1
    if tensor.dtype not in _KNOWN_DTYPES or not 0 <= length <= _MAX_ITEMS or tensor.size != 1:
        return None
    return Vector((int(tensor.numpy().ravel()[0]),) * length, scalar=not shape.ints)


def _binary(operate: Callable[[int, int], int | None], neutral: int | None = None) -> Callable[[Item, Item], Item]:
    def apply(a: Item, b: Item) -> Item:
        if isinstance(a, int) and isinstance(b, int):
            found = operate(a, b)
            return found if found is not None and -(2**31) <= found < 2**31 else None
        return a if neutral is not None and b == neutral and isinstance(a, str) else None

    return apply


def _commuting(operate: Callable[[int, int], int], neutral: int) -> Callable[[Item, Item], Item]:
    one_sided = _binary(operate, neutral)

    def apply(a: Item, b: Item) -> Item:
        found = one_sided(a, b)
        return one_sided(b, a) if found is None else found

    return apply


def _truncated(a: int, b: int) -> int | None:
    if b == 0:
        return None
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _equal(a: Item, b: Item) -> Item:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    if isinstance(a, str) and a == b:
        return 1
    # A size is never negative.
    return 0 if any(isinstance(i, str) and isinstance(j, int) and j < 0 for i, j in ((a, b), (b, a))) else None


_OPERATIONS: dict[str, Callable[[Item, Item], Item]] = {
    "Add": _commuting(lambda a, b: a + b, 0),
    "Sub": _binary(lambda a, b: a - b, 0),
    "Mul": _commuting(lambda a, b: a * b, 1),
    "Div": _binary(_truncated, 1),
    "Equal": _equal,
}
_RULES: dict[str, Callable[[ir.Node, Facts], Vector | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Squeeze": _regroup,
    "Unsqueeze": _regroup,
    "Reshape": _regroup,
    "Where": _where,
    "ConstantOfShape": _filled,
    **dict.fromkeys(_OPERATIONS, _arithmetic),
}
SHAPE_OPS = frozenset(_RULES)
