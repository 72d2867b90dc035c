"""Products of tiles: rows of a tile times a matrix, and sums of outer products, with accumulators in registers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import local, script
from planish.runtime.relational.values import integer, load, number, opaque, pieces, save, spread


@dataclass(frozen=True)
class Matrix:
    """Rows in a buffer: element (r, c) is at ``base + r stride + c``."""

    buffer: Any
    base: Any
    stride: int

    def at(self, row: Any, column: Any) -> Any:
        return self.base + row * self.stride + column

    def from_column(self, column: int) -> Matrix:
        return Matrix(self.buffer, self.base + column, self.stride)


def panel(cpu: Cpu) -> int:
    """Vectors of columns that are computed at once; with `rows_at_once` rows they fill the registers."""
    return 4 if cpu.registers >= 32 else 2


def rows_at_once(_: Cpu) -> int:
    return 6


def multiply(cpu: Cpu, count: Any, x: Matrix, w: Matrix, y: Matrix, depth: int, columns: int) -> None:
    """``y = x w`` for `count` rows; w is (depth, columns)."""
    T = script()
    for first, parts in _panels(cpu, columns):
        if isinstance(first, tuple):
            begin, number_of, width = first
            with T.serial(integer(number_of)) as p:
                offset = opaque(p * width + begin)
                _row_blocks(cpu, count, x, w, y, depth, offset, parts)
        else:
            _row_blocks(cpu, count, x, w, y, depth, first, parts)


def _panels(cpu: Cpu, columns: int) -> list[tuple[Any, list[tuple[int, int]]]]:
    """(first column, or (first, how many, width) of equal ones; vectors within the panel)."""
    width = panel(cpu) * cpu.lanes
    whole = columns // width
    parts = [(i * cpu.lanes, cpu.lanes) for i in range(panel(cpu))]
    result: list[tuple[Any, list[tuple[int, int]]]] = []
    if whole > 1:
        result.append(((0, whole, width), parts))
    elif whole == 1:
        result.append((0, parts))
    rest = pieces(columns - whole * width, cpu.lanes)
    at = whole * width
    while rest:
        some, rest = rest[: panel(cpu)], rest[panel(cpu) :]
        result.append((at, some))
        if rest:
            at += rest[0][0]
            rest = [(offset - rest[0][0], lanes) for offset, lanes in rest]
    return result


def _row_blocks(
    cpu: Cpu, count: Any, x: Matrix, w: Matrix, y: Matrix, depth: int, first: Any, parts: list[tuple[int, int]]
) -> None:
    T = script()
    most = rows_at_once(cpu)
    with T.serial(count // most) as block:
        _block(opaque(block * most), most, x, w, y, depth, first, parts)
    done, rest = opaque(count // most * most), opaque(count % most)
    rows = 1 << (most - 1).bit_length() - 1
    while rows:
        with T.If(rest // rows % 2 == 1), T.Then():
            _block(opaque(done + rest // (2 * rows) * (2 * rows)), rows, x, w, y, depth, first, parts)
        rows //= 2


def _block(
    row: Any, rows: int, x: Matrix, w: Matrix, y: Matrix, depth: int, first: Any, parts: list[tuple[int, int]]
) -> None:
    T = script()
    sums = [[(local(n), at, n) for at, n in parts] for _ in range(rows)]
    for buffer, _, n in itertools.chain(*sums):
        save(buffer, 0, number(0, n), n)
    starts = [opaque(x.at(row + i, 0)) for i in range(rows)]
    begin = opaque(w.base + first)
    with T.serial(integer(depth)) as k:
        line = [T.bind(load(w.buffer, begin + k * w.stride + at, n)) for at, n in parts]
        for i in range(rows):
            factor = x.buffer[starts[i] + k]
            for (buffer, _, n), weight in zip(sums[i], line, strict=True):
                save(buffer, 0, load(buffer, 0, n) + spread(factor, n) * weight, n)
    for i, vectors in enumerate(sums):
        to = opaque(y.at(row + i, 0) + first)
        for buffer, at, n in vectors:
            save(y.buffer, to + at, load(buffer, 0, n), n)


def outer(cpu: Cpu, count: Any, x: Matrix, y: Matrix, w: Matrix, depth: int, columns: int) -> None:
    """``w += x' y`` over `count` rows; w is (depth, columns)."""
    T = script()
    most = rows_at_once(cpu)
    for first, parts in _panels(cpu, columns):
        if isinstance(first, tuple):
            begin, number_of, width = first
            with T.serial(integer(number_of)) as p:
                _outer_blocks(count, x, y, w, depth, opaque(p * width + begin), parts, most)
        else:
            _outer_blocks(count, x, y, w, depth, first, parts, most)


def _outer_blocks(
    count: Any, x: Matrix, y: Matrix, w: Matrix, depth: int, first: Any, parts: list[tuple[int, int]], most: int
) -> None:
    T = script()
    whole = depth // most
    if whole:
        with T.serial(integer(whole)) as block:
            _outer_block(count, opaque(block * most), most, x, y, w, first, parts)
    at = whole * most
    for rows in (4, 2, 1):
        if (depth - at) // rows:
            _outer_block(count, integer(at), rows, x, y, w, first, parts)
            at += rows


def _outer_block(
    count: Any, row: Any, rows: int, x: Matrix, y: Matrix, w: Matrix, first: Any, parts: list[tuple[int, int]]
) -> None:
    T = script()
    sums = [[(local(n), at, n) for at, n in parts] for _ in range(rows)]
    places = [opaque(w.at(row + i, 0) + first) for i in range(rows)]
    for place, vectors in zip(places, sums, strict=True):
        for buffer, at, n in vectors:
            save(buffer, 0, load(w.buffer, place + at, n), n)
    left, right = opaque(x.at(0, 0) + row), opaque(y.at(0, 0) + first)
    with T.serial(count) as r:
        line = [T.bind(load(y.buffer, right + r * y.stride + at, n)) for at, n in parts]
        for i in range(rows):
            factor = x.buffer[left + r * x.stride + i]
            for (buffer, _, n), value in zip(sums[i], line, strict=True):
                save(buffer, 0, load(buffer, 0, n) + spread(factor, n) * value, n)
    for place, vectors in zip(places, sums, strict=True):
        for buffer, at, n in vectors:
            save(w.buffer, place + at, load(buffer, 0, n), n)


def parts_of(x_shape: tuple[int, ...], heads: int) -> list[tuple[int, int]]:
    """(which row of features, which head) of the matrices of one row: leading axes, heads last."""
    leading = math.prod(x_shape[:-1])
    return [(i, i % heads if heads else 0) for i in range(leading)]
