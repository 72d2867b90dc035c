"""Loops over rows of any width, for templates: whole vectors with several accumulators first, single numbers last.

Everything here emits TIR into the function that is being built (TVM's IRBuilder). Indices are int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.template import ON_STACK, import_tvm


def script() -> Any:
    """TVM's builder of TIR, as a module."""
    import_tvm()
    from tvm.script.ir_builder import tirx  # type: ignore[import-untyped]

    return tirx


@contextmanager
def prim_func(symbol: str) -> Iterator[list[Any]]:
    """Builds a function in its body; the list that it gives holds the PrimFunc afterwards."""
    import_tvm()
    from tvm.script.ir_builder import IRBuilder  # type: ignore[import-untyped]

    T = script()
    built: list[Any] = []
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(symbol)
            T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
            yield built
        built.append(builder.get())


def argument(name: str, shape: Sequence[Any], dtype: str = "float32") -> Any:
    """The next argument of the function: a compact tensor."""
    T = script()
    # A runtime may place a weight anywhere: no more than the alignment of a number is taken for granted.
    return T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype, align=np.dtype(dtype).itemsize)


def size() -> Any:
    """A symbolic size."""
    return script().int64()


def local(*shape: int, dtype: str = "float32") -> Any:
    """A buffer in registers, if every index into it is constant in the end; else on the stack."""
    return script().alloc_buffer(shape or (1,), dtype, scope="local", annotations=ON_STACK)


def store(buffer: Any, value: Any, *index: Any) -> None:
    script().buffer_store(buffer, value, list(index))


def const(value: float) -> Any:
    return script().float32(value)


class Lanes:
    """Local numbers, a vector wide, that an unrolled loop works on; `scalar` are those of the ragged end."""

    def __init__(self, cpu: Cpu, count: int, start: float | None = 0.0) -> None:
        self.lanes = cpu.lanes
        # Buffers of their own, so that LLVM keeps each in a register.
        self.vectors = [local(cpu.lanes) for _ in range(count)]
        self.scalar = local()
        if start is not None:
            self.fill(start)

    def fill(self, value: float) -> None:
        T = script()
        for vector in self.vectors:
            with T.vectorized(self.lanes) as j:
                store(vector, const(value), j)
        store(self.scalar, const(value), 0)

    def reduce(self, join: Callable[[Any, Any], Any], into: Any) -> None:
        """All of them joined in a tree, into a local scalar."""
        T, vectors, lanes = script(), self.vectors, self.lanes
        while len(vectors) > 1:
            half = (len(vectors) + 1) // 2
            for a, b in zip(vectors[:half], vectors[half:], strict=False):
                with T.vectorized(lanes) as j:
                    store(a, join(a[j], b[j]), j)
            vectors = vectors[:half]
        last = vectors[0]
        while lanes > 1:
            lanes //= 2
            narrow = local(lanes)
            with T.vectorized(lanes) as j:
                store(narrow, join(last[j], last[j + lanes]), j)
            last = narrow
        store(into, join(last[0], self.scalar[0]), 0)


#: (column, update): `update(lanes, f)` replaces the numbers that belong to this step by f of them.
Body = Callable[[Any, Callable[["Lanes", Callable[[Any], Any]], None]], None]


def sweep(cpu: Cpu, width: Any, unroll: int, body: Body) -> None:
    """Runs `body` for every column of a row: `unroll` vectors at a time, then one, then the numbers that are left."""
    T, lanes = script(), cpu.lanes
    step = lanes * unroll

    def vector(first: Any, slot: int) -> None:
        with T.vectorized(lanes) as j:

            def update(group: Lanes, f: Callable[[Any], Any]) -> None:
                store(group.vectors[slot], f(group.vectors[slot][j]), j)

            body(first + T.Cast("int64", j), update)

    with T.serial(width // step) as block:
        for slot in range(unroll):
            vector(block * step + slot * lanes, slot)
    if unroll > 1:
        with T.serial(width % step // lanes) as one:
            vector(width // step * step + one * lanes, 0)
    with T.serial(width % lanes) as rest:

        def update(group: Lanes, f: Callable[[Any], Any]) -> None:
            store(group.scalar, f(group.scalar[0]), 0)

        body(width // lanes * lanes + rest, update)


#: Most vectors that `blocks` gives to a body at once: with as many accumulators there are registers left for the rest.
_BLOCK_VECTORS = 8


def blocks(cpu: Cpu, width: Any, body: Callable[[Any, int, int], None]) -> None:
    """Runs `body(first column, vectors, lanes)` for blocks that cover `width` columns.

    For bodies with a loop of their own over something else, whose accumulators a block is: wide blocks first; an
    incomplete last vector starts earlier, so that columns in it are computed twice, with equal results. Below one
    vector, narrower ones.
    """
    T, lanes = script(), cpu.lanes
    vectors = _BLOCK_VECTORS
    with T.serial(width // (vectors * lanes)) as block:
        body(block * (vectors * lanes), vectors, lanes)
    while vectors > 1:
        vectors //= 2
        step = vectors * lanes
        with T.If(width // step % 2 == 1), T.Then():
            body(T.bind(width // (2 * step) * (2 * step)), vectors, lanes)
    with T.If(width >= lanes):
        with T.Then(), T.If(width % lanes > 0), T.Then():
            body(T.bind(width - lanes), 1, lanes)
        with T.Else():
            narrow = lanes // 2
            while narrow:
                with T.If(width // narrow % 2 == 1), T.Then():
                    body(T.bind(width // (2 * narrow) * (2 * narrow)), 1, narrow)
                narrow //= 2


def each_lane(lanes: int, body: Callable[[Any], None]) -> None:
    """A vectorized loop; of one lane, just the body."""
    T = script()
    if lanes == 1:
        body(T.int64(0))
    else:
        with T.vectorized(T.int64(lanes)) as j:
            body(j)
