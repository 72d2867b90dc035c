"""Segment GEMM: rows in segments, each with a weight of its own, with gather and scatter of rows in the same kernel.

The GEMM template of Hector (Wu, Hidayetoğlu et al. 2023, arXiv:2301.06284): one kernel over all segments, no copy of
gathered rows and no weight per row in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from planish.ir.errors import InputError
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, const, each_lane, local, prim_func, script, size, store
from planish.runtime.kernels.template import Template

#: Rows that are multiplied at once: with four vectors each they fill the 32 registers of AVX-512 and NEON.
_ROWS = 6
#: Rows of a tile of the list: enough that a panel of weights is read from the first-level cache most of the time.
TILE_ROWS = 96


def panel(cpu: Cpu) -> int:
    """Columns of a panel of packed weights on a processor."""
    return (4 if cpu.registers >= 32 else 2) * cpu.lanes


def tile_list(segment_ptr: np.ndarray, rows: int = TILE_ROWS) -> np.ndarray:
    """What the kernel's parallel loop runs over: (segment, begin, end) of at most `rows` rows each, int64, (tiles, 3).

    Tiles of a segment are of nearly equal size, whole register tiles but for its last one, so equal shares of the list
    are nearly equal work however unequal the segments are.

    Args:
        segment_ptr: (segments + 1,), ascending from 0: rows of segment t are ``segment_ptr[t]:segment_ptr[t + 1]``.
        rows: limit.

    Raises:
        InputError: `segment_ptr` does not ascend from 0, or the limit is below 1.
    """
    pointers = np.asarray(segment_ptr, np.int64)
    if pointers.ndim != 1 or not len(pointers) or pointers[0] != 0 or (np.diff(pointers) < 0).any():
        raise InputError("segment_ptr must be a vector that ascends from 0.")
    if rows < 1:
        raise InputError(f"a tile of {rows} rows: give at least 1.")
    counts = np.diff(pointers)
    if rows >= _ROWS:
        rows = rows // _ROWS * _ROWS
    pieces = -(-counts // rows)
    share = -(-counts // np.maximum(pieces, 1))
    if rows >= _ROWS:
        share = -(-share // _ROWS) * _ROWS
    pieces = -(-counts // np.maximum(share, 1))
    segment = np.repeat(np.arange(len(counts)), pieces)
    piece = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = pointers[segment] + piece * share[segment]
    return np.stack([segment, begin, np.minimum(begin + share[segment], pointers[segment + 1])], 1).astype(np.int64)


def pack(weight: np.ndarray, width: int) -> np.ndarray:
    """Weights (T, K, N) as panels (T, ceil(N / width), K, width), the last one filled up with zeros."""
    types, depth, columns = weight.shape
    panels = -(-columns // width)
    padded = np.zeros((types, depth, panels * width), weight.dtype)
    padded[:, :, :columns] = weight
    return np.ascontiguousarray(padded.reshape(types, depth, panels, width).transpose(0, 2, 1, 3))


@dataclass(frozen=True)
class SegmentGemm(Template):
    """``y[s(i)] = c_i x[g(i)] W[t(i)]`` for rows i in segments t; float32 with int64 indices, compact. Arguments:

    - ``x`` (sources, K);
    - ``weight`` (T, K, N), or (T, panels, K, `panel`) as `pack` gives it, if `packed`;
    - ``tiles`` (tiles, 3) as `tile_list` gives it;
    - ``gather`` (rows,): g, if `gather`, else g(i) = i;
    - ``scatter`` (rows,): s, if `scatter` is not ``"none"``, else s(i) = i;
    - ``scale`` (rows,): c, if `scale`, else c_i = 1;
    - ``y`` (targets, N), out; with `scatter`, what no row goes to keeps what is there.

    Indices must be valid: nothing checks them here. With ``"store"`` no two rows may have the same target. With
    ``"add"`` they may: rows are added to what is in y in the order of the list, so the result is the same in every run;
    there are no atomic operations, and what runs in parallel are panels of columns instead of tiles. A graph with many
    rows for each target and few columns is better served by ``"none"`` and the traversal kernel after it.

    Attributes:
        gather: rows of x come through an index.
        scatter: rows of y: ``"none"``, ``"store"`` or ``"add"``.
        scale: a factor for each row.
        packed: weights are in panels, which spares strides of N when N is large.
    """

    gather: bool = False
    scatter: Literal["none", "store", "add"] = "none"
    scale: bool = False
    packed: bool = False

    @property
    def symbol(self) -> str:
        scatter = {"none": "", "store": "_scatter", "add": "_scatter_add"}[self.scatter]
        return f"segment_gemm_f32{'_packed' * self.packed}{'_gather' * self.gather}{scatter}{'_scale' * self.scale}"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            depth, columns, rows = size(), size(), size()
            x = argument("x", (size(), depth))
            types, panels = size(), size()
            weight = argument("weight", (types, panels, depth, panel(cpu)) if self.packed else (types, depth, columns))
            tiles = argument("tiles", (size(), 3), "int64")
            gather = argument("gather", (rows,), "int64") if self.gather else None
            scatter = argument("scatter", (rows,), "int64") if self.scatter != "none" else None
            scale = argument("scale", (rows,)) if self.scale else None
            y = argument("y", (size(), columns))
            kernel = _Kernel(cpu, self, x, weight, tiles, gather, scatter, scale, y)
            count, whole = tiles.shape[0], (columns + panel(cpu) - 1) // panel(cpu)
            if self.scatter == "add":
                with T.parallel(whole) as p, T.serial(count) as t:
                    kernel.tile(t, p)
            else:
                with T.parallel(count) as t, T.serial(whole) as p:
                    kernel.tile(t, p)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        """Takes y as it is before the call as the last argument."""
        x, weight, tiles, *rest, before = arguments
        columns = before.shape[1]
        if self.packed:
            types, panels, depth, width = weight.shape
            weight = weight.transpose(0, 2, 1, 3).reshape(types, depth, panels * width)[:, :, :columns]
        gather = rest.pop(0) if self.gather else None
        scatter = rest.pop(0) if self.scatter != "none" else None
        y = np.asarray(before, np.float64).copy()
        for segment, begin, end in tiles:
            rows = np.arange(begin, end)
            product = np.asarray(x[rows if gather is None else gather[rows]], np.float64) @ weight[segment]
            if self.scale:
                product *= np.asarray(rest[0][rows], np.float64)[:, None]
            to = rows if scatter is None else scatter[rows]
            if self.scatter == "add":
                np.add.at(y, to, product)
            else:
                y[to] = product
        return y


@dataclass(frozen=True)
class _Kernel:
    """Emits the code of one tile."""

    cpu: Cpu
    template: SegmentGemm
    x: Any
    weight: Any
    tiles: Any
    gather: Any
    scatter: Any
    scale: Any
    y: Any

    def tile(self, t: Any, p: Any) -> None:
        """Rows of tile `t` and columns of panel `p`."""
        T, lanes, width = script(), self.cpu.lanes, panel(self.cpu)
        segment, begin, end = (T.bind(self.tiles[t, i]) for i in range(3))
        first = T.bind(p * width)
        left = T.bind(T.min(self.y.shape[1] - first, T.int64(width)))
        vectors = width // lanes
        with T.If(left == width):
            with T.Then():
                self._rows(segment, begin, end, p, first, vectors, lanes, None)
            with T.Else():
                if self.template.packed:
                    self._rows(segment, begin, end, p, first, vectors, lanes, left)
                else:
                    with T.serial(left // lanes) as v:
                        self._rows(segment, begin, end, p, first + v * lanes, 1, lanes, None)
                    with T.serial(left % lanes) as c:
                        self._rows(segment, begin, end, p, first + left // lanes * lanes + c, 1, 1, None)

    def _rows(
        self, segment: Any, begin: Any, end: Any, p: Any, first: Any, vectors: int, lanes: int, left: Any
    ) -> None:
        """All rows of a tile, some at once; what is left after them in blocks of powers of two."""
        T = script()
        count = T.bind(end - begin)
        with T.serial(count // _ROWS) as block:
            self._multiply(segment, begin + block * _ROWS, _ROWS, p, first, vectors, lanes, left)
        done, rest = T.bind(begin + count // _ROWS * _ROWS), T.bind(count % _ROWS)
        for rows in (4, 2, 1):
            with T.If((rest // rows) % 2 == 1), T.Then():
                self._multiply(segment, done + rest // (2 * rows) * (2 * rows), rows, p, first, vectors, lanes, left)

    def _multiply(
        self, segment: Any, row: Any, rows: int, p: Any, first: Any, vectors: int, lanes: int, left: Any
    ) -> None:
        T = script()
        sums = [[local(lanes) for _ in range(vectors)] for _ in range(rows)]
        for buffer in (vector for line in sums for vector in line):
            each_lane(lanes, partial(store, buffer, const(0.0)))
        source = [T.bind(row + i if self.gather is None else self.gather[row + i]) for i in range(rows)]
        with T.serial(self.x.shape[1]) as k:
            for i in range(rows):
                for v in range(vectors):

                    def add(j: Any, buffer: Any = sums[i][v], i: int = i, v: int = v) -> None:
                        column = v * lanes + j
                        packed = self.template.packed
                        at = (segment, p, k, column) if packed else (segment, k, first + column)
                        store(buffer, buffer[j] + self.x[source[i], k] * self.weight[at], j)

                    each_lane(lanes, add)
        if left is None:
            self._write(sums, row, first, lanes)
        else:
            self._write_part(sums, row, first, lanes, left)

    def _value(self, value: Any, row: Any, to: Any, column: Any) -> Any:
        if self.scale is not None:
            value = value * self.scale[row]
        return value + self.y[to, column] if self.template.scatter == "add" else value

    def _target(self, row: Any) -> Any:
        return script().bind(row if self.scatter is None else self.scatter[row])

    def _write(self, sums: list[list[Any]], row: Any, first: Any, lanes: int) -> None:
        # Row after row: with "add" two rows may have the same target.
        for i, line in enumerate(sums):
            to = self._target(row + i)
            for v, buffer in enumerate(line):

                def write(j: Any, buffer: Any = buffer, i: int = i, v: int = v, to: Any = to) -> None:
                    column = first + v * lanes + j
                    store(self.y, self._value(buffer[j], row + i, to, column), to, column)

                each_lane(lanes, write)

    def _write_part(self, sums: list[list[Any]], row: Any, first: Any, lanes: int, left: Any) -> None:
        """The last panel: zeros that filled it up are not for y."""
        T = script()
        line_of = local(len(sums[0]) * lanes)
        for i, line in enumerate(sums):
            to = self._target(row + i)
            for v, buffer in enumerate(line):

                def copy(j: Any, buffer: Any = buffer, v: int = v) -> None:
                    store(line_of, buffer[j], v * lanes + j)

                each_lane(lanes, copy)
            with T.serial(left) as c:
                store(self.y, self._value(line_of[c], row + i, to, first + c), to, first + c)
