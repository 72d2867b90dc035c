"""The inside of flash attention for CPUs: a block of queries of one head against blocks of keys, float32.

The loops are those of FlashAttention-2 (Dao 2023, arXiv:2307.08691) with an online softmax (Milakov & Gimelshein 2018,
arXiv:1805.02867). Scores are kept transposed, keys by queries: lanes are queries, so that no maximum and no sum runs
across lanes, and both products read their left operand by broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import const, local, script, store

LOG2E = 1.4426950408889634
#: Where the running maximum starts: finite, so that a row without keys gives weights of 0 and no NaN.
LOWEST = float(np.finfo(np.float32).min)
#: Added to a small number, leaves its nearest integer in the lowest bits.
_ROUND = 1.5 * 2.0**23
#: 2**r - 1 for |r| <= 1/2, highest power first.
_EXP2 = (1.32647264e-3, 9.671512697e-3, 5.550733746e-2, 0.2402224208, 0.6931469776)


#: (first key, first query, accumulators, their rows and columns): changes a tile of scores.
Mask = Callable[[Any, Any, Any, tuple[int, int]], None]
#: How many of the keys the first so many queries need together.
Needed = Callable[[Any], Any]


def fixed(value: Any) -> Any:
    """An int64 in a variable of its own: TVM would write out what it is bound to wherever it is used, and prove
    things about that, for most of the time that compiling takes."""
    variable = local(1, dtype="int64")
    store(variable, value, 0)
    return variable[0]


def exp2(x: Any) -> Any:
    """2**x for x <= 0 (-inf gives 0, NaN stays), to 1e-7: split as by Cody and Waite (1980), then a minimax polynomial.

    Results below the normal numbers are 0: products with denormal numbers are slow, and no sum would notice them.
    """
    from tvm import tirx

    # Variables: as a tree, an expression would be written out once per use, and (x + c) - c simplified to x.
    names = [tirx.Var(name, "float32") for name in ("x", "shifted", "r")]
    given, shifted, r = names
    p = const(_EXP2[0])
    for c in (*_EXP2[1:], 1.0):
        p = p * r + const(c)
    bits = tirx.reinterpret("int32", p) + (tirx.reinterpret("int32", shifted) << tirx.const(23, "int32"))
    result = tirx.Select(given < const(-126.0), const(0.0), tirx.reinterpret("float32", bits))
    values = (x, given + const(_ROUND), given - (shifted - const(_ROUND)))
    for name, value in reversed(list(zip(names, values, strict=True))):
        result = tirx.Let(name, value, result)
    return result


def log2(x: Any) -> Any:
    """The binary logarithm of a normal number x > 0, to 1e-7: the exponent, and the series of artanh."""
    from tvm import tirx

    bits = tirx.reinterpret("int32", x)
    # Of a mantissa from sqrt(1/2) on.
    exponent = (bits - tirx.const(0x3F3504F3, "int32")) >> tirx.const(23, "int32")
    m = tirx.reinterpret("float32", bits - (exponent << tirx.const(23, "int32")))
    s, square = tirx.Var("s", "float32"), tirx.Var("square", "float32")
    series = const(1 / 9)
    for n in (7, 5, 3, 1):
        series = series * square + const(1 / n)
    result = tirx.Cast("float32", exponent) + s * series * const(2 * LOG2E)
    for name, value in ((square, s * s), (s, (m - const(1.0)) / (m + const(1.0)))):
        result = tirx.Let(name, value, result)
    return result


@dataclass(frozen=True)
class Tiles:
    """Sizes of the register tiles: `groups` splits the vectors of a head, `rows` is the height of a tile in a group."""

    registers: int

    def rows(self, columns: int) -> int:
        """The most rows for tiles of `columns` vectors: accumulators, operands and a broadcast share the registers."""
        fit = max(r for r in range(1, 17) if r * columns + min(r, columns) + 1 < self.registers or r == 1)
        return fit if fit < 8 else fit // 2 * 2

    @property
    def widest(self) -> int:
        """Vectors of queries in a tile of scores."""
        return 4 if self.registers >= 32 else 2

    def groups(self, vectors: int) -> list[int]:
        """How many vectors of a head a tile of the output takes at a time."""
        limit = 6 if self.registers >= 32 else 3
        count = -(-vectors // (limit if vectors <= limit else self.widest))
        return [vectors // count + (i < vectors % count) for i in range(count)]


def tile(
    shape: tuple[int, int, int],
    depth: Any,
    left: Callable[[Any, Any], Any],
    right: Callable[[Any, Any, Any], Any],
    start: Callable[[Any, Any, Any], Any],
) -> Any:
    """Accumulators (rows, columns, lanes): start + Σ_k left(row, k) · right(column, k, lane), all in registers."""
    T = script()
    rows, columns, lanes = shape
    acc = local(*shape)
    with T.unroll(rows) as r, T.unroll(columns) as c, T.vectorized(lanes) as j:
        store(acc, start(r, c, j), r, c, j)
    with T.serial(depth) as k, T.unroll(rows) as r, T.unroll(columns) as c, T.vectorized(lanes) as j:
        store(acc, acc[r, c, j] + left(r, k) * right(c, k, j), r, c, j)
    return acc


def transpose(square: Any, lanes: int) -> None:
    """Swaps rows and columns in registers: blocks off the diagonal change places, half as large in each step."""
    from tvm import tirx

    T = script()
    line = T.Ramp(0, 1, lanes)
    distance = lanes // 2
    while distance:
        first, second = [], []
        for lane in range(lanes):
            upper = bool(lane & distance)
            first.append(lane - distance + lanes if upper else lane)
            second.append(lane + lanes if upper else lane + distance)
        for row in (row for row in range(lanes) if not row & distance):
            pair = [square[row, line], square[row + distance, line]]
            mixed = [local(lanes), local(lanes)]
            for made, order in zip(mixed, (first, second), strict=True):
                store(made, tirx.Shuffle(pair, [tirx.const(i, "int32") for i in order]), line)
            for made, at in zip(mixed, (row, row + distance), strict=True):
                store(square, made[line], at, line)
        distance //= 2


class Task:
    """Emits the work on a block of queries of one head. Buffers of the task live as long as it does."""

    #: Rows that a tile may touch past the end of a buffer; what it computes there is never used.
    slack = 16

    def __init__(self, cpu: Cpu, head_size: int, queries: int, keys: int) -> None:
        self.lanes, self.tiles = cpu.lanes, Tiles(cpu.registers)
        self.head_size, self.queries, self.keys = head_size, queries, keys
        self.width = -(-head_size // self.lanes) * self.lanes

        def new(*shape: int) -> Any:
            return script().alloc_buffer(shape, "float32", scope="global")

        self.q = new(queries // self.lanes, head_size, self.lanes)
        self.k = new(keys + self.slack, head_size)
        self.v = new(keys, self.width)
        self.scores = new((keys + self.slack) * queries + self.slack)
        self.out = new(queries + self.slack, self.width)
        self.max, self.next = new(queries), new(queries)
        self.sum = new(queries)
        self.scale = new(queries + self.slack)

    def start(self, vectors: Any, load: Callable[[Any, Any], Any]) -> None:
        """Packs the queries, lanes innermost; `load(row, d)` may give anything past the last one."""
        T, lanes = script(), self.lanes
        whole = self.head_size // lanes * lanes
        with T.serial(vectors) as c:
            with T.serial(whole // lanes) as block:
                square = local(lanes, lanes)
                with T.unroll(lanes) as r, T.vectorized(lanes) as j:
                    store(square, load(c * lanes + r, block * lanes + j), r, j)
                transpose(square, lanes)
                with T.unroll(lanes) as r, T.vectorized(lanes) as j:
                    store(self.q, square[r, j], c, block * lanes + r, j)
            with T.serial(self.head_size - whole) as d, T.serial(lanes) as j:
                store(self.q, load(c * lanes + j, whole + d), c, whole + d, j)
            for buffer, value in ((self.max, LOWEST), (self.sum, 0.0)):
                with T.vectorized(lanes) as j:
                    store(buffer, const(value), c * lanes + j)
        self._zero(self.out, vectors * lanes + self.slack)
        if self.width > self.head_size:
            self._zero(self.v, self.keys)
        with T.serial(vectors * lanes + self.slack) as r:
            store(self.scale, const(0.0), r)

    def _zero(self, buffer: Any, rows: Any) -> None:
        T, lanes = script(), self.lanes
        with T.serial(rows) as r, T.serial(self.width // lanes) as c, T.vectorized(lanes) as j:
            store(buffer, const(0.0), r, c * lanes + j)

    def gather(self, at: Any, count: Any, k: Callable[[Any, Any], Any], v: Callable[[Any, Any], Any]) -> None:
        """Copies keys and values to rows `at` …: in the graph's layout as many pages of memory are in use as rows."""
        for buffer, load in ((self.k, k), (self.v, v)):
            self._copy(buffer, at, count, load)

    def _copy(self, buffer: Any, at: Any, count: Any, load: Callable[[Any, Any], Any]) -> None:
        T, lanes = script(), self.lanes
        whole = self.head_size // lanes
        with T.serial(count) as r:
            for c in range(whole):
                with T.vectorized(lanes) as j:
                    store(buffer, load(r, c * lanes + j), at + r, c * lanes + j)
            if self.head_size % lanes:
                with T.serial(self.head_size % lanes) as d:
                    store(buffer, load(r, whole * lanes + d), at + r, whole * lanes + d)

    def attend(self, rows: Any, vectors: Any, count: Any, mask: Mask, needed: Needed | None = None) -> None:
        """Takes `count` gathered keys (at least 1) into account; work on keys that are not `needed` is left out."""
        # Past the last key comes that key again, as often as a tile needs: maxima stay what they are.
        self._copy(self.k, count, self.slack, lambda r, d: self.k[count - 1, d])
        exact: Needed = needed or (lambda queries: count)

        def ahead(queries: Any) -> Any:
            # The tile of the output that has the last of these queries reads what its own last query needs.
            return exact(queries + self.slack)

        self._score(vectors, ahead, mask)
        self._softmax(vectors, ahead)
        self._accumulate(rows, exact)

    def _score(self, vectors: Any, needed: Needed, mask: Mask) -> None:
        """scores[key, query], and the maxima so far."""
        T, widest = script(), self.tiles.widest
        # Groups of about equal width.
        groups = fixed((vectors + widest - 1) // widest)
        width = fixed((vectors + groups - 1) // groups)
        with T.serial(groups) as g:
            first = fixed(g * width)
            for columns in range(1, widest + 1):
                with T.If(T.min(width, vectors - first) == columns), T.Then():
                    self._columns(first, columns, needed, mask)

    def _columns(self, first: Any, columns: int, needed: Needed, mask: Mask) -> None:
        T, lanes, rows = script(), self.lanes, self.tiles.rows(columns)
        with T.vectorized(lanes) as j:
            for c in range(columns):
                store(self.next, self.max[(first + c) * lanes + j], (first + c) * lanes + j)
        count = fixed(needed((first + columns) * lanes))
        with T.serial((count + rows - 1) // rows) as t:
            acc = tile(
                (rows, columns, lanes),
                T.int64(self.head_size),
                lambda r, d: self.k[t * rows + r, d],
                lambda c, d, j: self.q[first + c, d, j],
                lambda r, c, j: const(0.0),
            )
            mask(t * rows, first * lanes, acc, (rows, columns))
            with T.unroll(columns) as c:
                top = local(lanes)
                at = (first + c) * lanes
                with T.vectorized(lanes) as j:
                    store(top, self.next[at + j], j)
                with T.unroll(rows) as r, T.vectorized(lanes) as j:
                    store(top, T.max(top[j], acc[r, c, j]), j)
                    store(self.scores, acc[r, c, j], (t * rows + r) * self.queries + at + j)
                with T.vectorized(lanes) as j:
                    store(self.next, top[j], at + j)

    def _softmax(self, vectors: Any, needed: Needed) -> None:
        """Scores become weights, relative to the new maximum; sums and the factor of what was summed before."""
        T, lanes = script(), self.lanes
        with T.serial(vectors) as c:
            total = local(lanes)
            top = local(lanes)
            with T.vectorized(lanes) as j:
                at = c * lanes + j
                store(top, self.next[at], j)
                store(self.scale, exp2(self.max[at] - top[j]), at)
                store(total, self.sum[at] * self.scale[at], j)
                store(self.max, top[j], at)
            with T.serial(fixed(needed((c + 1) * lanes))) as r, T.vectorized(lanes) as j:
                at = r * self.queries + c * lanes + j
                store(self.scores, exp2(self.scores[at] - top[j]), at)
                store(total, total[j] + self.scores[at], j)
            with T.vectorized(lanes) as j:
                store(self.sum, total[j], c * lanes + j)

    def _accumulate(self, rows: Any, needed: Needed) -> None:
        """out = out * scale + weights · V."""
        T = script()
        first = 0
        for columns in self.tiles.groups(self.width // self.lanes):
            height = self.tiles.rows(columns)
            with T.serial(rows // height) as t:
                self._rows(t * height, height, first, columns, needed)
            half = (height + 1) // 2
            rest = rows % height
            with T.If(rest > half), T.Then():
                self._rows(rows - rest, height, first, columns, needed)
            with T.If(T.And(rest > 0, rest <= half)), T.Then():
                self._rows(rows - rest, half, first, columns, needed)
            first += columns

    def _rows(self, row: Any, height: int, first: int, columns: int, needed: Needed) -> None:
        T, lanes = script(), self.lanes
        acc = tile(
            (height, columns, lanes),
            fixed(needed(row + height)),
            lambda r, k: self.scores[k * self.queries + row + r],
            lambda c, k, j: self.v[k, (first + c) * lanes + j],
            lambda r, c, j: self.out[row + r, (first + c) * lanes + j] * self.scale[row + r],
        )
        with T.unroll(height) as r, T.unroll(columns) as c, T.vectorized(lanes) as j:
            store(self.out, acc[r, c, j], row + r, (first + c) * lanes + j)

    def finish(self, rows: Any, write: Callable[[Any, Any, Any], None]) -> None:
        """out / sum, by `write(row, d, value)`; rows that saw no key are 0, as in ONNX's Attention."""
        from tvm import tirx

        T, lanes = script(), self.lanes
        whole = self.head_size // lanes
        with T.serial(rows) as r:
            factor = local(1)
            total = self.sum[r]
            store(factor, tirx.Select(total == const(0.0), const(0.0), const(1.0) / total), 0)
            for c in range(whole):
                with T.vectorized(lanes) as j:
                    write(r, c * lanes + j, self.out[r, c * lanes + j] * factor[0])
            for d in range(whole * lanes, self.head_size):
                write(r, d, self.out[r, d] * factor[0])

    def log_sums(self, rows: Any, write: Callable[[Any, Any], None]) -> None:
        """log Σ exp(score) of each row, by `write(row, value)`; -inf for one that saw no key."""
        from tvm import tirx

        T = script()
        with T.serial(rows) as r:
            total, known = local(1), local(1)
            store(total, self.sum[r], 0)
            store(known, log2(T.max(total[0], const(1e-30))) + self.max[r], 0)
            write(r, tirx.Select(total[0] > const(0.0), known[0] * const(1 / LOG2E), const(float("-inf"))))
