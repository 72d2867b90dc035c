"""Values inside a generated kernel: numbers of one row, read as vectors along the last axis.

All sizes are constants of the program, so loops over features are written out, or run over whole vectors.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from planish.runtime.kernels.loops import local, script

Shape = tuple[int, ...]
#: Leading indices: constants, or variables of loops.
Lead = tuple[Any, ...]
#: Vectors that are written out one after the other; more are a loop.
_UNROLLED = 16


def integer(value: int) -> Any:
    import tvm.tirx as tx

    return tx.const(value, "int64")


def number(value: float, lanes: int = 1) -> Any:
    import tvm.tirx as tx

    return tx.const(float(value), "float32" if lanes == 1 else f"float32x{lanes}")


def load(buffer: Any, at: Any, lanes: int) -> Any:
    return buffer[at] if lanes == 1 else buffer.vload([at], f"float32x{lanes}")


def save(buffer: Any, at: Any, value: Any, lanes: int) -> None:
    import tvm.tirx as tx

    script().buffer_store(buffer, value, [at if lanes == 1 else tx.Ramp(at, 1, lanes)])


def spread(value: Any, lanes: int) -> Any:
    """A number in every lane."""
    import tvm.tirx as tx

    return value if lanes == 1 else tx.Broadcast(value, lanes)


def pieces(size: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, lanes) of vectors that cover `size` numbers: whole ones, then halves of halves."""
    result, at = [], 0
    while at < size:
        while lanes > size - at:
            lanes //= 2
        result.append((at, lanes))
        at += lanes
    return result


def opaque(value: Any) -> Any:
    """An integer kept in a register; bound by name, TVM would substitute it wherever it is used."""
    buffer = local(1, dtype="int64")
    script().buffer_store(buffer, value, [0])
    return buffer[0]


class Value(ABC):
    """A value of shape `shape`."""

    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @abstractmethod
    def at(self, lead: Lead, offset: Any, lanes: int) -> Any:
        """`lanes` numbers of the last axis from `offset` on; `lead` are the indices of the axes before it."""

    def fetch(self, shape: Shape, lead: Lead, offset: Any, lanes: int) -> Any:
        """The same position of this value broadcast to `shape`."""
        if not self.shape:
            return spread(self.at((), 0, 1), lanes)
        own = (*((0,) * (len(self.shape) - len(shape))), *lead)[-(len(self.shape) - 1) :] if len(self.shape) > 1 else ()
        index = tuple(0 if size == 1 else i for size, i in zip(self.shape[:-1], own, strict=True))
        if self.shape[-1] == 1 and shape[-1] != 1:
            return spread(self.at(index, 0, 1), lanes)
        return self.at(index, offset, lanes)


class Stored(Value):
    """A value in a buffer: in memory from `base` on, or in registers."""

    def __init__(self, shape: Shape, buffer: Any, base: Any = 0) -> None:
        self.shape, self.buffer, self.base = shape, buffer, base

    def flat(self, offset: Any, lanes: int) -> Any:
        at = offset if isinstance(self.base, int) and self.base == 0 else self.base + offset
        return load(self.buffer, at, lanes)

    def at(self, lead: Lead, offset: Any, lanes: int) -> Any:
        return self.flat(flat_offset(self.shape, lead, offset), lanes)

    def put(self, lead: Lead, offset: Any, lanes: int, value: Any) -> None:
        at = flat_offset(self.shape, lead, offset)
        save(self.buffer, at if isinstance(self.base, int) and self.base == 0 else self.base + at, value, lanes)

    def reshaped(self, shape: Shape) -> Stored:
        return Stored(shape, self.buffer, self.base)


class Computed(Value):
    """A value that is computed where it is read."""

    def __init__(self, shape: Shape, rule: Callable[[Lead, Any, int], Any]) -> None:
        self.shape, self.at_ = shape, rule

    def at(self, lead: Lead, offset: Any, lanes: int) -> Any:
        return self.at_(lead, offset, lanes)


def flat_offset(shape: Shape, lead: Lead, offset: Any) -> Any:
    """Of a position in an array of this shape, rows first."""
    total, stride = offset, shape[-1] if shape else 1
    for size, index in zip(reversed(shape[:-1]), reversed(lead), strict=True):
        if not (isinstance(index, int) and index == 0):
            total = total + index * stride
        stride *= size
    return total


def sweep(shape: Shape, lanes: int, body: Callable[[Lead, Any, int], None]) -> None:
    """Runs `body(lead, offset, lanes)` for vectors that cover a shape: written out if they are few."""
    T = script()
    last = shape[-1] if shape else 1
    leading = shape[:-1]
    parts = pieces(last, lanes)
    if math.prod(leading) * len(parts) <= _UNROLLED:
        for lead in itertools.product(*(range(size) for size in leading)):
            for offset, width in parts:
                body(lead, offset, width)
        return

    def along(lead: Lead) -> None:
        whole = last // lanes
        if len(parts) <= _UNROLLED:
            for offset, width in parts:
                body(lead, offset, width)
            return
        with T.serial(integer(whole)) as block:
            body(lead, block * lanes, lanes)
        for offset, width in parts[whole:]:
            body(lead, offset, width)

    def nest(lead: Lead, rest: Sequence[int]) -> None:
        if not rest:
            along(lead)
        elif rest[0] == 1:
            nest((*lead, 0), rest[1:])
        else:
            with T.serial(integer(rest[0])) as index:
                nest((*lead, index), rest[1:])

    nest((), leading)


def in_registers(shape: Shape) -> Stored:
    """Room for a value: registers if all its uses are at constant places, else the stack."""
    return Stored(shape, local(max(1, math.prod(shape))))


def horizontal(vectors: list[tuple[Any, int]]) -> Any:
    """The sum of all numbers of accumulators (buffer, lanes), as a scalar expression."""
    T = script()
    total: Any = None
    by_lanes: dict[int, list[Any]] = {}
    for buffer, lanes in vectors:
        by_lanes.setdefault(lanes, []).append(buffer)
    for lanes, buffers in sorted(by_lanes.items(), reverse=True):
        wide = load(buffers[0], 0, lanes)
        for buffer in buffers[1:]:
            wide = wide + load(buffer, 0, lanes)
        part = local(lanes)
        save(part, 0, wide, lanes)
        while lanes > 1:
            lanes //= 2
            narrow = local(lanes)
            save(narrow, 0, load(part, 0, lanes) + load(part, lanes, lanes), lanes)
            part = narrow
        total = part[0] if total is None else total + part[0]
    return T.float32(0) if total is None else total


def each_lead(shape: Shape) -> Iterator[Lead]:
    yield from itertools.product(*(range(size) for size in shape))
