"""Traversals as CUDA kernels: a group of lanes for each row, or, where rows are few and long, parts and their sums."""

from __future__ import annotations

import math
from typing import Literal

from planish.ir.relational.domains import TYPES
from planish.ir.relational.intra import Loop
from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.rows import _JOIN, _START, REDUCTIONS, apart
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
from planish.runtime.cuda.relational.values import SMALL, Code, Same, Value

_POOL = "extern __shared__ float4 pool4[];"


def traversal(c: Context) -> Generated:
    """A kernel without a product."""
    serial = c.deterministic and c.adds
    loops = [item for item in c.items if isinstance(item, Loop)]
    if c.kernel.rows not in TYPES and not serial:
        return _by_groups(c, loops)
    if len(loops) == 1 and not serial:
        parts = _in_parts(c, loops[0])
        if parts is not None:
            text, launches, room = parts
            return finish(c, text, *_arguments(c), launches, segments=loops[0].pointers, room=room)
    return _by_blocks(c, serial)


def _arguments(c: Context) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(c.kernel.reads() | dict.fromkeys(c.kernel.writes())), tuple(c.kernel.tables())


def _by_groups(c: Context, loops: list[Loop]) -> Generated:
    """A group for each row; rows with many inner rows are left to blocks."""
    lanes = lanes_for(c)
    per = THREADS // lanes
    body = Code()
    group = Group(body, lanes)
    c.rows(group).emit(c.items, {})
    if 4 * group.spilled * per > MOST_SHARED:
        return _by_blocks(c, False)
    code = Code()
    code.add(*([_POOL] if group.spilled else []), *prologue(lanes, group, "reinterpret_cast<float*>(pool4)"))
    code.add(f"const int r = blockIdx.x * {per} + threadIdx.x / G;", "if (r >= count) return;")
    pointers = dict.fromkeys(loop.pointers for loop in loops)
    for table in pointers if len(pointers) == 1 else ():
        code.add(f"if (__ldg(t_{table} + r + 1) - __ldg(t_{table} + r) > {LONG}) return;  // blocks do those")
    code.lines += body.lines
    values, tables = _arguments(c)
    text = function("", parameters(c, values, tables), code)
    launches = [Launch("", "groups", per, shared=4 * group.spilled * per)]
    if len(pointers) != 1:
        return finish(c, text, values, tables, launches)
    parts = _in_parts(c, loops[0], "_long") if len(loops) == 1 else None
    if parts is not None:
        more, long, room = parts
        return finish(c, text + more, values, tables, [*launches, *long], long=loops[0].pointers, room=room)
    by_block, launch = _blocks(c, "_long", "listed")
    return finish(c, text + by_block, values, tables, [*launches, launch], long=loops[0].pointers)


def _by_blocks(c: Context, serial: bool) -> Generated:
    """A block for each row; `serial`: one block for all, which adds in the order of rows."""
    text, launch = _blocks(c, "", "one" if serial else "rows")
    return finish(c, text, *_arguments(c), [launch])


def _blocks(c: Context, name: str, grid: Literal["rows", "one", "listed"]) -> tuple[str, Launch]:
    body = Code(2)
    group = Group(body, THREADS)
    c.rows(group, add="increase" if grid == "one" else "add").emit(c.items, {})
    code = Code()
    code.add(_POOL, *prologue(THREADS, group, "reinterpret_cast<float*>(pool4)"))
    last = "(int)gridDim.x" if grid == "listed" else "count"
    with code.block(f"for (int row = blockIdx.x; row < {last}; row += gridDim.x)"):
        code.add(f"const int r = {'listed[row]' if grid == 'listed' else 'row'};")
        code.lines += body.lines
        code.add("__syncthreads();")
    return function(name, parameters(c, *_arguments(c)), code), Launch(name, grid, shared=4 * group.spilled)


def _in_parts(c: Context, loop: Loop, name: str = "") -> tuple[str, list[Launch], int] | None:
    """Rows with long loops: blocks work on parts of a loop, and a second kernel joins what they accumulated.

    Returns the text, the launches, and the numbers of the workspace for a part; None if shared memory is too small.
    """
    at = c.items.index(loop)
    before, after = c.items[:at], c.items[at + 1 :]
    given = parameters(c, *_arguments(c))
    offsets: dict[str, int] = {}
    room = 0
    for s in loop.body:
        if s.kind in REDUCTIONS:
            offsets[s.result.name] = room
            room += -(-math.prod(s.result.shape) // 4) * 4
    first, shared = _part(c, loop, before, offsets, room)
    if shared > MOST_SHARED:
        return None
    second = Code(1)
    group = Group(second, THREADS)
    rows = c.rows(group)
    rows.emit(before, {})
    for s in loop.body:
        if s.kind in REDUCTIONS:
            total = _joined(group, s.result.shape, s.kind, offsets[s.result.name], room)
            count = f"(__ldg(t_{loop.pointers} + r + 1) - __ldg(t_{loop.pointers} + r))"
            rows.known[s.result.name] = rows.finished(s.kind, total, count)
            if s.store is not None:
                group.store(rows.memory(s.store, s.result.shape).pointer, rows.known[s.result.name])
    rows.emit(after, rows.known)
    code = Code()
    code.add(_POOL, *prologue(THREADS, group, "reinterpret_cast<float*>(pool4)"))
    code.add("const int r = listed ? listed[blockIdx.x] : blockIdx.x;")
    code.add("const int first_part = items[blockIdx.x], last_part = items[blockIdx.x + 1];")
    code.lines += second.lines
    text = function(f"{name}_parts", given, first) + function(f"{name}_rows", given, code)
    grid: Literal["rows", "listed"] = "listed" if name else "rows"
    launches = [Launch(f"{name}_parts", "items", shared=shared), Launch(f"{name}_rows", grid, shared=4 * group.spilled)]
    return text, launches, max(room, 1)


def _part(c: Context, loop: Loop, before: tuple[object, ...], offsets: dict[str, int], room: int) -> tuple[Code, int]:
    """The kernel of the parts, and its bytes of shared memory: what each group accumulated, then room for groups."""
    lanes = lanes_for(c)
    groups = THREADS // lanes
    body = Code()
    group = Group(body, lanes)
    rows = c.rows(group, storing=False)
    rows.emit(before, {})  # type: ignore[arg-type]
    by_lane = apart(loop, c.shapes)
    if by_lane:
        sums = rows.walk(loop, "begin + threadIdx.x", "end", str(THREADS), True)
    else:
        sums = rows.walk(loop, "begin + threadIdx.x / G", "end", str(groups), False)
    for name, offset in offsets.items():
        group.store(f"(pool + threadIdx.x / G * {room} + {offset})", sums[name])
    body.add("__syncthreads();")
    for s in loop.body:
        if s.kind in REDUCTIONS:
            offset, size = offsets[s.result.name], math.prod(s.result.shape)
            with body.block(f"for (int i = threadIdx.x; i < {size}; i += {THREADS})"):
                body.add(f"float total = pool[{offset} + i];")
                body.add(f"for (int g = 1; g < {groups}; ++g)")
                body.add(f"    total = {_JOIN.get(s.kind, 'Plus')}::of(total, pool[g * {room} + {offset} + i]);")
                body.add(f"workspace[(long long)work[blockIdx.x * 4 + 3] * {max(room, 1)} + {offset} + i] = total;")
    code = Code()
    code.add(_POOL, "float* pool = reinterpret_cast<float*>(pool4);")
    code.add(*prologue(lanes, group, f"pool + {groups * room}"))
    code.add("const int r = work[blockIdx.x * 4], begin = work[blockIdx.x * 4 + 1], end = work[blockIdx.x * 4 + 2];")
    code.lines += body.lines
    return code, 4 * groups * (room + group.spilled)


def _joined(group: Group, shape: tuple[int, ...], kind: str, offset: int, room: int) -> Value:
    """What the parts of a row have accumulated, together."""
    join, start, code = _JOIN.get(kind, "Plus"), _START.get(kind, "0.0f"), group.code
    place = f"workspace + (long long)q * {room} + {offset}"
    if math.prod(shape) <= SMALL:
        total = group.each(shape, lambda _: start)
        assert isinstance(total, Same)
        with code.block("for (int q = first_part + lane; q < last_part; q += G)"):
            for k in range(total.size):
                code.add(f"{total.name}[{k}] = {join}::of({total.name}[{k}], *({place} + {k}));")
        for k in range(total.size):
            code.add(f"{total.name}[{k}] = join<{join}, G>({total.name}[{k}], mask);")
        return total

    def element(i: object) -> str:
        name = code.name("total")
        code.add(f"float {name} = {start};", "#pragma unroll 8")
        code.add(f"for (int q = first_part; q < last_part; ++q) {name} = {join}::of({name}, *({place} + {i}));")
        return name

    return group.each(shape, element)
