"""A kernel of the intra-operator IR as a template: a TIR function for a level of instructions."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from planish.ir.relational.inter import Variable
from planish.ir.relational.intra import Access, Gemm, Kernel
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, prim_func, script, size
from planish.runtime.kernels.template import ON_STACK, Template
from planish.runtime.relational import tiles_bf16
from planish.runtime.relational.operators import stored
from planish.runtime.relational.rows import Rows
from planish.runtime.relational.tiles import Matrix, multiply, outer, parts_of
from planish.runtime.relational.values import Stored, Value, in_registers, opaque, sweep


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class RelationalKernel(Template):
    """A kernel over memory. Arguments, all flat: values in the order of `memory` (float32), tables in that of `tables`
    (int32), then, for a segment GEMM, tiles (3 each: type, first row, end), else the range of rows (2), int32.

    Indices must be valid, and arrays as long as they say: nothing checks them here.

    Attributes:
        kernel: what it does.
        shapes: the values that it reads and writes, as they are in memory.
        sources: a hash of what generates the code, by which compiled kernels are kept.
    """

    kernel: Kernel
    shapes: tuple[Variable, ...]
    sources: str = field(default_factory=_sources)

    @cached_property
    def memory(self) -> tuple[str, ...]:
        """Values in memory that it reads or writes."""
        return tuple(self.kernel.reads() | dict.fromkeys(self.kernel.writes()))

    @cached_property
    def tables(self) -> tuple[str, ...]:
        return tuple(self.kernel.tables())

    @property
    def symbol(self) -> str:
        text = repr((self.kernel, [v for v in self.shapes if v.name in self.memory]))
        return f"relational_{hashlib.sha256(text.encode()).hexdigest()[:20]}"

    def reference(self, *arguments: np.ndarray) -> Any:
        """There is none for a kernel alone; programs are compared with their interpreter."""
        raise NotImplementedError("compare a program with planish.ir.relational.interpret")

    def build(self, cpu: Cpu) -> Any:
        with prim_func(self.symbol) as built:
            buffers = {name: argument(f"v{i}", (size(),)) for i, name in enumerate(self.memory)}
            buffers |= {name: argument(f"t{i}", (size(),), "int32") for i, name in enumerate(self.tables)}
            work = argument("work", (size(),), "int32")
            emitter = _Emitter(cpu, self.kernel, buffers, {v.name: v for v in self.shapes})
            T = script()
            parallel = self.kernel.schedule.parallel
            if self.kernel.gemm is None:
                begin = T.Cast("int64", work[0])
                count = opaque(T.Cast("int64", work[1]) - begin)
                with (T.parallel if parallel else T.serial)(count) as i:
                    emitter.row(opaque(T.Cast("int64", work[0]) + i))
            else:
                with (T.parallel if parallel else T.serial)(work.shape[0] // 3) as t:
                    emitter.tile(*(opaque(T.Cast("int64", work[t * 3 + i])) for i in range(3)))
        return built[0]


class _Emitter:
    def __init__(self, cpu: Cpu, kernel: Kernel, buffers: dict[str, Any], shapes: dict[str, Variable]) -> None:
        self.cpu, self.kernel, self.buffers, self.shapes = cpu, kernel, buffers, shapes
        self.before = Rows(buffers, shapes, cpu.lanes, kernel.before)
        self.after = Rows(buffers, shapes, cpu.lanes, kernel.after)

    def row(self, row: Any) -> None:
        """A row of a traversal."""
        known = self.before.emit(row, {})
        self.after.emit(row, known)

    def tile(self, segment: Any, begin: Any, end: Any) -> None:
        """A tile of a segment GEMM."""
        T, gemm, rows = script(), self.kernel.gemm, self.kernel.schedule.tile_rows
        assert gemm is not None
        count = opaque(end - begin)
        operands = {"x": gemm.x} | ({"y": gemm.y} if gemm.y is not None else {})
        direct = {name: access for name, access in operands.items() if self._direct(access)}
        stacks = {
            name: _stack(rows * math.prod(self._shape(access)))
            for name, access in operands.items()
            if name not in direct
        }
        if stacks or self.kernel.before:
            needed = [access.value for name, access in operands.items() if access.local]
            with T.serial(count) as i:
                self.before.emit(opaque(begin + i), {}, needed)
                for name, stack in stacks.items():
                    self._fill(stack, i, self.before.read(operands[name]))
        matrices = {}
        for name, access in operands.items():
            width = math.prod(self._shape(access))
            if name in direct:
                matrices[name] = Matrix(self.buffers[access.value], opaque(begin * width), width)
            else:
                matrices[name] = Matrix(stacks[name], 0, width)
        if gemm.kind == "outer":
            self._outer(gemm, segment, count, matrices["x"], matrices["y"])
            if self.kernel.after:
                with T.serial(count) as i:
                    self.after.emit(opaque(begin + i), {})
        else:
            self._linear(gemm, segment, begin, count, matrices["x"])

    def _direct(self, access: Access) -> bool:
        """Whether rows are read from memory where they are: one after the other, with nothing to compute."""
        return not access.local and not access.tables and not access.one

    def _shape(self, access: Access) -> tuple[int, ...]:
        if access.value in self.shapes:
            return self.shapes[access.value].shape
        for statement in self.kernel.statements():
            if statement.result.name == access.value:
                return statement.result.shape
        raise AssertionError(access.value)

    def _fill(self, stack: Any, i: Any, value: Value) -> None:
        target = Stored(value.shape, stack, opaque(i * value.size))
        sweep(value.shape, self.cpu.lanes, lambda lead, at, n: target.put(lead, at, n, value.at(lead, at, n)))

    def _linear(self, gemm: Gemm, segment: Any, begin: Any, count: Any, x: Matrix) -> None:
        T = script()
        assert gemm.weight is not None
        weight, shape = self.shapes[gemm.weight].shape, gemm.result.shape
        depth, columns = weight[-2:]
        width = math.prod(shape)
        rows = self.kernel.schedule.tile_rows
        rounded = self.kernel.schedule.compute == "bfloat16" and tiles_bf16.fits(depth, columns)
        into_memory = gemm.store is not None and not gemm.store.tables and not self.kernel.after and not rounded
        if into_memory:
            assert gemm.store is not None
            y = Matrix(self.buffers[gemm.store.value], opaque(begin * width), width)
        else:
            y = Matrix(_stack((tiles_bf16.stack_rows(rows) if rounded else rows) * width), 0, width)
        first = opaque(segment * math.prod(weight))
        for part, head in parts_of((*shape[:-1], depth), gemm.heads):
            w = Matrix(self.buffers[gemm.weight], first + head * depth * columns, columns)
            left, right = x.from_column(part * depth), y.from_column(part * columns)
            if rounded:
                tiles_bf16.multiply(rows, count, left, w, right, depth, columns)
            else:
                multiply(self.cpu, count, left, w, right, depth, columns)
        if into_memory:
            return
        with T.serial(count) as i:
            row = opaque(begin + i)
            product = Stored(shape, y.buffer, opaque(i * width))
            self.after.emit(row, {gemm.result.name: product})
            if gemm.store is not None:
                self.after._write(gemm.store, gemm.result, product)

    def _outer(self, gemm: Gemm, segment: Any, count: Any, x: Matrix, y: Matrix) -> None:
        shape = gemm.result.shape
        depth, columns = shape[-2:]
        first = opaque(segment * math.prod(shape))
        for part, head in parts_of((x.stride // depth, depth), gemm.heads):
            w = Matrix(self.buffers[gemm.result.name], first + head * depth * columns, columns)
            left, right = x.from_column(part * depth), y.from_column(part * columns)
            if columns == 1:  # the longer side takes the vectors
                w = Matrix(w.buffer, w.base, depth)
                outer(self.cpu, count, right, left, w, 1, depth)
            else:
                outer(self.cpu, count, left, right, w, depth, columns)


def _stack(numbers: int) -> Any:
    return script().alloc_buffer((numbers,), "float32", scope="local", align=64, annotations=ON_STACK)


__all__ = ["RelationalKernel", "in_registers", "stored"]
