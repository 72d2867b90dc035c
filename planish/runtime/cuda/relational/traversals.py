"""Traversals as CUDA kernels: a group of lanes for each row, or, where rows are few and long, parts and their sums."""

from __future__ import annotations

import math

from planish.ir.relational.domains import TYPES
from planish.ir.relational.intra import Loop
from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.rows import _JOIN, _START, REDUCTIONS, apart
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
from planish.runtime.cuda.relational.values import SMALL, Code, Same, Value

_POOL = "extern __shared__ float4 pool4[];"


def traversal(c: Context) -> Generated:
    """A kernel without a product."""
    serial = c.deterministic and c.adds
    if c.kernel.rows not in TYPES and not serial:
        return _by_groups(c)
    loops = [item for item in c.items if isinstance(item, Loop)]
    if len(loops) == 1 and not serial and any(s.kind in REDUCTIONS or s.store for s in loops[0].body):
        return _in_parts(c, loops[0])
    return _by_blocks(c, serial)


def _arguments(c: Context) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(c.kernel.reads() | dict.fromkeys(c.kernel.writes())), tuple(c.kernel.tables())


def _by_groups(c: Context) -> Generated:
    lanes = lanes_for(c)
    body = Code()
    group = Group(body, lanes)
    c.rows(group).emit(c.items, {})
    code = Code()
    code.add(*([_POOL] if group.spilled else []), *prologue(lanes, group, "reinterpret_cast<float*>(pool4)"))
    code.add(f"const int r = blockIdx.x * {THREADS // lanes} + threadIdx.x / G;", "if (r >= count) return;")
    code.lines += body.lines
    values, tables = _arguments(c)
    text = function("", parameters(c, values, tables), code)
    per = THREADS // lanes
    if 4 * group.spilled * per > MOST_SHARED:
        return _by_blocks(c, False)
    return finish(c, text, values, tables, [Launch("", "groups", per, shared=4 * group.spilled * per)])


def _by_blocks(c: Context, serial: bool) -> Generated:
    """A block for each row; `serial`: one block for all, which adds in the order of rows."""
    body = Code(2)
    group = Group(body, THREADS)
    c.rows(group, add="increase" if serial else "add").emit(c.items, {})
    code = Code()
    code.add(_POOL, *prologue(THREADS, group, "reinterpret_cast<float*>(pool4)"))
    with code.block("for (int r = blockIdx.x; r < count; r += gridDim.x)"):
        code.lines += body.lines
        code.add("__syncthreads();")
    values, tables = _arguments(c)
    text = function("", parameters(c, values, tables), code)
    return finish(c, text, values, tables, [Launch("", "one" if serial else "rows", shared=4 * group.spilled)])


def _in_parts(c: Context, loop: Loop) -> Generated:
    """Few rows with long loops: blocks work on parts of a loop, and a second kernel joins what they accumulated."""
    at = c.items.index(loop)
    before, after = c.items[:at], c.items[at + 1 :]
    values, tables = _arguments(c)
    given = parameters(c, values, tables)
    offsets: dict[str, int] = {}
    room = 0
    for s in loop.body:
        if s.kind in REDUCTIONS:
            offsets[s.result.name] = room
            room += -(-math.prod(s.result.shape) // 4) * 4
    first, shared = _part(c, loop, before, offsets, room)
    if shared > MOST_SHARED:
        return _by_blocks(c, False)
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
    code.add(_POOL, *prologue(THREADS, group, "reinterpret_cast<float*>(pool4)"), "const int r = blockIdx.x;")
    code.lines += second.lines
    text = function("_parts", given, first) + function("", given, code)
    launches = [Launch("_parts", "items", shared=shared), Launch("", "rows", shared=4 * group.spilled)]
    return finish(c, text, values, tables, launches, segments=loop.pointers, item_rows=1, room=max(room, 1))


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
                body.add(f"workspace[(long long)blockIdx.x * {max(room, 1)} + {offset} + i] = total;")
    code = Code()
    code.add(_POOL, "float* pool = reinterpret_cast<float*>(pool4);")
    code.add(*prologue(lanes, group, f"pool + {groups * room}"))
    code.add("const int r = work[blockIdx.x * 3], begin = work[blockIdx.x * 3 + 1], end = work[blockIdx.x * 3 + 2];")
    code.lines += body.lines
    return code, 4 * groups * (room + group.spilled)


def _joined(group: Group, shape: tuple[int, ...], kind: str, offset: int, room: int) -> Value:
    """What the parts of a row have accumulated, together."""
    join, start, code = _JOIN.get(kind, "Plus"), _START.get(kind, "0.0f"), group.code
    place = f"workspace + (long long)q * {room} + {offset}"
    if math.prod(shape) <= SMALL:
        total = group.each(shape, lambda _: start)
        assert isinstance(total, Same)
        with code.block("for (int q = items[r] + lane; q < items[r + 1]; q += G)"):
            for k in range(total.size):
                code.add(f"{total.name}[{k}] = {join}::of({total.name}[{k}], *({place} + {k}));")
        for k in range(total.size):
            code.add(f"{total.name}[{k}] = join<{join}, G>({total.name}[{k}], mask);")
        return total

    def element(i: object) -> str:
        name = code.name("total")
        code.add(f"float {name} = {start};", "#pragma unroll 8")
        code.add(f"for (int q = items[r]; q < items[r + 1]; ++q) {name} = {join}::of({name}, *({place} + {i}));")
        return name

    return group.each(shape, element)
