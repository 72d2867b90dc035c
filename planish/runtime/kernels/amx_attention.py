"""Flash attention with both products in bfloat16 on Intel's matrix unit (AMX); softmax and sums stay float32.

As in `attention_task`, scores are kept transposed, keys by queries: lanes are queries, so that no maximum and no sum
runs across lanes. K in rows is then the left operand of the first product, and the weights, two keys side by side, are
the right operand of the second one, whose left operand is V transposed; both are made once for all queries.
FlashAttention-2: Dao 2023, arXiv:2307.08691; online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from planish.ir.ops.flash_attention import attention, causal
from planish.runtime.kernels.amx import (
    SIDE,
    STEP,
    TILE,
    amx,
    configure,
    exp2,
    interleaved,
    keep,
    load,
    rounded,
    tile_op,
)
from planish.runtime.kernels.attention_task import LOG2E, fixed, transpose
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, const, prim_func, script, size, store
from planish.runtime.kernels.template import ON_STACK, Template

MASKS = ("none", "bool")
#: Queries of a task, and keys for which the softmax is rescaled once.
_QUERIES, _KEYS = 2 * SIDE, 128
#: Where the running maximum starts: a score this low counts as hidden.
_LOWEST = -1e30
#: The least factor of scores: with 0, hidden ones would be NaN.
_LEAST = 1e-30


@dataclass(frozen=True)
class FlashAttention(Template):
    """softmax(scale · q kᵀ) v by heads, with q, k, v and the weights rounded to bfloat16.

    Arguments are those of `attention.FlashAttention`, all float32; a mask is bool. A query that sees no key gives
    zeros.

    Attributes:
        head_size: size of a head of q, k and v.
        causal: query i sees keys 0 … i + offset.
        mask: ``"none"`` or ``"bool"``.
    """

    head_size: int
    causal: bool = False
    mask: str = "none"

    def __post_init__(self) -> None:
        if self.head_size < 1:
            raise ValueError(f"head_size is {self.head_size}; it must be 1 or more")
        if self.mask not in MASKS:
            raise ValueError(f"mask is one of {', '.join(MASKS)}, not '{self.mask}'")

    @property
    def symbol(self) -> str:
        mask = "" if self.mask == "none" else f"_{self.mask}_mask"
        return f"flash_attention_bf16_d{self.head_size}{'_causal' * self.causal}{mask}"

    def cpu(self) -> Cpu:
        return amx("attention")

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        """With q, k and v rounded, and weights that are not."""
        q, k, v, *rest = arguments
        mask = rest.pop(0) if self.mask != "none" else None
        scale = float(rest.pop(0)[0])
        seen = causal(q.shape[1], k.shape[1], int(rest.pop(0)[0]) if self.causal else k.shape[1])
        heads = q.shape[2] // self.head_size, k.shape[2] // self.head_size
        operands = [np.asarray(a.astype(ml_dtypes.bfloat16), np.float32) for a in (q, k, v)]
        return attention(operands, heads, scale, seen if mask is None else seen & mask)

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            batch, length, width, keys, narrow = size(), size(), size(), size(), size()
            q = argument("q", (batch, length, width))
            k, v = (argument(name, (batch, keys, narrow)) for name in "kv")
            mask = argument("mask", [size() for _ in range(4)], "bool") if self.mask != "none" else None
            scale = argument("scale", (1,))
            offset = argument("offset", (1,), "int64") if self.causal else None
            y = argument("y", (batch, length, width))
            at = _Kernel(self.head_size, q, k, v, mask, scale, offset, y)
            at.pack_all()
            blocks = T.Bind((length + _QUERIES - 1) // _QUERIES)
            with T.parallel(batch * at.heads * blocks) as t:
                at.task(fixed(t // blocks // at.heads), fixed(t // blocks % at.heads), fixed(t % blocks * _QUERIES))
        return built[0]


def _stack(*shape: int, dtype: str = "float32") -> Any:
    return script().alloc_buffer(shape, dtype, scope="local", align=64, annotations=ON_STACK)


class _Kernel:
    """Emits the code; sizes of a head are padded to whole tiles."""

    def __init__(self, d: int, q: Any, k: Any, v: Any, mask: Any, scale: Any, offset: Any, y: Any) -> None:
        T = script()
        self.d, self.q, self.k, self.v, self.mask, self.scale, self.offset, self.y = d, q, k, v, mask, scale, offset, y
        self.batch, self.length, width = q.shape
        _, self.keys, narrow = k.shape
        self.heads, self.kv_heads = width // d, narrow // d
        self.steps = -(-d // STEP)  # tiles of K beside each other
        self.chunks = 2 * self.steps  # of sixteen numbers of a head
        self.bands = T.Bind((self.keys + STEP - 1) // STEP)  # of 32 keys
        room = self.batch * self.kv_heads * self.bands * (self.chunks * TILE) + TILE
        self.k_tiles, self.v_tiles = (T.alloc_buffer((room,), "uint16", align=64) for _ in range(2))

    # ---- K and V as tiles ----

    def pack_all(self) -> None:
        """K: tiles of 16 keys by 32 numbers, (batch, head, 16 keys, step); V transposed: (batch, head, chunk, band)."""
        T = script()
        with T.parallel(self.batch * self.kv_heads * self.bands) as t:
            band, head = fixed(t % self.bands), fixed(t // self.bands)
            b, h = fixed(head // self.kv_heads), fixed(head % self.kv_heads)
            with T.serial(STEP) as row:
                start = fixed(((head * self.bands + band) * 2 + row // SIDE) * (self.steps * TILE) + row % SIDE * STEP)
                key = fixed(T.min(band * STEP + row, self.keys - 1))
                for c in range(self.chunks):
                    value = self._numbers(self.k, b, key, h, c)
                    self._put(self.k_tiles, start + c // 2 * TILE + c % 2 * SIDE, rounded(value))
            for c in range(self.chunks):
                with T.serial(2) as half:
                    square = _stack(SIDE, SIDE)
                    with T.unroll(SIDE) as row:
                        key = T.min(band * STEP + half * SIDE + row, self.keys - 1)
                        self._put(square, 0, self._numbers(self.v, b, key, h, c), row)
                    transpose(square, SIDE)
                    start = fixed(((head * self.chunks + c) * self.bands + band) * TILE + half * SIDE)
                    with T.unroll(SIDE) as row:
                        self._put(self.v_tiles, start + row * STEP, rounded(self._line(square, 0, row)))

    def _numbers(self, source: Any, b: Any, row: Any, head: Any, c: int) -> Any:
        """Sixteen numbers of a head from 16 c on; zeros past its end."""
        T = script()
        first = c * SIDE
        if first + SIDE <= self.d:
            return source.vload([b, row, head * self.d + first], f"float32x{SIDE}")
        line = _stack(SIDE)
        for i in range(SIDE):
            store(line, source[b, row, head * self.d + first + i] if first + i < self.d else const(0.0), i)
        return T.Bind(self._line(line, 0))

    def _put(self, buffer: Any, at: Any, value: Any, *before: Any) -> None:
        store(buffer, value, *before, script().Ramp(at, 1, SIDE))

    def _line(self, buffer: Any, at: Any, *before: Any) -> Any:
        """Sixteen float32 numbers of a buffer from `at` on."""
        return buffer.vload([*before, at], f"float32x{SIDE}")

    # ---- a block of queries of one head ----

    def task(self, b: Any, head: Any, first: Any) -> None:
        T = script()
        self.b, self.head, self.first = b, head, first
        self.rows = fixed(T.min(_QUERIES, self.length - first))
        self.kv = fixed(b * self.kv_heads + head // (self.heads // T.max(self.kv_heads, 1)))
        self.q_tiles = _stack(self.steps * 2 * TILE, dtype="uint16")
        self.s, self.p = _stack(_KEYS * _QUERIES), _stack(_KEYS // STEP * 2 * TILE, dtype="uint16")
        self.out = _stack(self.chunks * SIDE, _QUERIES)
        self.top, self.sum = _stack(_QUERIES), _stack(_QUERIES)
        scale = T.Bind(self.scale[0])
        self.factor = _stack(1)
        store(self.factor, T.max(T.abs(scale) * const(LOG2E), const(_LEAST)), 0)
        configure()
        self._start(scale)
        seen = self.keys if self.offset is None else T.min(self.keys, first + self.rows + self.offset[0])
        seen = fixed(T.max(seen, 0))
        with T.serial((seen + _KEYS - 1) // _KEYS) as p:
            key = fixed(p * _KEYS)
            n = fixed(T.min(_KEYS, seen - key))
            bands = fixed((n + STEP - 1) // STEP)
            self._score(key, bands)
            self._hide(key, n, bands)
            self._softmax(bands)
            self._accumulate(key, bands)
        tile_op("tilerelease")
        self._finish()

    def _start(self, scale: Any) -> None:
        """Queries as right operands: a row has two numbers of each query. A scale below 0 is their sign."""
        T, tx = script(), _tx()
        sign = T.Bind(tx.Select(scale < const(0.0), const(-1.0), const(1.0)))
        with T.serial(2) as half:
            for s in range(self.steps):
                square = _stack(SIDE, SIDE)
                with T.unroll(SIDE) as r:
                    row = fixed(T.min(self.first + half * SIDE + r, self.length - 1))
                    pair = [self._numbers(self.q, self.b, row, self.head, 2 * s + i) for i in range(2)]
                    pair = [value * tx.Broadcast(sign, SIDE) for value in pair]
                    self._put(square, 0, tx.reinterpret(f"float32x{SIDE}", _amx_pair(*pair)), r)
                transpose(square, SIDE)
                with T.unroll(SIDE) as r:
                    bits = tx.reinterpret(f"uint16x{STEP}", self._line(square, 0, r))
                    store(self.q_tiles, bits, T.Ramp((s * 2 + half) * TILE + r * STEP, 1, STEP))
        with T.serial(2) as half:
            self._put(self.top, half * SIDE, _all(_LOWEST))
            self._put(self.sum, half * SIDE, _all(0.0))
        with T.serial(self.chunks * SIDE) as r, T.serial(2) as half:
            self._put(self.out, half * SIDE, _all(0.0), r)

    def _score(self, key: Any, bands: Any) -> None:
        """s[key, query] in tiles 0 to 3, K in 4 and 5, q in 6 and 7."""
        T = script()
        with T.serial(bands) as t:
            for tile in range(4):
                tile_op("tilezero", tile)
            base = fixed(((self.kv * self.bands + key // STEP + t) * 2) * (self.steps * TILE))
            for s in range(self.steps):
                for j in range(2):
                    load(6 + j, self.q_tiles[(s * 2 + j) * TILE])
                for i in range(2):
                    load(4 + i, self.k_tiles[base + (i * self.steps + s) * TILE])
                    for j in range(2):
                        tile_op("tdpbf16ps", 2 * i + j, 4 + i, 6 + j)
            for i in range(2):
                for j in range(2):
                    keep(2 * i + j, self.s[(t * STEP + i * SIDE) * _QUERIES + j * SIDE], 4 * _QUERIES)

    def _hide(self, key: Any, n: Any, bands: Any) -> None:
        """Scores of keys that are not seen become -inf."""
        T, tx = script(), _tx()
        hidden = const(float("-inf"))

        def change(rows: Any, start: Any, sees: Callable[[Any, Any], Any] | None) -> None:
            with T.serial(rows) as r, T.serial(2) as half:
                place = fixed((start + r) * _QUERIES + half * SIDE)
                with T.vectorized(SIDE) as j:
                    value = hidden if sees is None else tx.Select(sees(r, half * SIDE + j), self.s[place + j], hidden)
                    store(self.s, value, place + j)

        # A tile reaches past the last key.
        change(bands * STEP - n, n, None)
        if self.mask is not None:
            self._apply_mask(key, n, change)
        if self.offset is not None:
            start = fixed(T.max(self.first + self.offset[0] - key + 1, 0))  # keys that all queries see
            limit = fixed(key + start - self.first - self.offset[0])

            with T.If(start < n), T.Then():
                change(n - start, start, lambda r, query: T.Cast("int32", query) >= T.Cast("int32", r + limit))

    def _apply_mask(self, key: Any, n: Any, change: Any) -> None:
        T, tx = script(), _tx()
        mask = self.mask
        batch, head, column = (fixed(tx.Select(mask.shape[i] == 1, T.int64(0), T.int64(1))) for i in (0, 1, 3))

        def at(r: Any, query: Any) -> Any:
            return mask[self.b * batch, self.head * head, query, (key + r) * column]

        # The same for all queries, as padding is: nothing is done where a key is seen.
        with T.If(mask.shape[2] == 1):
            with T.Then(), T.serial(n) as r, T.If(T.Not(at(r, 0))), T.Then():
                change(1, r, None)
            with T.Else():
                change(n, 0, lambda r, query: at(r, T.min(self.first + query, self.length - 1)))

    def _softmax(self, bands: Any) -> None:
        """Scores become weights in bfloat16, two keys side by side; what was summed before is scaled."""
        T, tx = script(), _tx()
        with T.serial(2) as half:
            at = fixed(half * SIDE)
            best, old, total, factor, shift = (_stack(SIDE) for _ in range(5))
            self._put(factor, 0, tx.Broadcast(self.factor[0], SIDE))
            self._put(old, 0, self._line(self.top, at))
            self._put(best, 0, self._line(old, 0))
            with T.serial(bands * (STEP // 4)) as r:
                four = [self._line(self.s, (r * 4 + i) * _QUERIES + at) for i in range(4)]
                pairs = [T.max(four[0], four[1]), T.max(four[2], four[3])]
                self._put(best, 0, T.max(self._line(best, 0), T.max(*pairs)))
            self._put(self.top, at, self._line(best, 0))
            self._put(shift, 0, self._line(best, 0) * self._line(factor, 0))
            ratio = _stack(SIDE)
            # A difference first: with a fused product, that of two equal numbers as large as these would not be 0.
            self._put(ratio, 0, exp2((self._line(old, 0) - self._line(best, 0)) * self._line(factor, 0)))
            self._put(total, 0, self._line(self.sum, at) * self._line(ratio, 0))
            with T.serial(self.chunks * SIDE) as r:
                self._put(self.out, at, self._line(self.out, at, r) * self._line(ratio, 0), r)
            with T.serial(bands) as t, T.serial(SIDE) as r:
                two = []
                for i in range(2):
                    line = self._line(self.s, (t * STEP + r * 2 + i) * _QUERIES + at)
                    two.append(T.Bind(exp2(line * self._line(factor, 0) - self._line(shift, 0))))
                self._put(total, 0, self._line(total, 0) + (two[0] + two[1]))
                place = T.Ramp((t * 2 + half) * TILE + r * STEP, 1, STEP)
                store(self.p, interleaved(*two), place)
            self._put(self.sum, at, self._line(total, 0))

    def _accumulate(self, key: Any, bands: Any) -> None:
        """out[number, query] += Vᵀ p."""
        T = script()
        with T.serial(self.steps) as c:
            corners = [self.out[(c * 2 + i) * SIDE, j * SIDE] for i in range(2) for j in range(2)]
            for tile, corner in enumerate(corners):
                load(tile, corner, 4 * _QUERIES)
            with T.serial(bands) as t:
                for j in range(2):
                    load(6 + j, self.p[(t * 2 + j) * TILE])
                for i in range(2):
                    base = ((self.kv * self.chunks + c * 2 + i) * self.bands + key // STEP + t) * TILE
                    load(4 + i, self.v_tiles[base])
                    for j in range(2):
                        tile_op("tdpbf16ps", 2 * i + j, 4 + i, 6 + j)
            for tile, corner in enumerate(corners):
                keep(tile, corner, 4 * _QUERIES)

    def _finish(self) -> None:
        """out / sum, transposed back; queries that saw no key are 0."""
        T, tx = script(), _tx()
        with T.serial(2) as half:
            at = fixed(half * SIDE)
            inverse = _stack(SIDE)
            with T.vectorized(SIDE) as j:
                total = self.sum[at + j]
                store(inverse, tx.Select(total == const(0.0), const(0.0), const(1.0) / total), j)
            for c in range(-(-self.d // SIDE)):
                square = _stack(SIDE, SIDE)
                with T.unroll(SIDE) as r:
                    self._put(square, 0, self._line(self.out, at, c * SIDE + r) * self._line(inverse, 0), r)
                transpose(square, SIDE)
                with T.serial(T.min(T.max(self.rows - at, 0), SIDE)) as r:
                    row, column = self.first + at + r, self.head * self.d + c * SIDE
                    if (c + 1) * SIDE <= self.d:
                        store(self.y, self._line(square, 0, r), self.b, row, T.Ramp(column, 1, SIDE))
                    else:
                        for i in range(self.d - c * SIDE):
                            store(self.y, square[r, i], self.b, row, column + i)


def _all(value: float) -> Any:
    return _tx().Broadcast(const(value), SIDE)


def _amx_pair(low: Any, high: Any) -> Any:
    from planish.runtime.kernels.amx import rounded_pair

    return rounded_pair(low, high)


def _tx() -> Any:
    from tvm import tirx

    return tirx
