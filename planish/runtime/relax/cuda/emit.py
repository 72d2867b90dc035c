"""What kernels for GPUs are written with, on top of TVM's builder of TIR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from planish.runtime.kernels.loops import script

BLOCK = 256


def argument(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """The next argument of the function: a compact tensor."""
    T = script()
    return T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype)


def size(value: Any) -> Any:
    """A size of an argument: a number stays one, anything else is a variable of the kernel."""
    return value if isinstance(value, int) else script().int64()


def number(value: float) -> Any:
    return script().float32(value)


def local(*shape: int, dtype: str = "float32") -> Any:
    """Registers."""
    return script().alloc_buffer(shape or (1,), dtype, scope="local")


def wide(value: Any) -> Any:
    """A number of memory as float32."""
    return script().Cast("float32", value)


def each(dims: Sequence[Any], body: Callable[[list[Any]], None]) -> None:
    """The body of a kernel with a thread for each element of `dims`: `body(indices)`."""
    T = script()
    total = dims[0]
    for extent in dims[1:]:
        total = total * extent
    with T.sblock("root"):
        T.reads()
        T.writes()
        with (
            T.thread_binding(0, (total + BLOCK - 1) // BLOCK, thread="blockIdx.x") as block,
            T.thread_binding(0, BLOCK, thread="threadIdx.x") as thread,
        ):
            place = block * BLOCK + thread
            with T.If(place < total), T.Then():
                indices: list[Any] = []
                for extent in reversed(dims[1:]):
                    indices.append(T.truncmod(place, extent))
                    place = T.truncdiv(place, extent)
                body([place, *reversed(indices)])
