"""Bands: masks that let a query see the keys around its own position, read off comparisons of positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.fusion.index_vectors import Offset, index_vector
from planish.passes.fusion.sizes import rank, scalar

_DEPTH = 16
_LESS = {"Less": -1, "LessOrEqual": 0}
_GREATER = {"Greater": -1, "GreaterOrEqual": 0}


@dataclass(frozen=True)
class Band:
    """Query i sees key j if ``i - left <= j <= i + right``, or j < global_keys, or i < global_queries.

    Attributes:
        left, right: None: no limit on that side.
        last: a limit on j - i for global keys and queries too.
    """

    left: Offset | None = None
    right: Offset | None = None
    global_keys: int = 0
    global_queries: int = 0
    last: Offset | None = None

    @property
    def has_globals(self) -> bool:
        return bool(self.global_keys or self.global_queries)

    def both(self, other: Band, leaf: ir.Value) -> Band:
        """What passes this band and that of `leaf`.

        Raises:
            Decline: no band says it, or the order of two lengths is unknown.
        """
        if self.has_globals and other.has_globals:
            raise Decline(f"a part of its mask, '{leaf.name}', is a second one with global positions")
        if not (self.has_globals or other.has_globals):
            return Band(_least(self.left, other.left, leaf), _least(self.right, other.right, leaf))
        whole, plain = (self, other) if self.has_globals else (other, self)
        if plain.left is not None:
            raise Decline(f"a part of its mask, '{leaf.name}', hides global positions")
        return replace(whole, last=_least(whole.last, plain.right, leaf))


CAUSAL = Band(right=Offset())


def _least(a: Offset | None, b: Offset | None, leaf: ir.Value) -> Offset | None:
    if a is None or b is None:
        return b if a is None else a
    if a.minus(b).never_negative:
        return b
    if b.minus(a).never_negative:
        return a
    raise Decline(f"a part of its mask, '{leaf.name}', is a window of unknown size beside another")


def band_of(value: ir.Value) -> Band | None:
    """The band that (…, queries, keys) of bool is, exactly; None if it is none."""
    if rank(value) is None:
        return None
    node = value.producer()
    if is_op(node, "Or"):
        return _with_globals(value)
    if is_op(node, "And"):
        assert node is not None
        found = Band()
        for side in node.inputs:
            band = band_of(side) if side is not None else None
            if band is None:
                return None
            found = found.both(band, value)
        return found
    if not is_op(node, *_LESS, *_GREATER):
        return None
    assert node is not None
    small, large = node.inputs if node.op_type in _LESS else node.inputs[::-1]
    return _compared(small, large, Offset({**_LESS, **_GREATER}[node.op_type]))


def _compared(small: ir.Value | None, large: ir.Value | None, slack: Offset) -> Band | None:
    """small <= large + slack, elementwise."""
    a, b = index_vector(small), index_vector(large)
    if a is not None and b is not None:
        difference = b.offset.minus(a.offset).plus(slack)
        if (a.axis, b.axis) == (-1, -2):  # j + a <= i + b
            return Band(right=difference)
        return Band(left=difference) if (a.axis, b.axis) == (-2, -1) else None
    # i - j, j - i, or the size of it, against a number.
    if b is not None and b.axis is None:
        return _distance(small, b.offset.plus(slack))
    if a is not None and a.axis is None:
        found = _distance(large, Offset().minus(a.offset).plus(slack), -1)
        return found
    return None


def _distance(value: ir.Value | None, limit: Offset, sign: int = 1) -> Band | None:
    """sign · value <= limit, where `value` is a difference of positions."""
    node = value.producer() if value is not None else None
    if is_op(node, "Abs") and sign == 1:
        assert node is not None
        one, other = _distance(node.inputs[0], limit), _distance(node.inputs[0], limit, -1)
        if one is None or other is None:
            return None
        return Band(one.left or other.left, one.right or other.right)
    if not is_op(node, "Sub"):
        return None
    assert node is not None
    a, b = (index_vector(v) for v in node.inputs)
    if a is None or b is None or {a.axis, b.axis} != {-1, -2}:
        return None
    # sign · (x + a - y - b) <= limit
    rest = limit.minus(a.offset.minus(b.offset)) if sign == 1 else limit.plus(a.offset.minus(b.offset))
    key_first = (a.axis == -1) == (sign == 1)
    return Band(right=rest) if key_first else Band(left=rest)


def _with_globals(value: ir.Value) -> Band | None:
    """A band, or positions before a number."""
    band: Band | None = None
    counts = {-1: 0, -2: 0}
    for side in _alternatives(value, _DEPTH):
        place = _first_positions(side)
        if place is not None:
            axis, count = place
            counts[axis] = max(counts[axis], count)
        elif band is None and (found := band_of(side)) is not None and not found.has_globals:
            band = found
        else:
            return None
    if band is None:
        return None
    return replace(band, global_keys=counts[-1], global_queries=counts[-2])


def _alternatives(value: ir.Value, depth: int) -> Iterator[ir.Value]:
    node = value.producer()
    if depth and is_op(node, "Or"):
        assert node is not None
        for side in node.inputs:
            assert side is not None
            yield from _alternatives(side, depth - 1)
    else:
        yield value


def _first_positions(value: ir.Value) -> tuple[int, int] | None:
    """(axis, n) of a bool that is true for the first n positions on that axis."""
    node = value.producer()
    if not is_op(node, *_LESS, *_GREATER):
        return None
    assert node is not None
    small, large = node.inputs if node.op_type in _LESS else node.inputs[::-1]
    index, limit = index_vector(small), scalar(large)
    if index is None or index.axis not in (-1, -2) or index.offset.lengths or limit is None or limit != int(limit):
        return None
    count = int(limit) - index.offset.number + 1 + {**_LESS, **_GREATER}[node.op_type]
    return (index.axis, count) if count >= 0 else None


__all__ = ["CAUSAL", "Band", "band_of"]
