"""Values inside a generated CUDA kernel: the numbers of one row, worked on by a group of lanes.

Up to `SMALL` numbers are in registers of every lane of the group (`Same`); more are spread over its lanes (`Spread`).
`Memory` is read where it is, `Lazy` computed wherever it is read. Indices are C expressions, or Python integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Shape = tuple[int, ...]
Index = int | str

#: Numbers of a value that every lane has for itself.
SMALL = 8


@dataclass(frozen=True)
class Value:
    """A value of trailing shape `shape`."""

    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Memory(Value):
    """At `pointer`, a multiple of `aligned` numbers; `constant`: in global memory that the kernel does not write."""

    pointer: str
    constant: bool
    aligned: int


@dataclass(frozen=True)
class Same(Value):
    name: str


@dataclass(frozen=True)
class Spread(Value):
    name: str


@dataclass(frozen=True)
class Lazy(Value):
    rule: Callable[[Index], str]


class Code:
    """Lines of C++, indented, and names that are unique."""

    def __init__(self, depth: int = 1) -> None:
        self.lines: list[str] = []
        self.depth = depth
        self._numbers = itertools.count()

    def add(self, *lines: str) -> None:
        self.lines += ["    " * self.depth + line for line in lines]

    @contextmanager
    def block(self, head: str = "", tail: str = "}") -> Iterator[None]:
        self.add(f"{head} {{" if head else "{")
        self.depth += 1
        yield
        self.depth -= 1
        self.add(tail)

    def name(self, stem: str) -> str:
        return f"{stem}_{next(self._numbers)}"

    def __str__(self) -> str:
        return "\n".join(self.lines)


def vector(size: int) -> int:
    """Numbers of a vector of which a row of `size` numbers consists."""
    return next(v for v in (4, 2, 1) if size % v == 0)


def literal(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        return (
            "__int_as_float(0x7fc00000)"
            if math.isnan(value)
            else f"{'-' if value < 0 else ''}__int_as_float(0x7f800000)"
        )
    return f"{value!r}f" if "." in repr(value) or "e" in repr(value) else f"{value!r}.0f"


def strides(shape: Shape) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def combine(index: Index, shape: Shape, steps: Sequence[int], offset: int = 0) -> Index:
    """Where element `index` of an array of `shape` is in one with the strides `steps`, which starts at `offset`."""
    own = strides(shape)
    if isinstance(index, int):
        return offset + sum(index // s % n * step for n, s, step in zip(shape, own, steps, strict=True))
    # Neighbouring axes that are walked as one are one.
    merged: list[list[int]] = []  # [size, stride, step]
    for n, s, step in zip(shape, own, steps, strict=True):
        if n == 1:
            continue
        if merged and merged[-1][2] == n * step:
            merged[-1] = [merged[-1][0] * n, s, step]
        else:
            merged.append([n, s, step])
    terms: list[str] = []
    for number, (n, s, step) in enumerate(merged):
        if step == 0:
            continue
        term = index if s == 1 else f"({index}) / {s}"
        if number:
            term = f"({term}) % {n}"
        terms.append(term if step == 1 else f"({term}) * {step}")
    if offset or not terms:
        terms.append(str(offset))
    return terms[0] if len(terms) == 1 else f"({' + '.join(f'({t})' for t in terms)})"


def broadcast(index: Index, shape: Shape, source: Shape) -> Index:
    """Where element `index` of an array of `shape` comes from in one of `source` that is broadcast to it."""
    padded = (1,) * (len(shape) - len(source)) + source
    return combine(index, shape, [0 if n == 1 else step for n, step in zip(padded, strides(padded), strict=True)])
