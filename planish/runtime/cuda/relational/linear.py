"""Products with a weight for each segment: rows are gathered and reduced into a tile, multiplied, and taken on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from planish.ir.errors import UnsupportedError
from planish.ir.relational.intra import Access, Loop, Statement
from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.parts import PART, POOL, join, part, places, shared_walk
from planish.runtime.cuda.relational.rows import REDUCTIONS, Rows
from planish.runtime.cuda.relational.text import (
    LONG,
    MOST_SHARED,
    THREADS,
    Context,
    Generated,
    Launch,
    finish,
    function,
    lanes_for,
    parameters,
    prologue,
)
from planish.runtime.cuda.relational.values import Code, Memory, Value

WARPS = THREADS // 32
_MOST_DEPTH, _MOST_COLUMNS = 64, 128


def rounded(number: int, to: int) -> int:
    return -(-number // to) * to


def banked(columns: int) -> int:
    """A stride by which four consecutive rows of panels lie in different banks."""
    return columns if columns % 16 == 8 else rounded(columns, 16) + 8


class Linear:
    """One such kernel, while it is generated.

    Attributes:
        loop: the loop before the product, if it is the only one there, and that after it: rows for which they are long
            are left to the whole block.
    """

    def __init__(self, c: Context) -> None:
        gemm = c.kernel.gemm
        assert gemm is not None and gemm.weight is not None
        self.c, self.gemm, self.weight = c, gemm, gemm.weight
        self.result = gemm.result.shape
        self.matrix = c.shapes[gemm.weight].shape
        self.depth, self.columns = self.matrix[-2:]
        self.parts, self.heads = math.prod(self.result[:-1]), max(gemm.heads, 1)
        self.deep = min(rounded(self.depth, 8), _MOST_DEPTH)
        self.panels = min(rounded(self.columns, 8), _MOST_COLUMNS)
        self.x_stride = rounded(self.parts * self.depth, 8) + 4
        self.y_stride = rounded(self.parts * self.columns, 8) + 4
        self.w_stride = banked(self.panels)
        #: The result takes the place of the left operand; the weight stays for all tiles of an item.
        self.over = self.parts == 1 and self.columns <= _MOST_COLUMNS
        self.resident = self.heads == 1 and self.columns <= _MOST_COLUMNS and self.depth <= _MOST_DEPTH
        self.lanes = lanes_for(c)
        self.groups = THREADS // self.lanes
        self.types: dict[int, str] = {}
        self.spilled = 0
        self.loop = _only_loop(c.kernel.before)
        last = _only_loop(c.kernel.after)
        self.last = last if last is not None and not any(s.kind in REDUCTIONS for s in last.body) else None
        if self.loop is not None and any(s.add for s in self.loop.body):
            self.loop = None
        if self.loop is not None and self.last is not None and self.loop.pointers != self.last.pointers:
            self.last = None
        self.offsets, self.room = places([self.loop]) if self.loop is not None else ({}, 0)

    # ---- sections

    def emitted(self, depth: int, emit: Callable[[Group], None]) -> list[str]:
        """Lines that `emit` gives a group."""
        code = Code(depth)
        group = Group(code, self.lanes)
        group.types = self.types
        emit(group)
        self.spilled = max(self.spilled, group.spilled)
        return code.lines

    def _rows(self, group: Group, storing: bool = True) -> Rows:
        return self.c.rows(group, tile=True, storing=storing)

    def _fill(self, group: Group, rows: Rows, known: Mapping[str, Value]) -> None:
        x = self.gemm.x
        group.store(f"(x_tile + i_row * {self.x_stride})", known[x.value] if x.local else rows.read(x))

    def before(self, group: Group) -> None:
        rows = self._rows(group)
        self._fill(group, rows, rows.emit(self.c.kernel.before, {}))

    def _product(self) -> dict[str, Value]:
        y = Memory(self.result, f"(y_tile + i_row * {self.y_stride})", False, 4)
        return {self.gemm.result.name: y}

    def after(self, group: Group) -> None:
        rows = self._rows(group)
        rows.emit(self.c.kernel.after, self._product())
        self._keep(group, rows)

    def _keep(self, group: Group, rows: Rows) -> None:
        if self.gemm.store is not None:
            (y,) = self._product().values()
            group.store(rows.memory(self.gemm.store, self.result).pointer, y)

    def long_before(self, group: Group) -> None:
        """A row with a long loop, by all threads: they join what its parts have, and a group goes on with that."""
        assert self.loop is not None
        code, items = group.code, self.c.kernel.before
        at = items.index(self.loop)
        code.add("const int first_part = items[place], parts_here = items[place + 1] - first_part;")
        rows = self._rows(group, storing=False)
        rows.emit(items[:at], {})
        join(rows, self.loop, self.offsets, self.room)
        with code.block("if (threadIdx.x < G)"):
            group.enter()
            rows = self._rows(group)
            rows.emit(items[:at], {})
            self._joined(group, rows)
            self._fill(group, rows, rows.emit(items[at + 1 :], rows.known))
            group.leave()
        code.add("__syncthreads();")

    def _joined(self, group: Group, rows: Rows) -> None:
        assert self.loop is not None
        for s in self.loop.body:
            if s.kind in REDUCTIONS:
                total = Memory(s.result.shape, f"(joined + {self.offsets[s.result.name]})", False, 4)
                rows.known[s.result.name] = rows.finished(s.kind, total, "long_rows")
                if s.store is not None:
                    group.store(rows.memory(s.store, s.result.shape).pointer, rows.known[s.result.name])

    def long_after(self, group: Group) -> None:
        """A row of whose result a long loop reads: it goes to memory, for the parts of that loop."""
        assert self.last is not None
        items = self.c.kernel.after
        size = math.prod(self.result)
        with group.code.block(f"for (int i = threadIdx.x; i < {size}; i += {THREADS})"):
            group.code.add(f"{self._kept('place')}[i] = y_tile[i_row * {self.y_stride} + i];")
        with group.code.block("if (threadIdx.x < G)"):
            group.enter()
            rows = self._rows(group)
            rows.emit([item for item in items if item is not self.last], self._product())
            self._keep(group, rows)
            group.leave()

    def _kept(self, place: str) -> str:
        """Where the result of a long row is in the workspace, behind what parts have."""
        return f"(workspace + (long long)items[count] * {self.room} + (long long){place} * {self.long_rows})"

    @property
    def long_rows(self) -> int:
        return rounded(math.prod(self.result), 4) if self.last is not None else 0

    def _last_parts(self) -> tuple[Code, int]:
        """The kernel of the parts of a long loop after the product; and its bytes of shared memory."""
        assert self.last is not None
        items = self.c.kernel.after
        body = Code()
        group = Group(body, self.lanes)
        rows = self.c.rows(group, storing=False)
        known: dict[str, Value] = {self.gemm.result.name: Memory(self.result, "kept", False, 4)}
        rows.emit(items[: items.index(self.last)], known)
        shared_walk(rows, self.last, self.c, "begin", "end")
        code = Code()
        code.add(POOL, *prologue(self.lanes, group, "reinterpret_cast<float*>(pool4)"), *PART)
        code.add(f"const float* kept = {self._kept('part[0]')};", "(void)kept, (void)pool4;")
        code.lines += body.lines
        return code, 4 * self.groups * group.spilled

    # ---- the kernel

    def numbers(self, tile: int) -> int:
        """Numbers of shared memory for tiles of so many rows."""
        return self._x_size(tile) + self.deep * self.w_stride + len(self.c.cached) * tile + self._rest()

    def _x_size(self, tile: int) -> int:
        x, y = tile * self.x_stride, tile * self.y_stride
        return max(x, y) if self.over else x + y

    def _rest(self) -> int:
        return (self.room + THREADS if self.loop is not None else 0) + self.groups * self.spilled

    def generated(self) -> Generated:
        c, kernel, gemm = self.c, self.c.kernel, self.gemm
        before, after = self.emitted(3, self.before), self.emitted(3, self.after)
        long_before = self.emitted(4, self.long_before) if self.loop is not None else []
        long_after = self.emitted(4, self.long_after) if self.last is not None else []
        tile = next((t for t in (64, 32, 16) if 4 * self.numbers(t) <= MOST_SHARED), 0)
        if not tile:
            raise UnsupportedError(
                f"'{kernel.name}': rows of {self.parts * self.depth} and {self.parts * self.columns} numbers in "
                f"{4 * self.numbers(16)} bytes of shared memory; CUDA kernels use {MOST_SHARED}. Use smaller features "
                "or fewer heads."
            )
        code = Code()
        self._begin(code, tile)
        loop = self.loop or self.last
        with code.block(f"for (int first = begin; first < end; first += {tile})"):
            code.add(f"const int rows_here = min({tile}, end - first);", "__syncthreads();")
            code.add(*_prefetch(c), *_tile_lines(c, loop))
            self._for_rows(code, self.loop, before, long_before)
            code.add("__syncthreads();")
            self._multiplication(code, WARPS // (tile // 16))
            code.add("__syncthreads();")
            self._for_rows(code, self.last, after, long_after)
        values, tables = tuple(kernel.reads() | dict.fromkeys(kernel.writes())), tuple(kernel.tables())
        given = parameters(c, values, tables)
        text, launches = function("", given, code), [Launch("", "items", shared=4 * self.numbers(tile))]
        if self.loop is not None:
            more, shared = part(c, self.loop, self.offsets, self.room)
            text += function("_parts", given, more)
            launches.insert(0, Launch("_parts", "parts", shared=shared))
        if self.last is not None:
            more, shared = self._last_parts()
            text += function("_last", given, more)
            launches.append(Launch("_last", "parts", shared=shared))
        long = {"long": loop.pointers, "long_room": self.room, "long_rows": self.long_rows} if loop is not None else {}
        return finish(c, text, values, tables, launches, segments=gemm.segments or "", item_rows=tile, **long)

    def _begin(self, code: Code, tile: int) -> None:
        weights, chains = self.deep * self.w_stride, len(self.c.cached) * tile
        code.add("extern __shared__ float4 pool4[];", "float* x_tile = reinterpret_cast<float*>(pool4);")
        code.add("float* y_tile = x_tile;" if self.over else f"float* y_tile = x_tile + {tile * self.x_stride};")
        code.add(f"float* weights = x_tile + {self._x_size(tile)};")
        code.add(f"int (*rows_of)[{tile}] = reinterpret_cast<int (*)[{tile}]>(weights + {weights});")
        code.add(f"float* joined = weights + {weights + chains};")
        group = Group(code, self.lanes)
        group.types, group.spilled = self.types, self.spilled
        code.add(*prologue(self.lanes, group, f"joined + {self._rest() - self.groups * self.spilled}"))
        code.add("const int* item = work + blockIdx.x * 4;")
        code.add("const int segment = item[0], begin = item[1], end = item[2];")
        code.add(f"const float* matrix = m_{self.weight} + (long long)segment * {math.prod(self.matrix)};")
        by_rows = tile // 16
        code.add(f"const int warp = threadIdx.x / 32, warp_row = warp % {by_rows} * 16, panel = warp / {by_rows};")
        code.add("(void)rows_of, (void)joined, (void)count, (void)items, (void)listed, (void)workspace;")
        if self.resident:
            code.add(f"{self._load()}, {self.depth}, {self.columns}, 0, 0);")

    def _load(self) -> str:
        return f"load_matrix<{self.deep}, {self.panels}, {self.w_stride}, {THREADS}>(weights, matrix"

    def _for_rows(self, code: Code, loop: Loop | None, lines: list[str], long: list[str]) -> None:
        """A section for each row by a group; where its loop is long, by the block."""
        count = f"__ldg(t_{loop.pointers} + r + 1) - __ldg(t_{loop.pointers} + r)" if loop is not None else ""
        with code.block(f"for (int i_row = threadIdx.x / G; i_row < rows_here; i_row += {self.groups})"):
            code.add("const int r = first + i_row;", "(void)r;")
            if loop is not None:
                code.add(f"if (some_long && {count} > {LONG}) continue;")
            code.lines += lines
        if loop is None:
            return
        with code.block("for (int i_row = 0; some_long && i_row < rows_here; ++i_row)"):
            code.add(f"const int r = first + i_row, long_rows = {count};")
            with code.block(f"if (long_rows > {LONG})"):
                code.add("const int place = find_row(listed, count, r);", "(void)long_rows;")
                code.lines += long

    def _multiplication(self, code: Code, step: int) -> None:
        depth, columns, deep, panels = self.depth, self.columns, self.deep, self.panels
        each = -(-(panels // 8) // step)
        by_part = f"for (int part = 0; part < {self.parts}; ++part)"
        with code.block(by_part), code.block(f"for (int n0 = 0; n0 < {columns}; n0 += {panels})"):
            code.add(f"float sums[{each}][4] = {{}};")
            with code.block(f"for (int k0 = 0; k0 < {depth}; k0 += {deep})"):
                if not self.resident:
                    head = f" + part % {self.heads} * {depth * columns}" if self.heads > 1 else ""
                    code.add("__syncthreads();", f"{self._load()}{head}, {depth}, {columns}, k0, n0);")
                    code.add("__syncthreads();")
                code.add(
                    f"multiply<{deep}, {each}, {step}, {self.x_stride}, 1, {self.w_stride}>(sums, "
                    f"x_tile + warp_row * {self.x_stride} + part * {depth} + k0, weights + panel * 8, "
                    f"{panels // 8} - panel, {depth} - k0);"
                )
            if self.over:
                code.add("__syncthreads();")
            code.add(
                f"put_sums<{each}, {step}>(sums, y_tile + warp_row * {self.y_stride} + part * {columns} + n0 "
                f"+ panel * 8, {self.y_stride}, min({columns} - n0, {panels}) - panel * 8);"
            )


def _only_loop(items: tuple[Statement | Loop, ...]) -> Loop | None:
    loops = [item for item in items if isinstance(item, Loop)]
    return loops[0] if len(loops) == 1 else None


def _tile_lines(c: Context, loop: Loop | None) -> list[str]:
    """What rows of a tile lead to, looked up by all threads at once; and whether a row of it has a long loop."""
    lines: list[str] = []
    if c.cached:
        lines.append(f"for (int i = threadIdx.x; i < rows_here; i += {THREADS}) {{")
        for number, chain in enumerate(c.cached):
            index = "first + i"
            for table in chain:
                index = f"__ldg(t_{table} + {index})"
            lines.append(f"    rows_of[{number}][i] = {index};")
        lines.append("}")
    if loop is None:
        return [*lines, "__syncthreads();"] if lines else []
    at = f"t_{loop.pointers} + first + threadIdx.x"
    test = f"threadIdx.x < rows_here && __ldg({at} + 1) - __ldg({at}) > {LONG}"
    return [*lines, f"const int some_long = __syncthreads_or({test});"]


def _prefetch(c: Context) -> list[str]:
    """Asks for the first of the rows that each row of a tile reads, all at once: what leads there takes as long."""
    lines: list[str] = []
    for item in c.kernel.before:
        if not isinstance(item, Loop):
            continue
        wanted: dict[Access, int] = {}
        for a in (a for statement in item.body for a in statement.operands):
            if a.level == "inner" and not a.local and not a.one and math.prod(c.shapes[a.value].shape) >= 32:
                wanted[a] = math.prod(c.shapes[a.value].shape)
        if not wanted:
            continue
        lines += [
            f"for (int i = threadIdx.x; i < rows_here; i += {THREADS}) {{",
            f"    const int p = __ldg(t_{item.pointers} + first + i);",
            f"    if (p < __ldg(t_{item.pointers} + first + i + 1)) {{",
            f"        const int e = {f'__ldg(t_{item.rows} + p)' if item.rows else 'p'};",
        ]
        for a, size in wanted.items():
            index = "e"
            for table in a.tables:
                index = f"__ldg(t_{table} + {index})"
            lines.append(f"        prefetch<{size}>(m_{a.value} + (long long){index} * {size});")
        lines += ["    }", "}"]
    return lines
