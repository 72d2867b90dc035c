"""What values an additive attention mask can hold, as an interval; where masks come from is known to be simple.

The bounds matter for rows in which every key is masked. A row of finite numbers is a plain softmax over the scores,
one of ``-inf`` is NaN, and ONNX Runtime's Attention gives zeros as soon as a whole row is at the lowest float.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array

#: Close to the lowest float32, and above it: absorbs every score as that does, without its meaning in Attention.
ALMOST_LOWEST = -3.3e38
_LOWEST = float(np.finfo(np.float32).min)
_OVERFLOW = -float.fromhex("0x1.ffffffp127")  # half a step below the lowest: from here on rounded to -inf
ABSORBING = -1e37  #: What is added to this leaves it as it is, below 1e30 at least.
_DEPTH = 24
_MOVES = frozenset(
    {
        "Identity",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Expand",
        "Transpose",
        "Slice",
        "Gather",
        "GatherND",
        "GatherElements",
        "Tile",
        "Trilu",
    }
)
_BOOL_OPS = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Xor"})


@dataclass(frozen=True)
class Bounds:
    """Finite values are in [low, high]; `infinite` when ``-inf`` can occur besides."""

    low: float
    high: float
    infinite: bool = False

    def join(self, other: Bounds) -> Bounds:
        return Bounds(min(self.low, other.low), max(self.high, other.high), self.infinite or other.infinite)

    def checked(self) -> Bounds | None:
        """Accounts for float32: what rounds below its lowest value is ``-inf``; above its highest nothing is known."""
        if not self.high <= -_LOWEST:
            return None
        if self.low <= _OVERFLOW:
            return replace(self, low=_LOWEST, infinite=True)
        return replace(self, low=max(self.low, _LOWEST))


_INTEGER = Bounds(-(2.0**63), 2.0**64)


def bounds(value: ir.Value | None, depth: int = _DEPTH) -> Bounds | None:
    """The interval of `value`, or None if nothing is known.

    An integer or bool input of the graph that a mask is made from is taken to hold zeros and ones.
    """
    if value is None or depth == 0:
        return None
    if value.dtype == ir.DataType.BOOL:
        return Bounds(0.0, 1.0)
    array = constant_array(value, 1 << 24)
    if array is not None:
        return _of_array(array)
    node = value.producer()
    if node is None:
        integer = value.dtype is not None and value.dtype.is_integer()
        return Bounds(0.0, 1.0) if value.is_graph_input() and integer else None
    if node.domain:
        return None
    kind = node.op_type
    if kind in _BOOL_OPS:
        return Bounds(0.0, 1.0)
    if kind in _MOVES:
        found = bounds(node.inputs[0], depth - 1)
        # Trilu fills with zeros.
        return found.join(Bounds(0.0, 0.0)) if found is not None and kind == "Trilu" else found
    if kind == "Cast":
        found = bounds(node.inputs[0], depth - 1)
        source = node.inputs[0].dtype if node.inputs[0] is not None else None
        return _INTEGER if found is None and source is not None and source.is_integer() else found
    if kind == "ConstantOfShape":
        fill = node.attributes.get("value")
        return Bounds(0.0, 0.0) if fill is None else _of_array(fill.as_tensor().numpy())
    if kind == "Where":
        return _join([bounds(v, depth - 1) for v in node.inputs[1:]])
    if kind == "Concat":
        return _join([bounds(v, depth - 1) for v in node.inputs])
    if kind in ("Add", "Sub", "Mul", "Neg", "Max"):
        return _arithmetic(kind, [bounds(v, depth - 1) for v in node.inputs])
    return None


def zero_or_masked(value: ir.Value | None, depth: int = _DEPTH) -> bool:
    """Whether every number is 0, or so low that it absorbs whatever it is added to."""
    array = constant_array(value, 1 << 24)
    if array is not None:
        return array.dtype.kind == "f" and bool(((array == 0) | (array <= ABSORBING)).all())
    node = value.producer() if value is not None else None
    if node is None or node.domain or depth == 0:
        return False
    if node.op_type == "Where":
        return all(zero_or_masked(v, depth - 1) for v in node.inputs[1:])
    return node.op_type in _MOVES and zero_or_masked(node.inputs[0], depth - 1)


def _of_array(array: np.ndarray) -> Bounds | None:
    values = np.asarray(array, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if np.isnan(values).any() or np.isposinf(values).any():
        return None
    infinite = finite.size < values.size
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return Bounds(low, high, infinite)


def _join(parts: list[Bounds | None]) -> Bounds | None:
    found = parts[0]
    for part in parts[1:]:
        found = found.join(part) if found is not None and part is not None else None
    return found


def _arithmetic(kind: str, parts: list[Bounds | None]) -> Bounds | None:
    known = [p for p in parts if p is not None]
    if len(known) < len(parts):
        return None
    a = known[0]
    if kind == "Neg":
        return None if a.infinite else Bounds(-a.high, -a.low)
    b = known[1]
    if kind == "Max" and len(known) == 2:
        infinite = a.infinite and b.infinite
        return Bounds(
            max(a.low, b.low) if not (a.infinite or b.infinite) else min(a.low, b.low), max(a.high, b.high), infinite
        )
    if kind == "Add" and len(known) == 2:
        return Bounds(a.low + b.low, a.high + b.high, a.infinite or b.infinite).checked()
    if kind == "Sub":
        return None if b.infinite else Bounds(a.low - b.high, a.high - b.low, a.infinite).checked()
    if kind == "Mul" and not (a.infinite or b.infinite):
        corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
        return Bounds(min(corners), max(corners)).checked()
    return None
