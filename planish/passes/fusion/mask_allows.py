"""Whether an attention mask lets query i attend only to keys j <= i + offset, read off how the mask is made.

A bool mask allows where it is True; a float mask, which is added to the scores, where it is above ``MASKED``. The mask
is followed from its output to the comparisons of positions and the constants that it is made of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op
from planish.passes.fusion.index_vectors import (
    Offset,
    dims_at,
    index_vector,
    origin,
    scalar_offset,
    slice_start,
    through,
)
from planish.passes.fusion.mask_values import bounds
from planish.passes.fusion.sizes import rank, scalar

#: What is added to scores at most where a key is masked: the softmax gives such a key the weight 0, if its row has
#: a key that is not masked.
MASKED = -1e4
KEPT = -1e3  #: What is added to the scores at least where a key is certainly not masked.
_DEPTH = 24
_NONE = Offset()
_MOST_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Causal:
    """Query i attends to no key j > i + `offset`.

    Attributes:
        first: every query may attend to key 0, so no row is fully masked.
        same: all this is if these axes of these values, -2 and -1, are as long as queries and keys. They are
            expanded to the mask, and nothing says that they are not broadcast.
    """

    offset: Offset
    first: bool = False
    same: tuple[tuple[ir.Value, int], ...] = ()


@dataclass(frozen=True)
class _Place:
    """Where a value counts queries and keys: axes from the end; None if it is the same for all of them."""

    query: int | None = -2
    key: int | None = -1


def mask_allows(mask: ir.Value) -> Causal | None:
    """The bound on what `mask`, (…, queries, keys) of bool or float, allows, or None if none is known."""
    node = mask.producer()
    value: ir.Value = node.inputs[0] if is_op(node, "Expand") and (rank(node.inputs[0]) or 0) >= 2 else mask  # type: ignore
    if mask.dtype == ir.DataType.BOOL:
        found = _holds(value, True, _Place(), _DEPTH)
    else:
        found = _above(value, _Place(), _DEPTH) if mask.dtype == ir.DataType.FLOAT else None
    open_axes = [axis for axis in (-2, -1) if not through(value, mask, axis)]
    if found is None or any(dims_at(value, axis) == 1 for axis in open_axes):
        return None
    return replace(found, same=tuple((value, axis) for axis in open_axes))


def _both(a: Causal | None, b: Causal | None) -> Causal | None:
    """Where both conditions hold: the tighter bound of the two."""
    if a is None or b is None:
        found = a or b
        return None if found is None else Causal(found.offset)
    tighter = b if a.offset.minus(b.offset).never_negative else a
    return Causal(tighter.offset, a.first and b.first)


def _either(a: Causal | None, b: Causal | None) -> Causal | None:
    """Where one of the conditions holds: the looser bound, if one of them is known to be."""
    if a is None or b is None:
        return None
    first = a.first or b.first
    if a.offset.minus(b.offset).never_negative:
        return Causal(a.offset, first)
    return Causal(b.offset, first) if b.offset.minus(a.offset).never_negative else None


def _operand(value: ir.Value | None, result: ir.Value, place: _Place) -> _Place:
    """`place` as seen by an operand that is broadcast to `result`; an axis that is not known to be kept is None."""
    axes = [a if a is not None and through(value, result, a) else None for a in (place.query, place.key)]
    return _Place(*axes)


def _holds(value: ir.Value | None, truth: bool, place: _Place, depth: int) -> Causal | None:
    """The bound on the positions where the bool or integer `value` is (not) zero, by `truth`."""
    if value is None or depth == 0 or (place.query is None and place.key is None):
        return None
    array = constant_array(value, _MOST_ELEMENTS)
    if array is not None:
        return _of_array(array.astype(bool) == truth, place)
    node = value.producer()
    if node is None or node.domain:
        return None
    kind, depth = node.op_type, depth - 1
    if kind == "Not":
        return _holds(node.inputs[0], not truth, place, depth)
    if kind == "Cast":
        # A cast to integers makes zeros of more numbers than zero.
        return _holds(node.inputs[0], truth, place, depth) if truth or _integer(node.inputs[0]) is not None else None
    if kind in ("And", "Or"):
        parts = [_holds(v, truth, _operand(v, value, place), depth) for v in node.inputs]
        return (_both if (kind == "And") is truth else _either)(*parts)
    if kind in _COMPARISONS:
        return _compared(node, truth, place, depth)
    if kind == "Where":
        cases = []
        for number, side in enumerate(node.inputs[1:]):
            if _constantly(side, not truth):
                continue
            condition = _holds(node.inputs[0], number == 0, _operand(node.inputs[0], value, place), depth)
            if not _constantly(side, truth):
                condition = _both(condition, _holds(side, truth, _operand(side, value, place), depth))
            cases.append(condition)
        return cases[0] if len(cases) == 1 else _either(*cases) if cases else None
    if kind == "Trilu":
        return _triangle(node, place, truth, _constantly(node.inputs[0], True))
    moved = _moved(node, place)
    if moved is None:
        return None
    return _shifted(_holds(node.inputs[0], truth, moved.place, depth), moved)


def _above(value: ir.Value | None, place: _Place, depth: int) -> Causal | None:
    """The bound on the positions where the float `value` is above `MASKED`."""
    if value is None or depth == 0 or (place.query is None and place.key is None):
        return None
    array = constant_array(value, _MOST_ELEMENTS)
    if array is not None:
        return _of_array(~(array <= MASKED), place, array > KEPT)
    node = value.producer()
    if node is None or node.domain:
        return None
    kind, depth = node.op_type, depth - 1
    if kind == "Where":
        cases = []
        for number, side in enumerate(node.inputs[1:]):
            if _masked(side):
                continue
            condition = _holds(node.inputs[0], number == 0, _operand(node.inputs[0], value, place), depth)
            kept = scalar(side)
            if kept is None or kept <= KEPT:
                condition = _both(condition, _above(side, _operand(side, value, place), depth))
            cases.append(condition)
        return cases[0] if len(cases) == 1 else _either(*cases) if cases else None
    if kind == "Max" and len(node.inputs) == 2:
        for side, other in (node.inputs, node.inputs[::-1]):
            if _masked(other):
                return _above(side, _operand(side, value, place), depth)
        return None
    if kind == "Add":
        # Only where the other side can not lift what is masked above the bound.
        parts = [
            _above(a, _operand(a, value, place), depth) if _low_enough(a, b) else None
            for a, b in (node.inputs, node.inputs[::-1])
        ]
        return _both(*parts)
    if kind == "Mul":
        return _filled(node, value, place, depth)
    if kind == "Trilu":
        return _triangle(node, place, False, _masked(node.inputs[0]))
    moved = _moved(node, place)
    if moved is None:
        return None
    return _shifted(_above(node.inputs[0], moved.place, depth), moved)


def _filled(node: ir.Node, value: ir.Value, place: _Place, depth: int) -> Causal | None:
    """``(1 - allowed) * lowest``, and ``forbidden * lowest``."""
    for side, other in (node.inputs, node.inputs[::-1]):
        fill = scalar(other)
        if fill is None or not -math.inf < fill <= MASKED:
            continue
        place = _operand(side, value, place)
        inner = side.producer() if side is not None else None
        if is_op(inner, "Sub") and scalar(inner.inputs[0]) == 1.0:  # type: ignore[union-attr]
            kept = inner.inputs[1]  # type: ignore[union-attr]
            return _holds(_whole(kept), True, _operand(kept, inner.outputs[0], place), depth)  # type: ignore[union-attr]
        return _holds(_whole(side), False, place, depth) if _whole(side) is not None else None
    return None


def _whole(value: ir.Value | None) -> ir.Value | None:
    """What a float of zeros and ones (or other whole numbers) was cast from, through nodes that only move it."""
    node = value.producer() if value is not None else None
    if is_op(node, "Cast"):
        source = node.inputs[0]  # type: ignore[union-attr]
        return value if source is not None and source.dtype == ir.DataType.BOOL else None
    if is_op(node, "Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Slice"):
        return value if _whole(node.inputs[0]) is not None else None  # type: ignore[union-attr]
    return None


def _of_array(allowed: np.ndarray, place: _Place, kept: np.ndarray | None = None) -> Causal | None:
    if place.query is None or place.key is None or allowed.ndim < -min(place.query, place.key):
        return None
    table = np.moveaxis(allowed, (place.query, place.key), (-2, -1))
    rows, columns = np.nonzero(table.reshape(-1, *table.shape[-2:]).any(axis=0))
    if not len(rows):
        return None
    first = np.take(allowed if kept is None else kept, 0, axis=place.key)
    return Causal(Offset(int((columns - rows).max())), bool(first.all()))


_COMPARISONS = {"Less": ("<", ">="), "LessOrEqual": ("<=", ">"), "Greater": (">", "<="), "GreaterOrEqual": (">=", "<")}
_COMPARISONS["Equal"] = ("==", "!=")
_SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


def _compared(node: ir.Node, truth: bool, place: _Place, depth: int) -> Causal | None:
    result = node.outputs[0]
    relation = _COMPARISONS[node.op_type][not truth]
    if relation in ("==", "!="):
        # A flag compared with zero.
        for side, other in (node.inputs, node.inputs[::-1]):
            if constant_array(other, 1) is not None and scalar(other) == 0.0 and index_vector(side) is None:
                return _holds(_integer(side), relation == "!=", _operand(side, result, place), depth)
    sides = []
    for value in node.inputs:
        index, seen = index_vector(value), _operand(value, result, place)
        if index is None or index.axis is None:
            return None
        role = "query" if index.axis == seen.query else "key" if index.axis == seen.key else None
        sides.append((role, index.offset))
    (left, a), (right, b) = sides
    if {left, right} != {"query", "key"}:
        return None
    if left == "query":
        relation, a, b = _SWAPPED[relation], b, a
    # Now: key + a <relation> query + b.
    if relation not in ("<", "<=", "=="):
        return None
    offset = b.minus(a) if relation != "<" else b.minus(a).plus(Offset(-1))
    return Causal(offset, relation != "==" and offset.never_negative)


def _integer(value: ir.Value | None) -> ir.Value | None:
    return value if value is not None and value.dtype is not None and not value.dtype.is_floating_point() else None


def _triangle(node: ir.Node, place: _Place, truth: bool, full: bool) -> Causal | None:
    """Trilu: the lower triangle of anything is zero above it; the upper one of ones, or of -inf, holds them there."""
    shift = scalar_offset(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else Offset()
    if shift is None or place != _Place():
        return None
    upper = node.attributes.get_int("upper", 1)
    if not upper and truth:
        return Causal(shift, full and shift.never_negative)
    if upper and not truth and full:
        offset = shift.plus(Offset(-1))
        return Causal(offset, offset.never_negative)
    return None


@dataclass(frozen=True)
class _Move:
    """A position (i, j) in the result is (i + queries, j + keys) in the input, at `place`."""

    place: _Place
    queries: Offset = _NONE
    keys: Offset = _NONE


def _moved(node: ir.Node, place: _Place) -> _Move | None:
    """Of a node that only moves values: where they come from; None if that is unknown."""
    kind, result, source = node.op_type, node.outputs[0], node.inputs[0] if node.inputs else None
    axes = (place.query, place.key)
    if kind == "Identity":
        return _Move(place)
    if kind == "Expand":
        return _Move(_operand(source, result, place))
    if kind in ("Unsqueeze", "Squeeze", "Reshape", "Transpose"):
        return _Move(_Place(*(None if a is None else origin(node, a) for a in axes)))
    if kind == "Gather" and rank(node.inputs[1]) is not None and rank(source) is not None:
        at = node.attributes.get_int("axis", 0)
        at -= (rank(source) or 0) if at >= 0 else 0
        same_rank = rank(node.inputs[1]) == 1
        return _Move(place) if all(a is None or a > at or (same_rank and a != at) for a in axes) else None
    if kind == "Slice":
        queries, keys = (Offset() if a is None else slice_start(node, a) for a in axes)
        return None if queries is None or keys is None else _Move(place, queries, keys)
    return None


def _shifted(found: Causal | None, move: _Move) -> Causal | None:
    if found is None:
        return None
    offset = found.offset.plus(move.queries).minus(move.keys)
    return Causal(offset, found.first and move.keys == Offset())


def _constantly(value: ir.Value | None, truth: bool) -> bool:
    """Whether a bool or number is (not) zero everywhere."""
    array = _filling(value)
    return array is not None and bool((array.astype(bool) == truth).all())


def _masked(value: ir.Value | None) -> bool:
    array = _filling(value)
    return array is not None and array.dtype.kind == "f" and bool((array <= MASKED).all())


def _filling(value: ir.Value | None) -> np.ndarray | None:
    """Every number that a constant, or a constant that was expanded, holds."""
    array = constant_array(value, _MOST_ELEMENTS)
    node = value.producer() if value is not None else None
    if array is not None or node is None:
        return array
    if is_op(node, "ConstantOfShape"):
        fill = node.attributes.get("value")
        return np.zeros(1, dtype=np.float32) if fill is None else fill.as_tensor().numpy()
    if is_op(node, "Expand", "Reshape", "Unsqueeze", "Squeeze", "Identity"):
        return _filling(node.inputs[0])
    return None


def _low_enough(masked: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether what is masked in the one is still below the bound when the other is added."""
    lows, highs = bounds(masked), bounds(other)
    return lows is not None and highs is not None and highs.high <= 0


__all__ = ["KEPT", "MASKED", "Causal", "mask_allows"]
