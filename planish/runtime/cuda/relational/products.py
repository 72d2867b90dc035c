"""Segment GEMMs as CUDA kernels: rows are gathered and reduced into a tile in shared memory, multiplied, taken on."""

from __future__ import annotations

import math

from planish.ir.errors import UnsupportedError
from planish.ir.relational.intra import Access, Loop
from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.text import (
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
from planish.runtime.cuda.relational.values import Code, Memory

_WARPS = THREADS // 32
#: Rows of a step of an outer product, and its most rows and columns in one block.
_OUTER_ROWS, _OUTER_TILE = 32, 64
_PREFETCH = "now"
_MOST_DEPTH, _MOST_COLUMNS = 64, 128


def _round(number: int, to: int) -> int:
    return -(-number // to) * to


def _banked(columns: int) -> int:
    """A stride by which four consecutive rows of panels lie in different banks."""
    return columns if columns % 16 == 8 else _round(columns, 16) + 8


def product(c: Context) -> Generated:
    """A kernel with a product."""
    gemm = c.kernel.gemm
    assert gemm is not None
    if c.deterministic and c.adds:
        raise AssertionError("products add to rows, and were to be deterministic: lower without scatter")
    return _linear(c) if gemm.kind == "linear" else _outer(c)


def _tile_lines(c: Context, rows: str) -> list[str]:
    """What rows of a tile lead to, looked up by all threads at once."""
    if not c.cached:
        return []
    lines = [f"for (int i = threadIdx.x; i < {rows}; i += {THREADS}) {{"]
    for number, chain in enumerate(c.cached):
        index = "first + i"
        for table in chain:
            index = f"__ldg(t_{table} + {index})"
        lines.append(f"    rows_of[{number}][i] = {index};")
    return [*lines, "}", "__syncthreads();"]


def _prefetch(c: Context, first: str, rows: str) -> list[str]:
    """Asks for the first of the rows that each row of a tile reads, all at once: what leads there takes as long."""
    lines: list[str] = []
    for item in c.kernel.before:
        if not isinstance(item, Loop):
            continue
        wanted: list[Access] = []
        for statement in item.body:
            for a in statement.operands:
                if a.level == "inner" and not a.local and not a.one and math.prod(c.shapes[a.value].shape) >= 32:
                    wanted.append(a)
        if not wanted:
            continue
        lines += [
            f"for (int i = threadIdx.x; i < {rows}; i += {THREADS}) {{",
            f"    const int p = __ldg(t_{item.pointers} + {first} + i);",
            f"    if (p < __ldg(t_{item.pointers} + {first} + i + 1)) {{",
            f"        const int e = {f'__ldg(t_{item.rows} + p)' if item.rows else 'p'};",
        ]
        for a in dict.fromkeys(wanted):
            index = "e"
            for table in a.tables:
                index = f"__ldg(t_{table} + {index})"
            size = math.prod(c.shapes[a.value].shape)
            lines.append(f"        prefetch<{size}>(m_{a.value} + (long long){index} * {size});")
        lines += ["    }", "}"]
    return lines


def _linear(c: Context) -> Generated:
    kernel, gemm = c.kernel, c.kernel.gemm
    assert gemm is not None and gemm.weight is not None
    weight, result = c.shapes[gemm.weight].shape, gemm.result.shape
    depth, columns = weight[-2:]
    parts, heads = math.prod(result[:-1]), max(gemm.heads, 1)
    wide_x, wide_y = parts * depth, parts * columns
    deep, panels = min(_round(depth, 8), _MOST_DEPTH), min(_round(columns, 8), _MOST_COLUMNS)
    x_stride, y_stride, w_stride = _round(wide_x, 8) + 4, _round(wide_y, 8) + 4, _banked(panels)
    over = parts == 1 and columns <= _MOST_COLUMNS  # the result takes the place of the left operand
    resident = heads == 1 and columns <= _MOST_COLUMNS and depth <= _MOST_DEPTH
    lanes = lanes_for(c)
    groups = THREADS // lanes
    before, after = Code(3), Code(3)
    group = Group(before, lanes)
    rows = c.rows(group, tile=True)
    known = rows.emit(kernel.before, {})
    x = known[gemm.x.value] if gemm.x.local else rows.read(gemm.x)
    group.store(f"(x_tile + i_row * {x_stride})", x)
    then = Group(after, lanes)
    then.types, then.spilled = group.types, group.spilled
    rows = c.rows(then, tile=True)
    y = Memory(result, f"(y_tile + i_row * {y_stride})", False, 4)
    rows.emit(kernel.after, {gemm.result.name: y})
    if gemm.store is not None:
        then.store(rows.memory(gemm.store, result).pointer, y)
    scratch = then.spilled

    def numbers(tile: int) -> int:
        x_size = tile * max(x_stride, y_stride) if over else tile * (x_stride + y_stride)
        return x_size + deep * w_stride + len(c.cached) * tile + groups * scratch

    tile = next((t for t in (64, 32, 16) if 4 * numbers(t) <= MOST_SHARED), 0)
    if not tile:
        raise UnsupportedError(
            f"'{kernel.name}': rows of {wide_x} and {wide_y} numbers in {4 * numbers(16)} bytes of shared memory; "
            f"CUDA kernels use {MOST_SHARED}. Use smaller features or fewer heads."
        )
    by_rows = tile // 16
    step = _WARPS // by_rows
    tiles_x = tile * (max(x_stride, y_stride) if over else x_stride)
    code = Code()
    code.add("extern __shared__ float4 pool4[];", "float* x_tile = reinterpret_cast<float*>(pool4);")
    code.add("float* y_tile = x_tile;" if over else f"float* y_tile = x_tile + {tiles_x};")
    code.add(f"float* weights = x_tile + {tiles_x if over else tile * (x_stride + y_stride)};")
    code.add(f"int (*rows_of)[{tile}] = reinterpret_cast<int (*)[{tile}]>(weights + {deep * w_stride});")
    code.add(*prologue(lanes, then, f"weights + {deep * w_stride + len(c.cached) * tile}"))
    code.add(
        "const int segment = work[blockIdx.x * 4], begin = work[blockIdx.x * 4 + 1], end = work[blockIdx.x * 4 + 2];"
    )
    code.add(f"const float* matrix = m_{gemm.weight} + (long long)segment * {math.prod(weight)};")
    code.add(f"const int warp = threadIdx.x / 32, warp_row = warp % {by_rows} * 16, panel = warp / {by_rows};")
    code.add("(void)rows_of, (void)count, (void)items, (void)workspace;")
    load = f"load_matrix<{deep}, {panels}, {w_stride}, {THREADS}>(weights, matrix"
    if resident:
        code.add(f"{load}, {depth}, {columns}, 0, 0);")
    with code.block(f"for (int first = begin; first < end; first += {tile})"):
        code.add(f"const int rows_here = min({tile}, end - first);", "__syncthreads();")
        if _PREFETCH == "now":
            code.add(*_prefetch(c, "first", "rows_here"))
        code.add(*_tile_lines(c, "rows_here"))
        with code.block(f"for (int i_row = threadIdx.x / G; i_row < rows_here; i_row += {groups})"):
            code.add("const int r = first + i_row;", "(void)r;")
            code.lines += before.lines
        if _PREFETCH == "next":
            code.add(*_prefetch(c, f"first + {tile}", f"min({tile}, end - first - {tile})"))
        code.add("__syncthreads();")
        _multiplication(
            code,
            load,
            (depth, columns, deep, panels),
            (parts, heads, step),
            (x_stride, y_stride, w_stride),
            over,
            resident,
        )
        code.add("__syncthreads();")
        with code.block(f"for (int i_row = threadIdx.x / G; i_row < rows_here; i_row += {groups})"):
            code.add("const int r = first + i_row;", "(void)r;")
            code.lines += after.lines
    values, tables = tuple(kernel.reads() | dict.fromkeys(kernel.writes())), tuple(kernel.tables())
    text = function("", parameters(c, values, tables), code)
    launch = Launch("", "items", shared=4 * numbers(tile))
    return finish(c, text, values, tables, [launch], segments=gemm.segments or "", item_rows=tile)


def _multiplication(
    code: Code,
    load: str,
    sizes: tuple[int, int, int, int],
    counts: tuple[int, int, int],
    stride: tuple[int, int, int],
    over: bool,
    resident: bool,
) -> None:
    depth, columns, deep, panels = sizes
    parts, heads, step = counts
    each = -(-(panels // 8) // step)
    loops = (f"for (int part = 0; part < {parts}; ++part)", f"for (int n0 = 0; n0 < {columns}; n0 += {panels})")
    with code.block(loops[0]), code.block(loops[1]):
        code.add(f"float sums[{each}][4] = {{}};")
        with code.block(f"for (int k0 = 0; k0 < {depth}; k0 += {deep})"):
            if not resident:
                head = f" + part % {heads} * {depth * columns}" if heads > 1 else ""
                code.add("__syncthreads();", f"{load}{head}, {depth}, {columns}, k0, n0);", "__syncthreads();")
            code.add(
                f"multiply<{deep}, {each}, {step}, {stride[0]}, 1, {stride[2]}>(sums, "
                f"x_tile + warp_row * {stride[0]} + part * {depth} + k0, weights + panel * 8, "
                f"{panels // 8} - panel, {depth} - k0);"
            )
        if over:
            code.add("__syncthreads();")
        code.add(
            f"put_sums<{each}, {step}>(sums, y_tile + warp_row * {stride[1]} + part * {columns} + n0 + panel * 8, "
            f"{stride[1]}, min({columns} - n0, {panels}) - panel * 8);"
        )


def _outer(c: Context) -> Generated:
    kernel, gemm = c.kernel, c.kernel.gemm
    assert gemm is not None and gemm.y is not None
    shape = gemm.result.shape
    depth, columns = shape[-2:]
    heads = max(gemm.heads, 1)
    width = {name: math.prod(c.shape(access)) for name, access in (("x", gemm.x), ("y", gemm.y))}
    leading = width["x"] // (heads * depth)
    tall = next(n for n in (16, 32, 64) if n >= depth or n == _OUTER_TILE)
    wide = next(n for n in (8, 16, 32, 64) if n >= columns or n == _OUTER_TILE)
    blocks = (-(-depth // tall), -(-columns // wide))
    by_rows = tall // 16
    step = min(wide // 8, _WARPS // by_rows)
    deep = _WARPS // (by_rows * step)  # warps that share rows of a step
    steps = max(_OUTER_ROWS, 8 * deep)
    x_stride, y_stride = _banked(tall), _banked(wide)
    lanes = lanes_for(c)
    groups = THREADS // lanes
    body = Code(4)
    group = Group(body, lanes)
    rows = c.rows(group)
    known = rows.emit(kernel.before, {})
    for name, access, stride, most in (("x", gemm.x, x_stride, tall), ("y", gemm.y, y_stride, wide)):
        value = known[access.value] if access.local else rows.read(access)
        _put_part(group, value, f"({name}_tile + i_row * {stride})", most, f"{name}0")
    if kernel.after:
        with body.block("if (blockIdx.y == 0 && l == 0)"):
            rows.emit(kernel.after, {})
    code = Code()
    x_size, y_size = steps * x_stride, steps * y_stride
    pool = max(x_size + y_size, tall * (wide + 1))
    code.add("extern __shared__ float4 pool4[];", "float* x_tile = reinterpret_cast<float*>(pool4);")
    code.add(f"float* y_tile = x_tile + {x_size};", *prologue(lanes, group, f"x_tile + {_round(pool, 4)}"))
    code.add("const int begin = work[blockIdx.x * 4 + 1], end = work[blockIdx.x * 4 + 2];")
    code.add(f"const int head = blockIdx.y / {blocks[0] * blocks[1]};")
    code.add(f"const int m0 = blockIdx.y / {blocks[1]} % {blocks[0]} * {tall}, n0 = blockIdx.y % {blocks[1]} * {wide};")
    code.add(f"const int warp = threadIdx.x / 32, warp_row = warp % {by_rows} * 16;")
    code.add(f"const int panel = warp / {by_rows} % {step}, share = warp / {by_rows * step};")
    code.add(f"float sums[{wide // 8 // step}][4] = {{}};")
    loops = (f"for (int first = begin; first < end; first += {steps})", f"for (int l = 0; l < {leading}; ++l)")
    with code.block(loops[0]), code.block(loops[1]):
        code.add(f"const int x0 = (l * {heads} + head) * {depth} + m0, y0 = (l * {heads} + head) * {columns} + n0;")
        code.add("__syncthreads();")
        with code.block(f"for (int i_row = threadIdx.x / G; i_row < {steps}; i_row += {groups})"):
            code.add("const int r = first + i_row;")
            with code.block("if (r < end)", "} else {"):
                code.lines += body.lines
            code.depth += 1
            code.add(f"for (int i = lane; i < {tall}; i += G) x_tile[i_row * {x_stride} + i] = 0.0f;")
            code.add(f"for (int i = lane; i < {wide}; i += G) y_tile[i_row * {y_stride} + i] = 0.0f;")
            code.depth -= 1
            code.add("}")
        code.add("__syncthreads();")
        # Tensor cores cut off what float32 would round; sums over many rows are made by additions that round.
        code.add(f"float some[{wide // 8 // step}][4] = {{}};")
        code.add(
            f"multiply<{steps // deep}, {wide // 8 // step}, {step}, 1, {x_stride}, {y_stride}>(some, "
            f"x_tile + share * {steps // deep * x_stride} + warp_row, "
            f"y_tile + share * {steps // deep * y_stride} + panel * 8, "
            f"{wide // 8} - panel, {steps});",
            "#pragma unroll",
            f"for (int t = 0; t < {4 * (wide // 8 // step)}; ++t) sums[t / 4][t % 4] += some[t / 4][t % 4];",
        )
    _put_outer(code, (depth, columns), (tall, wide), step, deep, math.prod(shape))
    values = tuple(kernel.reads() | dict.fromkeys(kernel.writes()))
    tables = tuple(kernel.tables())
    given = parameters(c, values, tables)
    total = Code()
    numbers = math.prod(shape)
    total.add("const int parts = items[blockIdx.x + 1] - items[blockIdx.x];")
    total.add(
        f"sum_parts(m_{gemm.result.name} + (long long)blockIdx.x * {numbers}, "
        f"workspace + (long long)items[blockIdx.x] * {numbers}, parts, {numbers}, {numbers});"
    )
    text = function("_parts", given, code) + function("", given, total)
    shared = 4 * (_round(pool, 4) + groups * group.spilled)
    launches = [
        Launch("_parts", "items", columns=heads * blocks[0] * blocks[1], shared=shared),
        Launch("", "rows", columns=-(-numbers // 32)),
    ]
    return finish(c, text, values, tables, launches, segments=gemm.segments or "", item_rows=steps, room=numbers)


def _put_part(group: Group, value: object, place: str, most: int, first: str) -> None:
    from planish.runtime.cuda.relational.values import SMALL, Value

    assert isinstance(value, Value)
    if value.size > SMALL:
        own = group.spread(value)
        group.code.add(f"{group.spread_type(value.size)}::part<{most}>({place}, {own.name}, lane, {first});")
        return
    known = group.addressable(value)
    with group.code.block("if (lane == 0)"):
        for i in range(value.size):
            read = group.at(known, i)
            group.code.add(f"if ({i} >= {first} && {i} < {first} + {most}) {place}[{i} - {first}] = {read};")


def _put_outer(code: Code, sizes: tuple[int, int], tile: tuple[int, int], step: int, deep: int, numbers: int) -> None:
    """The sums of all warps into the workspace, those of shares of rows in order."""
    (depth, columns), (tall, wide) = sizes, tile
    code.add("__syncthreads();", "const int group = threadIdx.x % 32 / 4, slot = threadIdx.x % 4;")
    with code.block(f"for (int s = 0; s < {deep}; ++s)"):
        code.add("#pragma unroll")
        with code.block(f"for (int t = 0; t < {wide // 8 // step}; ++t)"):
            code.add("#pragma unroll")
            with code.block("for (int q = 0; q < 4 && s == share; ++q)"):
                code.add(
                    f"float* to = x_tile + (warp_row + group + q / 2 * 8) * {wide + 1} "
                    f"+ (panel + t * {step}) * 8 + slot * 2 + q % 2;"
                )
                code.add("*to = s ? *to + sums[t][q] : sums[t][q];")
        code.add("__syncthreads();")
    code.add(f"float* to = workspace + (long long)work[blockIdx.x * 4 + 3] * {numbers} + head * {depth * columns};")
    with code.block(f"for (int i = threadIdx.x; i < {tall * wide}; i += {THREADS})"):
        code.add(f"const int m = m0 + i / {wide}, n = n0 + i % {wide};")
        code.add(
            f"if (m < {depth} && n < {columns}) to[m * {columns} + n] = x_tile[i / {wide} * {wide + 1} + i % {wide}];"
        )
