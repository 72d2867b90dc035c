"""Products of tiles in bfloat16 with float32 sums, on the matrix unit of Intel: operands are rounded in the kernel."""

from __future__ import annotations

from typing import Any

from planish.runtime.kernels.amx import (
    SIDE,
    STEP,
    TILE,
    configure,
    interleaved,
    keep,
    load,
    rounded_pair,
    tile_op,
)
from planish.runtime.kernels.loops import script
from planish.runtime.kernels.template import ON_STACK
from planish.runtime.relational.tiles import Matrix
from planish.runtime.relational.values import integer, opaque

#: Tiles of sums: of one band of sixteen rows.
_SUMS = 4


def fits(depth: int, columns: int) -> bool:
    """Whether a product is made here: of whole tiles."""
    return depth % STEP == 0 and columns % SIDE == 0


def stack_rows(rows: int) -> int:
    """Rows that results of a tile of `rows` rows need room for."""
    return -(-rows // SIDE) * SIDE


def multiply(rows: int, count: Any, x: Matrix, w: Matrix, y: Matrix, depth: int, columns: int) -> None:
    """``y = x w`` for `count` of at most `rows` rows; y must have room for whole bands of sixteen rows."""
    T = script()
    steps, across = depth // STEP, columns // SIDE
    left = _stack(stack_rows(rows) * depth)
    right = _stack(depth * columns)
    _round_rows(count, x, left, depth)
    _round_weight(w, right, depth, columns)
    configure()
    with T.serial((count + SIDE - 1) // SIDE) as band:
        first = opaque(band * SIDE)
        for begin in range(0, across, _SUMS):
            some = range(begin, min(across, begin + _SUMS))
            for j in some:
                tile_op("tilezero", j - begin)
            with T.serial(integer(steps)) as s:
                load(_SUMS, left[first * depth + s * STEP], 2 * depth)
                for j in some:
                    load(_SUMS + 1, right[(s * across + j) * TILE])
                    tile_op("tdpbf16ps", j - begin, _SUMS, _SUMS + 1)
            for j in some:
                keep(j - begin, y.buffer[y.at(first, j * SIDE)], 4 * y.stride)
    tile_op("tilerelease")


def _stack(numbers: int) -> Any:
    return script().alloc_buffer((numbers,), "uint16", scope="local", align=64, annotations=ON_STACK)


def _round_rows(count: Any, x: Matrix, left: Any, depth: int) -> None:
    """Rows of x, one after the other. Those that a last band lacks are what is there: their results are not used."""
    import tvm.tirx as tx

    T = script()
    with T.serial(count) as i:
        start, to = opaque(x.at(i, 0)), opaque(i * depth)
        with T.serial(integer(depth // STEP)) as s:
            low, high = (x.buffer.vload([start + s * STEP + at], f"float32x{SIDE}") for at in (0, SIDE))
            T.buffer_store(left, rounded_pair(low, high), [tx.Ramp(to + s * STEP, 1, STEP)])


def _round_weight(w: Matrix, right: Any, depth: int, columns: int) -> None:
    """Tiles with rows in pairs: tile (s, j) at ``(s across + j) TILE``."""
    import tvm.tirx as tx

    T, across = script(), columns // SIDE
    base = opaque(w.base)
    with T.serial(integer(depth // 2)) as pair:
        to = opaque(pair // SIDE * across * TILE + pair % SIDE * STEP)
        for j in range(across):
            at = base + pair * 2 * w.stride + j * SIDE
            low, high = (w.buffer.vload([at + row * w.stride], f"float32x{SIDE}") for row in (0, 1))
            T.buffer_store(right, interleaved(low, high), [tx.Ramp(to + j * TILE, 1, STEP)])
