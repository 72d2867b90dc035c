"""Segment GEMMs as CUDA kernels: products with a weight (`linear`), and sums of outer products by segment."""

from __future__ import annotations

import math

from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.linear import WARPS, Linear, banked, rounded
from planish.runtime.cuda.relational.text import (
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
from planish.runtime.cuda.relational.values import SMALL, Code, Value

#: Rows of a step of an outer product, and its most rows and columns in one block.
_ROWS, _TILE = 32, 64


def product(c: Context) -> Generated:
    """A kernel with a product."""
    gemm = c.kernel.gemm
    assert gemm is not None
    if c.deterministic and c.adds:
        raise AssertionError("products add to rows, and were to be deterministic: lower without scatter")
    return Linear(c).generated() if gemm.kind == "linear" else Outer(c).generated()


class Outer:
    """Sums of outer products: blocks sum those of an item of work, a second kernel the items of a segment, in order."""

    def __init__(self, c: Context) -> None:
        gemm = c.kernel.gemm
        assert gemm is not None and gemm.y is not None
        self.c, self.x, self.y, self.name = c, gemm.x, gemm.y, gemm.result.name
        self.segments = gemm.segments or ""
        self.numbers = math.prod(gemm.result.shape)
        self.depth, self.columns = gemm.result.shape[-2:]
        self.heads = max(gemm.heads, 1)
        self.leading = math.prod(c.shape(gemm.x)) // (self.heads * self.depth)
        #: What one block computes of the product, and how many blocks there are for it.
        self.tall = next(n for n in (16, 32, 64) if n >= self.depth or n == _TILE)
        self.wide = next(n for n in (8, 16, 32, 64) if n >= self.columns or n == _TILE)
        self.blocks = (-(-self.depth // self.tall), -(-self.columns // self.wide))
        #: Warps by rows of the product, by panels of its columns, and by shares of the rows that are summed.
        self.by_rows = self.tall // 16
        self.step = min(self.wide // 8, WARPS // self.by_rows)
        self.shares = WARPS // (self.by_rows * self.step)
        self.panels = self.wide // 8 // self.step
        self.rows = max(_ROWS, 8 * self.shares)
        self.x_stride, self.y_stride = banked(self.tall), banked(self.wide)
        self.pool = rounded(max(self.rows * (self.x_stride + self.y_stride), self.tall * (self.wide + 1)), 4)
        self.lanes = lanes_for(c)

    def generated(self) -> Generated:
        c, kernel = self.c, self.c.kernel
        group = Group(Code(4), self.lanes)
        self._fill(group)
        values, tables = tuple(kernel.reads() | dict.fromkeys(kernel.writes())), tuple(kernel.tables())
        given = parameters(c, values, tables)
        text = function("_parts", given, self._parts(group)) + function("", given, self._total())
        shared = 4 * (self.pool + THREADS // self.lanes * group.spilled)
        launches = [
            Launch("_parts", "items", columns=self.heads * self.blocks[0] * self.blocks[1], shared=shared),
            Launch("", "rows", columns=-(-self.numbers // 32)),
        ]
        return finish(c, text, values, tables, launches, segments=self.segments, item_rows=self.rows, room=self.numbers)

    def _fill(self, group: Group) -> None:
        """A row of both operands into their tiles."""
        rows = self.c.rows(group)
        known = rows.emit(self.c.kernel.before, {})
        sides = (("x", self.x, self.x_stride, self.tall), ("y", self.y, self.y_stride, self.wide))
        for name, access, stride, most in sides:
            value = known[access.value] if access.local else rows.read(access)
            _put_part(group, value, f"({name}_tile + i_row * {stride})", most, f"{name}0")
        if self.c.kernel.after:
            with group.code.block("if (blockIdx.y == 0 && l == 0)"):
                rows.emit(self.c.kernel.after, {})

    def _parts(self, group: Group) -> Code:
        depth, columns, tall, wide, blocks = self.depth, self.columns, self.tall, self.wide, self.blocks
        code = Code()
        code.add("extern __shared__ float4 pool4[];", "float* x_tile = reinterpret_cast<float*>(pool4);")
        code.add(f"float* y_tile = x_tile + {self.rows * self.x_stride};")
        code.add(*prologue(self.lanes, group, f"x_tile + {self.pool}"))
        code.add("const int begin = work[blockIdx.x * 4 + 1], end = work[blockIdx.x * 4 + 2];")
        code.add(f"const int head = blockIdx.y / {blocks[0] * blocks[1]};")
        code.add(f"const int m0 = blockIdx.y / {blocks[1]} % {blocks[0]} * {tall};")
        code.add(f"const int n0 = blockIdx.y % {blocks[1]} * {wide};")
        code.add(f"const int warp = threadIdx.x / 32, warp_row = warp % {self.by_rows} * 16;")
        code.add(f"const int panel = warp / {self.by_rows} % {self.step}, share = warp / {self.by_rows * self.step};")
        code.add(f"float sums[{self.panels}][4] = {{}};")
        by_rows = f"for (int first = begin; first < end; first += {self.rows})"
        with code.block(by_rows), code.block(f"for (int l = 0; l < {self.leading}; ++l)"):
            code.add(f"const int x0 = (l * {self.heads} + head) * {depth} + m0;")
            code.add(f"const int y0 = (l * {self.heads} + head) * {columns} + n0;", "__syncthreads();")
            self._tiles(code, group)
            code.add("__syncthreads();")
            self._multiply(code)
        self._store(code)
        return code

    def _tiles(self, code: Code, group: Group) -> None:
        each = THREADS // self.lanes
        with code.block(f"for (int i_row = threadIdx.x / G; i_row < {self.rows}; i_row += {each})"):
            code.add("const int r = first + i_row;")
            with code.block("if (r < end)"):
                code.lines += group.code.lines
            with code.block("else"):
                for name, stride, most in (("x", self.x_stride, self.tall), ("y", self.y_stride, self.wide)):
                    code.add(f"for (int i = lane; i < {most}; i += G) {name}_tile[i_row * {stride} + i] = 0.0f;")

    def _multiply(self, code: Code) -> None:
        some, panels = self.rows // self.shares, self.panels
        # Tensor cores cut off what float32 would round; sums over many rows are made by additions that round.
        code.add(f"float some[{panels}][4] = {{}};")
        code.add(
            f"multiply<{some}, {panels}, {self.step}, 1, {self.x_stride}, {self.y_stride}>(some, "
            f"x_tile + share * {some * self.x_stride} + warp_row, y_tile + share * {some * self.y_stride} + panel * 8, "
            f"{self.wide // 8} - panel, {self.rows});",
            "#pragma unroll",
            f"for (int t = 0; t < {4 * panels}; ++t) sums[t / 4][t % 4] += some[t / 4][t % 4];",
        )

    def _store(self, code: Code) -> None:
        """The sums of all warps into the workspace, those of shares of rows in order."""
        tall, wide = self.tall, self.wide
        code.add("__syncthreads();", "const int group = threadIdx.x % 32 / 4, slot = threadIdx.x % 4;")
        with code.block(f"for (int s = 0; s < {self.shares}; ++s)"):
            code.add("#pragma unroll")
            with code.block(f"for (int t = 0; t < {self.panels}; ++t)"):
                code.add("#pragma unroll")
                with code.block("for (int q = 0; q < 4 && s == share; ++q)"):
                    code.add(
                        f"float* to = x_tile + (warp_row + group + q / 2 * 8) * {wide + 1} "
                        f"+ (panel + t * {self.step}) * 8 + slot * 2 + q % 2;",
                        "*to = s ? *to + sums[t][q] : sums[t][q];",
                    )
            code.add("__syncthreads();")
        size = self.depth * self.columns
        code.add(f"float* to = workspace + (long long)work[blockIdx.x * 4 + 3] * {self.numbers} + head * {size};")
        with code.block(f"for (int i = threadIdx.x; i < {tall * wide}; i += {THREADS})"):
            code.add(f"const int m = m0 + i / {wide}, n = n0 + i % {wide};")
            code.add(f"const float sum = x_tile[i / {wide} * {wide + 1} + i % {wide}];")
            code.add(f"if (m < {self.depth} && n < {self.columns}) to[m * {self.columns} + n] = sum;")

    def _total(self) -> Code:
        code = Code()
        code.add("const int parts = items[blockIdx.x + 1] - items[blockIdx.x];")
        code.add(
            f"sum_parts(m_{self.name} + (long long)blockIdx.x * {self.numbers}, "
            f"workspace + (long long)items[blockIdx.x] * {self.numbers}, parts, {self.numbers}, {self.numbers});"
        )
        return code


def _put_part(group: Group, value: Value, place: str, most: int, first: str) -> None:
    if value.size > SMALL:
        own = group.spread(value)
        group.code.add(f"{group.spread_type(value.size)}::part<{most}>({place}, {own.name}, lane, {first});")
        return
    known = group.addressable(value)
    with group.code.block("if (lane == 0)"):
        for i in range(value.size):
            read = group.at(known, i)
            group.code.add(f"if ({i} >= {first} && {i} < {first} + {most}) {place}[{i} - {first}] = {read};")
