"""Reads off a graph how the items of heads are turned in front of a rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op
from planish.passes.fusion.sizes import contents, rank, scalar, sizes


@dataclass(frozen=True)
class Rotation:
    """``(-second half, first half)`` of the last axis of `x`, or ``(-x1, x0, -x3, x2, ...)`` if `interleaved`.

    Attributes:
        nodes: what computes it.
    """

    x: ir.Value
    interleaved: bool
    nodes: tuple[ir.Node, ...]


def read_rotation(value: ir.Value | None) -> Rotation | None:
    """The rotation that `value` is, or None."""
    node = value.producer() if value is not None else None
    if is_op(node, "Concat"):
        return _halves(node)  # type: ignore[arg-type]
    if is_op(node, "Reshape"):
        return _neighbours(node)  # type: ignore[arg-type]
    return None


def part(value: ir.Value | None) -> tuple[ir.Value, range] | None:
    """(source, indices) if `value` is what a Slice or Split takes of the last axis, whose size is known."""
    node = value.producer() if value is not None else None
    source = node.inputs[0] if is_op(node, "Slice", "Split") else None  # type: ignore[union-attr]
    dims = sizes(source)
    if source is None or node is None or not dims or not isinstance(dims[-1], int):
        return None
    if node.op_type == "Slice":
        items = _sliced(node, len(dims), dims[-1])
    else:
        items = _split(node, node.outputs.index(value), len(dims), dims[-1])  # type: ignore[arg-type]
    return None if items is None else (source, items)


def _sliced(node: ir.Node, axes: int, size: int) -> range | None:
    given = [constant_array(v, 8) for v in node.inputs[1:]]
    if len(given) < 3 or any(a is None or a.size != 1 for a in given):
        return None
    start, stop, axis, *step = (int(a.item()) for a in given if a is not None)
    if axis not in (-1, axes - 1):
        return None
    return range(size)[start : stop : step[0] if step else 1]


def _split(node: ir.Node, index: int, axes: int, size: int) -> range | None:
    if node.attributes.get_int("axis", 0) not in (-1, axes - 1):
        return None
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        widths = contents(node.inputs[1])
    else:
        count = len(node.outputs)
        widths = (size // count,) * count if size % count == 0 else None
    if widths is None or not all(isinstance(w, int) for w in widths):
        return None
    ends = [sum(w for w in widths[:i] if isinstance(w, int)) for i in range(len(widths) + 1)]
    return range(ends[index], ends[index + 1])


def _negated(value: ir.Value | None) -> tuple[ir.Value, ir.Node] | None:
    node = value.producer() if value is not None else None
    if is_op(node, "Neg"):
        return node.inputs[0], node  # type: ignore
    if is_op(node, "Mul"):
        for index in (0, 1):
            if scalar(node.inputs[1 - index]) == -1.0:  # type: ignore[union-attr]
                return node.inputs[index], node  # type: ignore
    return None


def _parts(negated: ir.Value | None, kept: ir.Value | None) -> tuple[ir.Value, range, range, list[ir.Node]] | None:
    """(x, indices of what is negated, indices of what is not, nodes), if both are taken from one x."""
    minus = _negated(negated)
    if minus is None or kept is None:
        return None
    back, front = part(minus[0]), part(kept)
    if back is None or front is None or back[0] is not front[0]:
        return None
    cutters = dict.fromkeys([minus[0].producer(), kept.producer()])
    return front[0], back[1], front[1], [minus[1], *(n for n in cutters if n is not None)]


def _halves(node: ir.Node) -> Rotation | None:
    if len(node.inputs) != 2 or node.attributes.get_int("axis", 0) not in (-1, (rank(node.inputs[1]) or 0) - 1):
        return None
    found = _parts(*node.inputs)
    if found is None:
        return None
    x, back, front, nodes = found
    size, half = len(back) + len(front), len(front)
    if front != range(half) or back != range(half, size) or half != len(back) or (sizes(x) or ())[-1] != size:
        return None
    return Rotation(x, False, (node, *nodes))


def _neighbours(node: ir.Node) -> Rotation | None:
    stack = node.inputs[0].producer() if node.inputs[0] is not None else None
    if not is_op(stack, "Concat") or stack is None or len(stack.inputs) != 2:
        return None
    dims = sizes(stack.outputs[0]) or ()
    ups = [v.producer() if v is not None else None for v in stack.inputs]
    if stack.attributes.get_int("axis", 0) not in (-1, len(dims) - 1) or not all(_adds_last(u) for u in ups):
        return None
    found = _parts(*(u.inputs[0] for u in ups if u is not None))
    if found is None:
        return None
    x, odd, even, nodes = found
    wanted = sizes(x) or ()
    size = wanted[-1]
    # Equal but for the last two axes, which join to the last: then nothing else can have moved.
    if not isinstance(size, int) or sizes(node.outputs[0]) != wanted or dims != (*wanted[:-1], size // 2, 2):
        return None
    if even != range(0, size, 2) or odd != range(1, size, 2):
        return None
    return Rotation(x, True, (node, stack, *(u for u in ups if u is not None), *nodes))


def _adds_last(node: ir.Node | None) -> bool:
    """Whether `node` appends an axis."""
    if not is_op(node, "Unsqueeze") or node is None:
        return False
    axes = contents(node.inputs[1])
    before = rank(node.inputs[0])
    return before is not None and axes in ((-1,), (before,))
