"""One step of decoding over a cache in 8 bits or float16, for CPUs; see :mod:`planish.ir.ops.cache_attention`.

Codes become float32 in registers, so that the products are exact in them and memory is read as it is. A task is a
key-value head of a row: all its query heads read each key once. The softmax is online (Milakov & Gimelshein 2018,
arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from planish.ir.ops.cache_attention import append, append_half, step_over
from planish.runtime.kernels.attention_task import LOG2E, LOWEST, exp2, fixed
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import Lanes, argument, const, local, prim_func, script, size, store, sweep
from planish.runtime.kernels.template import Template

#: Keys that the softmax takes at a time.
_KEYS = 128
#: Head sizes are multiples of this.
MULTIPLE = 8
CACHES = {"int8": "i8", "float16": "f16"}
#: The largest number of float16.
_MOST = 65504.0
#: Added to a number between -127 and 127, leaves its nearest integer (even ones win) in the lowest bits.
_ROUND, _ROUND_BITS = 1.5 * 2.0**23, 0x4B400000


@dataclass(frozen=True)
class CacheAttention(Template):
    """Writes a token into a cache and attends over it. Arguments, compact:

    - ``q`` (batch, kv heads, group, head_size), ``k``, ``v`` (batch, kv heads, head_size), float32: the new token;
    - ``keys``, ``values`` (batch, kv heads, capacity, head_size), int8 or float16, and of int8 ``key_scale``,
      ``value_scale`` (batch, kv heads, capacity), float32: the cache, which is changed in place;
    - ``lengths`` (batch,), int32: the tokens that it holds of each row, below the capacity;
    - ``channels`` (kv heads, head_size), float32, of int8: what keys are divided by before they are rounded;
    - ``scale`` (1,), float32, of the scores; ``window`` (1,), int64: how many of the last tokens are seen;
    - ``y`` as q, out.

    Attributes:
        head_size: of a head; a multiple of 8.
        group: query heads of each key-value head.
        cache: ``"int8"`` or ``"float16"``.
    """

    head_size: int
    group: int
    cache: str = "int8"

    def __post_init__(self) -> None:
        if self.head_size < MULTIPLE or self.head_size % MULTIPLE:
            raise ValueError(f"head_size is {self.head_size}; it must be a multiple of {MULTIPLE}")
        if self.group < 1:
            raise ValueError(f"group is {self.group}; it must be 1 or more")
        if self.cache not in CACHES:
            raise ValueError(f"cache is '{self.cache}'; it must be one of {', '.join(CACHES)}")

    @property
    def symbol(self) -> str:
        return f"cache_attention_{CACHES[self.cache]}_d{self.head_size}_g{self.group}"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            batch, heads, capacity = size(), size(), size()
            d, group = self.head_size, self.group
            q = argument("q", (batch, heads, group, d))
            new = [argument(name, (batch, heads, d)) for name in "kv"]
            codes = [argument(name, (batch, heads, capacity, d), self.cache) for name in ("keys", "values")]
            scales, channels = None, None
            if self.cache == "int8":
                scales = [argument(f"{name}_scale", (batch, heads, capacity)) for name in ("key", "value")]
            lengths = argument("lengths", (batch,), "int32")
            if self.cache == "int8":
                channels = argument("channels", (heads, d))
            scale, window = argument("scale", (1,)), argument("window", (1,), "int64")
            y = argument("y", (batch, heads, group, d))
            with T.parallel(batch * heads) as t:
                b, h = fixed(t // heads), fixed(t % heads)
                at = fixed(T.Cast("int64", lengths[b]))
                task = _Task(cpu, self, b, h)
                for i, (x, into) in enumerate(zip(new, codes, strict=True)):
                    if scales is None:
                        task.append_half(x, into, at)
                    else:
                        task.append(x, None if i else channels, into, scales[i], at)
                task.start(q, channels, scale)
                task.attend(codes, scales, T.max(at + 1 - window[0], 0), fixed(at + 1))
                task.finish(y)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> tuple[np.ndarray, ...]:
        """The cache after it (as in float32), and y in float64."""
        q, k, v, keys, values, *rest, scale, window = arguments
        if self.cache == "float16":
            held = append_half((k, v), (keys, values), rest[0])
            ones = np.ones((keys.shape[1], self.head_size))
            y = step_over(q, (*held, ones[:1, :1], ones[:1, :1]), rest[0], ones, float(scale[0]), int(window[0]))
            return (*held, y)
        key_scale, value_scale, lengths, channels = rest
        cache = append((k, v), (keys, values), (key_scale[..., None], value_scale[..., None]), lengths, channels)
        y = step_over(q, cache, lengths, channels, float(scale[0]), int(window[0]))
        return (*cache[:2], *(factor[..., 0] for factor in cache[2:]), y)


class _Task:
    """Emits the work on one key-value head of one row."""

    def __init__(self, cpu: Cpu, kernel: CacheAttention, b: Any, h: Any) -> None:
        self.cpu, self.b, self.h = cpu, b, h
        self.d, self.group = kernel.head_size, kernel.group
        self.lanes = min(cpu.lanes, self.d // MULTIPLE * MULTIPLE)
        if self.d < cpu.lanes:
            self.lanes = MULTIPLE
        #: Where the vectors of a head start; the last one overlaps the one before it if they do not divide it.
        self.starts = [min(i, self.d - self.lanes) for i in range(0, self.d, self.lanes)]

        def new(*shape: int) -> Any:
            return script().alloc_buffer(shape, "float32", scope="global")

        vectors = len(self.starts)
        self.row = new(self.d)
        self.q, self.out = (new(self.group, vectors, self.lanes) for _ in range(2))
        self.scores = new(self.group, _KEYS + self.lanes)
        self.max, self.sum, self.factor = (new(self.group) for _ in range(3))

    def append(self, x: Any, channels: Any, codes: Any, scales: Any, at: Any) -> None:
        """Rounds a token's keys or values."""
        b, h = self.b, self.h
        read = partial(_divided, x, channels, (b, h), h)
        round_row(self.cpu, self.row, read, (codes, b, h, at), (scales, b, h, at))

    def append_half(self, x: Any, cache: Any, at: Any) -> None:
        """Rounds a token's keys or values to float16; what is larger than its largest number becomes that."""
        T, b, h = script(), self.b, self.h

        def write(column: Any, update: Any) -> None:
            value = T.max(const(-_MOST), T.min(const(_MOST), x[b, h, column]))  # in this order NaN stays
            lanes = str(value.ty.dtype).removeprefix("float32")
            store(cache, T.Cast(f"float16{lanes}", value), b, h, at, column)

        sweep(self.cpu, T.int64(self.d), 1, write)

    def start(self, q: Any, channels: Any, scale: Any) -> None:
        """Queries, times all that scores are multiplied with; a vector that overlaps counts nothing twice."""
        from tvm import tirx

        T, b, h = script(), self.b, self.h
        factor = local()
        store(factor, scale[0] * const(LOG2E), 0)
        with T.serial(self.group) as g:
            for c, first in enumerate(self.starts):
                seen = c * self.lanes - first
                with T.vectorized(self.lanes) as j:
                    value = q[b, h, g, first + j] * factor[0]
                    value = value if channels is None else value * channels[h, first + j]
                    store(self.q, value if not seen else tirx.Select(j >= seen, value, const(0.0)), g, c, j)
                    store(self.out, const(0.0), g, c, j)
            store(self.max, const(LOWEST), g)
            store(self.sum, const(0.0), g)

    def attend(self, codes: Any, scales: Any, first: Any, total: Any) -> None:
        T = script()
        begin = fixed(first)
        with T.serial((total - begin + _KEYS - 1) // _KEYS) as p:
            at = fixed(begin + p * _KEYS)
            count = fixed(T.min(_KEYS, total - at))
            for g, queries in self._split(self.group, 4):
                self._score(codes[0], at, count, total, g, queries)
            with T.serial(self.group) as g:
                self._softmax(scales, at, count, g)
            # Accumulators: half of the registers.
            for g, queries in self._split(self.group, 4):
                for c, columns in self._split(len(self.starts), self.cpu.registers // 2 // queries):
                    self._accumulate(codes[1], at, count, (g, queries), (c, columns))

    @staticmethod
    def _split(count: int, most: int) -> Iterator[tuple[int, int]]:
        """(first, size) of parts whose sizes are powers of two."""
        first = 0
        while first < count:
            part = 1 << (min(most, count - first).bit_length() - 1)
            yield first, part
            first += part

    def _score(self, keys: Any, at: Any, count: Any, total: Any, g: int, queries: int) -> None:
        """scores[query, key]: as many sums at a time as a vector has lanes."""
        T, lanes = script(), self.lanes
        rows = lanes // queries
        with T.serial((count + rows - 1) // rows) as t:
            # Past the last key comes that key again.
            place = [fixed(T.min(at + t * rows + r, total - 1)) for r in range(rows)]
            sums = [local(lanes) for _ in range(lanes)]
            for each in sums:
                with T.vectorized(lanes) as j:
                    store(each, const(0.0), j)
            with T.serial(len(self.starts)) as c:
                start = fixed(T.min(c * lanes, self.d - lanes))
                for r in range(rows):
                    key = local(lanes)
                    with T.vectorized(lanes) as j:
                        store(key, T.Cast("float32", keys[self.b, self.h, place[r], start + j]), j)
                    for i in range(queries):
                        each = sums[i * rows + r]
                        with T.vectorized(lanes) as j:
                            store(each, each[j] + key[j] * self.q[g + i, c, j], j)
            found = _totals(sums, lanes)
            for i in range(queries):
                with T.vectorized(rows) as j:
                    store(self.scores, found[i * rows + j], g + i, t * rows + j)

    def _softmax(self, scales: Any, at: Any, count: Any, g: Any) -> None:
        """Scores become weights, relative to the new maximum, times the scales of the values."""
        T, b, h = script(), self.b, self.h
        tops, top = Lanes(self.cpu, 2, LOWEST), local()

        def scale(column: Any, update: Any) -> None:
            if scales is not None:
                store(self.scores, self.scores[g, column] * scales[0][b, h, at + column], g, column)
            update(tops, lambda t: T.max(t, self.scores[g, column]))

        sweep(self.cpu, count, 2, scale)
        tops.reduce(T.max, top)
        store(top, T.max(top[0], self.max[g]), 0)
        store(self.factor, exp2(self.max[g] - top[0]), g)
        store(self.max, top[0], g)
        totals, total = Lanes(self.cpu, 2), local()

        def weigh(column: Any, update: Any) -> None:
            store(self.scores, exp2(self.scores[g, column] - top[0]), g, column)
            update(totals, lambda t: t + self.scores[g, column])
            if scales is not None:
                store(self.scores, self.scores[g, column] * scales[1][b, h, at + column], g, column)

        sweep(self.cpu, count, 2, weigh)
        totals.reduce(lambda x, y: x + y, total)
        store(self.sum, self.sum[g] * self.factor[g] + total[0], g)

    def _accumulate(self, values: Any, at: Any, count: Any, part: tuple[int, int], columns: tuple[int, int]) -> None:
        """out = out · factor + weights · values."""
        T, lanes = script(), self.lanes
        (g, queries), (c, width) = part, columns
        sums = {(i, x): local(lanes) for i in range(queries) for x in range(width)}
        for (i, x), each in sums.items():
            with T.vectorized(lanes) as j:
                store(each, self.out[g + i, c + x, j] * self.factor[g + i], j)
        with T.serial(count) as r:
            for x in range(width):
                value = local(lanes)
                with T.vectorized(lanes) as j:
                    store(value, T.Cast("float32", values[self.b, self.h, at + r, self.starts[c + x] + j]), j)
                for i in range(queries):
                    each = sums[i, x]
                    with T.vectorized(lanes) as j:
                        store(each, each[j] + self.scores[g + i, r] * value[j], j)
        for (i, x), each in sums.items():
            with T.vectorized(lanes) as j:
                store(self.out, each[j], g + i, c + x, j)

    def finish(self, y: Any) -> None:
        T = script()
        with T.serial(self.group) as g:
            factor = local()
            store(factor, const(1.0) / self.sum[g], 0)
            for c, first in enumerate(self.starts):
                with T.vectorized(self.lanes) as j:
                    store(y, self.out[g, c, j] * factor[0], self.b, self.h, g, first + j)


def _divided(x: Any, channels: Any, place: tuple[Any, ...], h: Any, column: Any) -> Any:
    value = x[(*place, column)]
    return value if channels is None else value / channels[h, column]


def round_row(cpu: Cpu, row: Any, read: Callable[[Any], Any], codes: tuple[Any, ...], scale: tuple[Any, ...]) -> None:
    """Emits the rounding of a row to 127 steps of its largest number.

    Args:
        row: buffer for it, of its length.
        read: column → number.
        codes, scale: buffer, and where in it a row of codes, or the scale, goes.
    """
    from tvm import tirx

    T, width = script(), script().int64(int(row.shape[0]))
    largest, top, steps = Lanes(cpu, 1), local(), local()

    def keep(column: Any, update: Any) -> None:
        store(row, read(column), column)
        update(largest, lambda t: T.max(t, tirx.abs(row[column])))

    sweep(cpu, width, 1, keep)
    largest.reduce(T.max, top)
    store(scale[0], top[0] * const(1 / 127), *scale[1:])
    store(steps, const(127.0) / T.max(top[0], const(1e-30)), 0)

    def write(column: Any, update: Any) -> None:
        shifted = row[column] * steps[0] + const(_ROUND)
        lanes = str(shifted.ty.dtype).removeprefix("float32")
        bits = tirx.reinterpret(f"int32{lanes}", shifted) - tirx.const(_ROUND_BITS, f"int32{lanes}")
        store(codes[0], T.Cast(f"int8{lanes}", bits), *codes[1:], column)

    sweep(cpu, width, 1, write)


def _totals(vectors: list[Any], lanes: int) -> Any:
    """A vector of the sums of so many vectors: halves of two of them are added, then quarters …"""
    from tvm import tirx

    T = script()
    line = T.Ramp(0, 1, lanes)
    distance = lanes // 2
    while distance:
        halved = []
        orders = [
            [(lane & ~distance) + side * distance + (lanes if lane & distance else 0) for lane in range(lanes)]
            for side in (0, 1)
        ]
        for x, y in zip(vectors[:distance], vectors[distance : 2 * distance], strict=True):
            pair = [x[line], y[line]]
            parts = [tirx.Shuffle(pair, [tirx.const(i, "int32") for i in order]) for order in orders]
            made = local(lanes)
            store(made, parts[0] + parts[1], line)
            halved.append(made)
        vectors, distance = halved, distance // 2
    return vectors[0]
