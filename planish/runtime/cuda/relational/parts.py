"""Long loops of rows, cut into parts: blocks work on parts, and what these accumulated is joined in one order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from planish.ir.relational.intra import Loop
from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.rows import _JOIN, _START, REDUCTIONS, Rows, apart
from planish.runtime.cuda.relational.text import THREADS, Context, lanes_for, prologue
from planish.runtime.cuda.relational.values import Code, Memory, Value

POOL = "extern __shared__ float4 pool4[];"
#: What was joined, then room for joining.
JOINED = "float* joined = reinterpret_cast<float*>(pool4);"
#: A part: which of the rows, the inner rows from where to where, and its number.
PART = (
    "const int* part = work + blockIdx.x * 4;",
    "const int r = listed ? listed[part[0]] : part[0], begin = part[1], end = part[2];",
)


def places(loops: Sequence[Loop]) -> tuple[dict[str, int], int]:
    """Where what loops accumulate is among the numbers of a part, and how many numbers these are."""
    offsets: dict[str, int] = {}
    room = 0
    for s in (s for loop in loops for s in loop.body):
        if s.kind in REDUCTIONS:
            offsets[s.result.name] = room
            room += -(-math.prod(s.result.shape) // 4) * 4
    return offsets, max(room, 4)


def shared_walk(rows: Rows, loop: Loop, c: Context, begin: str, end: str) -> dict[str, Value]:
    """Inner rows by all groups of a block, in turn: what each has accumulated."""
    if apart(loop, c.shapes):
        return rows.walk(loop, f"{begin} + threadIdx.x", end, str(THREADS), True)
    return rows.walk(loop, f"{begin} + threadIdx.x / G", end, str(THREADS // rows.group.lanes), False)


def part(c: Context, loop: Loop, offsets: Mapping[str, int], room: int) -> tuple[Code, int]:
    """The kernel of the parts of a loop, and its bytes of shared memory: what was joined of loops before, what each
    group accumulated, then room for groups."""
    lanes = lanes_for(c)
    groups = THREADS // lanes
    body = Code()
    group = Group(body, lanes)
    rows = c.rows(group, storing=False)
    for item in c.items[: c.items.index(loop)]:
        if isinstance(item, Loop):
            join(rows, item, offsets, room)
        else:
            rows.emit([item], rows.known)
    sums = shared_walk(rows, loop, c, "begin", "end")
    reductions = [s for s in loop.body if s.kind in REDUCTIONS]
    for s in reductions:
        group.store(f"(pool + threadIdx.x / G * {room} + {offsets[s.result.name]})", sums[s.result.name])
    if reductions:
        body.add("__syncthreads();")
    for s in reductions:
        offset, size = offsets[s.result.name], math.prod(s.result.shape)
        with body.block(f"for (int i = threadIdx.x; i < {size}; i += {THREADS})"):
            body.add(f"float total = pool[{offset} + i];")
            body.add(f"for (int g = 1; g < {groups}; ++g)")
            body.add(f"    total = {_JOIN.get(s.kind, 'Plus')}::of(total, pool[g * {room} + {offset} + i]);")
            body.add(f"workspace[(long long)part[3] * {room} + {offset} + i] = total;")
    code = Code()
    code.add(POOL, JOINED, f"float* pool = joined + {room + THREADS};", "(void)joined;")
    code.add(*prologue(lanes, group, f"pool + {groups * room}"))
    code.add(*PART)
    code.add("const int first_part = items[part[0]], parts_here = items[part[0] + 1] - first_part;")
    code.add("(void)first_part, (void)parts_here;")
    code.lines += body.lines
    return code, 4 * (room + THREADS + groups * (room + group.spilled))


def join(rows: Rows, loop: Loop, offsets: Mapping[str, int], room: int) -> None:
    """What the parts of a row have accumulated in a loop, by all threads of a block; the row's values from then on."""
    group = rows.group
    for s in loop.body:
        if s.kind not in REDUCTIONS:
            continue
        shape, offset = s.result.shape, offsets[s.result.name]
        group.code.add(
            f"join_parts<{_JOIN.get(s.kind, 'Plus')}, {THREADS}>(joined + {offset}, joined + {room}, workspace + "
            f"(long long)first_part * {room} + {offset}, parts_here, {room}, {math.prod(shape)}, "
            f"{_START.get(s.kind, '0.0f')});"
        )
        count = f"(__ldg(t_{loop.pointers} + r + 1) - __ldg(t_{loop.pointers} + r))"
        rows.known[s.result.name] = rows.finished(s.kind, Memory(shape, f"(joined + {offset})", False, 4), count)
        if s.store is not None and rows.storing:
            group.store(rows.memory(s.store, shape).pointer, rows.known[s.result.name])
