"""Kernels over rows: norms, softmax and reductions, a warp or a block of threads for each row.

Rows are read once, kept in registers as float32 where their width is known and they fit, and reduced by shuffles.
Dtypes of memory are float32, float16 and bfloat16; sums are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planish.runtime.kernels.loops import prim_func, script, store
from planish.runtime.relax.cuda.emit import argument, each, local, number, size, wide
from planish.runtime.relax.cuda.schedules import WIDEST

WARP = 32
#: Threads of a block, for a row each or for several rows.
_BLOCK = 256
_ROWS = 4
#: Wider rows get a block of threads.
_WARP_WIDTH = 1024
#: Numbers of a row that a thread keeps.
_KEPT = 64
_LOWEST = float("-inf")


@dataclass
class Row:
    """A row in the hands of `group` threads.

    Attributes:
        width: of the row, a number or an expression.
        group: threads.
        vector: neighbours that a thread moves at once.
        lane: the thread's number in the group.
    """

    width: Any
    group: int
    vector: int
    lane: Any
    shared: Any = None

    @property
    def step(self) -> int:
        return self.group * self.vector

    @property
    def chunks(self) -> int | None:
        """How often the group goes over the row, if that is known."""
        return -(-self.width // self.step) if isinstance(self.width, int) else None

    @property
    def kept(self) -> bool:
        return self.chunks is not None and self.chunks * self.vector <= _KEPT

    def each(self, body: Callable[[Any, Any], None]) -> None:
        """Runs `body(first column, slot)` for the vectors of the thread; `slot` is where it keeps one."""
        T = script()
        if self.kept:
            assert self.chunks is not None
            for chunk in range(self.chunks):
                column = chunk * self.step + self.lane * self.vector
                if (chunk + 1) * self.step <= self.width:
                    body(column, chunk * self.vector)
                else:
                    with T.If(column < self.width), T.Then():
                        body(column, chunk * self.vector)
            return
        with T.serial((self.width + self.step - 1) // self.step) as chunk:
            column = chunk * self.step + self.lane * self.vector
            with T.If(column < self.width), T.Then():
                body(column, 0)

    def all(self, value: Any, join: Callable[[Any, Any], Any]) -> None:
        """Joins a local number of all threads, into each of them."""
        T = script()
        offset = WARP // 2
        while offset:
            other = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value[0], offset, WARP, WARP)
            store(value, join(value[0], other), 0)
            offset //= 2
        if self.group == WARP:
            return
        with T.If(self.lane % WARP == 0), T.Then():
            store(self.shared, value[0], self.lane // WARP)
        T.evaluate(T.tvm_storage_sync("shared"))
        store(value, self.shared[0], 0)
        for warp in range(1, self.group // WARP):
            store(value, join(value[0], self.shared[warp]), 0)
        T.evaluate(T.tvm_storage_sync("shared"))


def _plan(width: Any, dtypes: Sequence[str]) -> tuple[int, int]:
    """Threads of a row, and the neighbours that one moves."""
    widest = max(4 if dtype == "float32" else 2 for dtype in dtypes)
    if not isinstance(width, int):
        return WARP * 4, 1
    return (WARP if width <= _WARP_WIDTH else _BLOCK), math.gcd(width, WIDEST // widest)


def _launch(rows: Any, width: Any, dtypes: Sequence[str], emit: Callable[[Row, Any], None]) -> None:
    """The body of a kernel: `emit(row, its number)` with the threads bound."""
    T = script()
    group, vector = _plan(width, dtypes)
    beside = _ROWS if group == WARP else 1
    with T.sblock("root"):
        T.reads()
        T.writes()
        with (
            T.thread_binding(0, (rows + beside - 1) // beside, thread="blockIdx.x") as block,
            T.thread_binding(0, beside, thread="threadIdx.y") as y,
            T.thread_binding(0, group, thread="threadIdx.x") as lane,
        ):
            shared = T.alloc_buffer((group // WARP,), "float32", scope="shared") if group > WARP else None
            number = block * beside + y
            with T.If(number < rows), T.Then():
                emit(Row(width, group, vector, lane, shared), number)


def _fetch(row: Row, source: Any, at: Callable[[Any], Sequence[Any]], buffer: Any) -> None:
    """A vector of memory into a local buffer of its dtype; `at` gives the index of a column."""
    T = script()
    if row.vector == 1:
        store(buffer, source[tuple(at(0))], 0)
        return
    with T.vectorized(row.vector) as j:
        store(buffer, source[tuple(at(j))], j)


def _put(row: Row, target: Any, at: Callable[[Any], Sequence[Any]], dtype: str, value: Callable[[int], Any]) -> None:
    """A vector of values, rounded to the dtype of memory."""
    T = script()
    buffer = local(row.vector, dtype=dtype)
    for j in range(row.vector):
        store(buffer, T.Cast(dtype, value(j)), j)
    if row.vector == 1:
        store(target, buffer[0], *at(0))
        return
    with T.vectorized(row.vector) as j:
        store(target, buffer[j], *at(j))


def norm(
    rows: Any, width: Any, dtype: str, epsilon: float, *, centred: bool, bias: bool, residual: bool, keep_sum: bool
) -> Any:
    """LayerNormalization (`centred`) or RMSNormalization as a PrimFunc; tensors as of `kernels.norms`.

    The variance is that of the differences from the mean, in a second pass over registers.
    """
    T = script()
    with prim_func("norm") as built:
        rows, width = size(rows), size(width)
        x = argument("x", (rows, width), dtype)
        more = argument("residual", (rows, width), dtype) if residual else None
        scale = argument("scale", (width,), dtype)
        shift = argument("shift", (width,), dtype) if bias else None
        y = argument("y", (rows, width), dtype)
        total = argument("sum", (rows, width), dtype) if keep_sum else None

        def emit(row: Row, r: Any) -> None:
            values = _Values(row, dtype, [x, more] if more is not None else [x], r)
            mean, spread = local(), local()
            if centred:
                store(mean, number(0.0), 0)
                values.each(lambda v: store(mean, mean[0] + v, 0))
                row.all(mean, lambda a, b: a + b)
                store(mean, mean[0] / T.Cast("float32", width), 0)
            store(spread, number(0.0), 0)

            def away(v: Any) -> Any:
                return v - mean[0] if centred else v

            values.each(lambda v: store(spread, spread[0] + away(v) * away(v), 0))
            row.all(spread, lambda a, b: a + b)
            store(spread, T.rsqrt(spread[0] / T.Cast("float32", width) + number(epsilon)), 0)
            weights, shifts = local(row.vector, dtype=dtype), local(row.vector, dtype=dtype)

            def write(column: Any, value: Callable[[int], Any]) -> None:
                _fetch(row, scale, lambda j: (column + j,), weights)
                if shift is not None:
                    _fetch(row, shift, lambda j: (column + j,), shifts)

                def normed(j: int) -> Any:
                    made = away(value(j)) * spread[0] * T.Cast("float32", weights[j])
                    return made + T.Cast("float32", shifts[j]) if shift is not None else made

                _put(row, y, lambda j: (r, column + j), dtype, normed)
                if total is not None:
                    _put(row, total, lambda j: (r, column + j), dtype, value)

            values.columns(write)

        _launch(rows, width, [dtype], emit)
    return built[0]


class _Values:
    """The numbers of a row as float32, the sum of several sources: in registers, or read again each time."""

    def __init__(
        self, row: Row, dtype: str, sources: Sequence[Any], r: Any, change: Callable[[Any, Any], Any] | None = None
    ) -> None:
        self.row, self.sources, self.r, self.change = row, sources, r, change
        self._buffers = [local(row.vector, dtype=dtype) for _ in sources]
        self._numbers = local((row.chunks or 1) * row.vector if row.kept else row.vector)
        if row.kept:
            row.each(self._read)

    def _read(self, column: Any, slot: Any) -> None:
        T = script()
        for source, buffer in zip(self.sources, self._buffers, strict=True):
            _fetch(self.row, source, lambda j: (self.r, column + j), buffer)
        for j in range(self.row.vector):
            value = T.Cast("float32", self._buffers[0][j])
            for buffer in self._buffers[1:]:
                value = value + T.Cast("float32", buffer[j])
            store(self._numbers, self.change(value, column + j) if self.change else value, slot + j)

    def columns(self, body: Callable[[Any, Callable[[int], Any]], None]) -> None:
        """Runs `body(first column, number by place)` for the vectors of the thread."""

        def vector(column: Any, slot: Any) -> None:
            if not self.row.kept:
                self._read(column, slot)
            body(column, lambda j: self._numbers[slot + j])

        self.row.each(vector)

    def each(self, body: Callable[[Any], None]) -> None:
        def vector(column: Any, value: Callable[[int], Any]) -> None:
            for j in range(self.row.vector):
                body(value(j))

        self.columns(vector)


def softmax(
    shape: Sequence[Any],
    dtype: str,
    out: str,
    *,
    log: bool = False,
    mask: Sequence[Any] | None = None,
    mask_dtype: str = "",
    causal: str = "",
) -> Any:
    """Softmax over the last of four axes, as a PrimFunc of x, the mask if there is one, and y.

    Args:
        shape: (batch, heads, queries, keys).
        dtype, out: of x and of y.
        mask: its four sizes, 1 where it is the same for all; bool (true where a key counts), or added to x. Rows
            without a key are zeros.
        causal: ``"start"``: query i sees keys 0 … i; ``"end"``: 0 … i + keys - queries.
    """
    T = script()
    hidden = mask is not None or bool(causal)
    with prim_func("softmax") as built:
        batch, heads, queries, keys = (size(d) for d in shape)
        x = argument("x", (batch, heads, queries, keys), dtype)
        flat = (batch, heads, queries, keys)
        seen = None
        if mask is not None:
            own = [1 if isinstance(one, int) and one == 1 else d for one, d in zip(mask, flat, strict=True)]
            seen = argument("mask", own, mask_dtype)
        y = argument("y", (batch, heads, queries, keys), out)

        def emit(row: Row, r: Any) -> None:
            above = T.truncdiv(r, queries)
            b, h, q = T.truncdiv(above, heads), T.truncmod(above, heads), T.truncmod(r, queries)

            def change(value: Any, column: Any) -> Any:
                if seen is not None:
                    places = zip(own, (b, h, q, column), strict=True)
                    at = [0 if isinstance(d, int) and d == 1 else i for d, i in places]
                    found = seen[tuple(at)]
                    plain = mask_dtype == "bool"
                    value = T.Select(found, value, number(_LOWEST)) if plain else value + T.Cast("float32", found)
                if causal:
                    last = q + (keys - queries if causal == "end" else 0)
                    value = T.Select(column <= last, value, number(_LOWEST))
                return value

            _softmax_row(row, _Rows4(x, (b, h, q)), y, (b, h, q), (dtype, out), change if hidden else None, log)

        _launch(batch * heads * queries, keys, [dtype, out], emit)
    return built[0]


class _Rows4:
    """A tensor of four axes whose first three are fixed."""

    def __init__(self, buffer: Any, at: Sequence[Any]) -> None:
        self.buffer, self.at = buffer, tuple(at)

    def __getitem__(self, index: tuple[Any, Any]) -> Any:
        return self.buffer[(*self.at, index[1])]


def _softmax_row(row: Row, x: Any, y: Any, at: Sequence[Any], dtypes: tuple[str, str], change: Any, log: bool) -> None:
    T = script()
    values = _Values(row, dtypes[0], [x], 0, change)
    top, total = local(), local()
    store(top, number(_LOWEST), 0)
    values.each(lambda v: store(top, T.max(top[0], v), 0))
    row.all(top, T.max)
    if change is not None:  # a row without a key
        store(top, T.Select(top[0] == number(_LOWEST), number(0.0), top[0]), 0)
    store(total, number(0.0), 0)
    values.each(lambda v: store(total, total[0] + T.exp(v - top[0]), 0))
    row.all(total, lambda a, b: a + b)
    if log:
        store(total, T.log(total[0]), 0)
    elif change is not None:
        store(total, T.Select(total[0] > number(0.0), number(1.0) / total[0], number(0.0)), 0)
    else:
        store(total, number(1.0) / total[0], 0)

    def made(v: Any) -> Any:
        return v - top[0] - total[0] if log else T.exp(v - top[0]) * total[0]

    values.columns(lambda column, value: _put(row, y, lambda j: (*at, column + j), dtypes[1], lambda j: made(value(j))))


_STARTS = {"max": float("-inf"), "min": float("inf")}


def reduction(outer: Any, width: Any, inner: Any, dtype: str, kind: str) -> Any:
    """A reduction of the middle of three axes, as a PrimFunc; kinds as of `kernels.reductions.Reduce`."""
    T = script()

    def join(a: Any, b: Any) -> Any:
        return (T.max if kind == "max" else T.min)(a, b) if kind in _STARTS else a + b

    def item(value: Any) -> Any:
        return value * value if kind == "sum_square" else value

    def finish(value: Any, count: Any) -> Any:
        return value / T.Cast("float32", count) if kind == "mean" else value

    with prim_func("reduce") as built:
        outer, width, inner = size(outer), size(width), size(inner)
        x = argument("x", (outer, width, inner), dtype)
        y = argument("y", (outer, inner), dtype)
        start = number(_STARTS.get(kind, 0.0))
        if isinstance(inner, int) and inner == 1:

            def emit(row: Row, r: Any) -> None:
                found = local()
                store(found, start, 0)
                values = _Values(row, dtype, [_Last(x)], r)
                values.each(lambda v: store(found, join(found[0], item(v)), 0))
                row.all(found, join)
                with T.If(row.lane == 0), T.Then():
                    store(y, T.Cast(dtype, finish(found[0], width)), r, 0)

            _launch(outer, width, [dtype], emit)
        else:

            def one(at: list[Any]) -> None:
                found = local()
                store(found, start, 0)
                with T.serial(width) as k:
                    store(found, join(found[0], item(wide(x[at[0], k, at[1]]))), 0)
                store(y, T.Cast(dtype, finish(found[0], width)), *at)

            each([outer, inner], one)
    return built[0]


class _Last:
    """A tensor of three axes, the last of which is 1, as rows."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __getitem__(self, index: tuple[Any, Any]) -> Any:
        return self.buffer[(*index, 0)]
