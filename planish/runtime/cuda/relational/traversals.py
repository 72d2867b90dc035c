"""Traversals as CUDA kernels: a group of lanes for each row, or, where rows are few and long, parts and their sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from planish.ir.relational.domains import TYPES
from planish.ir.relational.intra import Loop
from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.parts import JOINED, POOL, join, part, places
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
from planish.runtime.cuda.relational.values import Code


def traversal(c: Context) -> Generated:
    """A kernel without a product."""
    serial = c.deterministic and c.adds
    loops = [item for item in c.items if isinstance(item, Loop)]
    if c.kernel.rows not in TYPES and not serial:
        return _by_groups(c, loops)
    if len(loops) == 1 and not serial:
        parts = _in_parts(c, loops)
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
    code.add(*([POOL] if group.spilled else []), *prologue(lanes, group, "reinterpret_cast<float*>(pool4)"))
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
    parts = _in_parts(c, loops, "_long")
    if parts is not None:
        more, long, room = parts
        return finish(c, text + more, values, tables, [*launches, *long], long=loops[0].pointers, long_room=room)
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
    code.add(POOL, *prologue(THREADS, group, "reinterpret_cast<float*>(pool4)"))
    last = "(int)gridDim.x" if grid == "listed" else "count"
    with code.block(f"for (int row = blockIdx.x; row < {last}; row += gridDim.x)"):
        code.add(f"const int r = {'listed[row]' if grid == 'listed' else 'row'};")
        code.lines += body.lines
        code.add("__syncthreads();")
    return function(name, parameters(c, *_arguments(c)), code), Launch(name, grid, shared=4 * group.spilled)


def _in_parts(c: Context, loops: Sequence[Loop], name: str = "") -> tuple[str, list[Launch], int] | None:
    """Rows with long loops: blocks work on parts of a loop, and what these accumulated is joined, always in one order.

    There is a kernel for each loop, whose blocks first join what the parts of the loops before have, and a last one for
    what follows the loops. All loops are over the same inner rows.

    Returns the text, the launches, and the numbers of the workspace for a part; None if shared memory is too small.
    """
    offsets, room = places(loops)
    given = parameters(c, *_arguments(c))
    text, launches = "", []
    for number, loop in enumerate(loops):
        code, shared = part(c, loop, offsets, room)
        if shared > MOST_SHARED:
            return None
        launches.append(Launch(f"{name}_parts{number or ''}", "parts" if name else "items", shared=shared))
        text += function(launches[-1].function, given, code)
    code, shared = _finish_rows(c, offsets, room)
    grid: Literal["rows", "listed"] = "listed" if name else "rows"
    launches.append(Launch(f"{name}_rows", grid, shared=shared))
    return text + function(launches[-1].function, given, code), launches, room


def _finish_rows(c: Context, offsets: Mapping[str, int], room: int) -> tuple[Code, int]:
    """The kernel that joins the parts of a row, and does the rest of it; and its bytes of shared memory."""
    body = Code()
    group = Group(body, THREADS)
    rows = c.rows(group)
    for item in c.items:
        if isinstance(item, Loop):
            join(rows, item, offsets, room)
        else:
            rows.emit([item], rows.known)
    code = Code()
    code.add(POOL, JOINED, *prologue(THREADS, group, f"joined + {room + THREADS}"))
    code.add("const int r = listed ? listed[blockIdx.x] : blockIdx.x;")
    code.add("const int first_part = items[blockIdx.x], parts_here = items[blockIdx.x + 1] - first_part;")
    code.lines += body.lines
    return code, 4 * (room + THREADS + group.spilled)
