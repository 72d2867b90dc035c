"""The schedule of elementwise code on GPUs: a thread for 16 bytes of the output, loads and stores as wide as that."""

from __future__ import annotations

import math
from typing import Any

from planish.runtime.kernels.template import import_tvm

THREADS, WARP = 256, 32
#: Bytes that one instruction loads.
WIDEST = 16


def schedule(function: Any) -> Any:
    """One function with a single block."""
    tvm = import_tvm()
    from tvm import s_tir

    built = s_tir.Schedule(function)
    (block,) = built.get_child_blocks(built.get_sblock("root"))
    loops = list(built.get_loops(block))
    if not loops:
        loops = [built.add_unit_loop(block)]
    body = built.get(block).body
    last = built.get(loops[-1]).extent
    width = _width(tvm, last, body)
    plain = width > 1 and _only_moves(tvm, built.get(block), width)
    threads = THREADS
    if width > 1 and not plain:
        # What goes through registers has blocks of its own for loads and stores, whose bounds must need no check.
        extents = [built.get(loop).extent for loop in loops]
        while width > 1 and not (threads := _even(extents, width)):
            width //= 2
    cached = [] if plain or width == 1 else _in_order(tvm, built.get(block), width)
    lanes = None
    if width > 1:
        outer, lanes = built.split(loops[-1], [None, width])
        loops = [*loops[:-1], outer]
    flat = built.fuse(*loops) if len(loops) > 1 else loops[0]
    grid, thread = built.split(flat, [None, threads or THREADS])
    built.bind(grid, "blockIdx.x")
    built.bind(thread, "threadIdx.x")
    if lanes is not None and plain:
        built.vectorize(lanes)
    elif lanes is not None:
        _through_registers(built, block, thread, cached)
        built.unroll(lanes)
    return built.mod["main"].with_attr(dict(function.attrs))


def _even(extents: list[Any], width: int) -> int:
    """Threads of a block so that all blocks are full; 0 if there is no such number, or none that is large enough."""
    from tvm import tirx

    known = [int(extent) if isinstance(extent, tirx.IntImm) else None for extent in extents]
    assert known[-1] is not None
    count = known[-1] // width
    for extent in reversed(known[:-1]):
        if extent is None:
            break
        count *= extent
    fitting = [number for number in range(WARP, THREADS + 1) if count % number == 0]
    return max(fitting, key=lambda number: (number % WARP == 0, number), default=0)


def _through_registers(built: Any, block: Any, thread: Any, cached: list[int]) -> None:
    """Moves numbers between memory and registers in vectors, around a computation of one after the other."""
    for index in cached:
        copy = built.cache_read(block, index, "local")
        built.compute_at(copy, thread, preserve_unit_loops=True)
        built.vectorize(built.get_loops(copy)[-1])
    copy = built.cache_write(block, 0, "local")
    built.reverse_compute_at(copy, thread, preserve_unit_loops=True)
    built.vectorize(built.get_loops(copy)[-1])


def _width(tvm: Any, extent: Any, body: Any) -> int:
    """How many neighbours along the last axis a thread computes: what divides it, and fills 16 bytes at most."""
    if not isinstance(extent, tvm.tirx.IntImm):
        return 1
    inner = [load for load in _loads(tvm, body.value) for index in load.indices for load in _loads(tvm, index)]
    loads = [load for load in _loads(tvm, body.value) if not any(load.same_as(item) for item in inner)]
    dtypes = {str(item.ty.dtype) for item in (body.value, *loads)}
    if "bool" in dtypes:
        return 1
    widest = max(int(tvm.runtime.DataType(dtype).bits) // 8 for dtype in dtypes)
    return math.gcd(int(extent), WIDEST // widest)


def _loads(tvm: Any, body: Any) -> list[Any]:
    return _found(tvm.ir.TensorLoad, body)


def _found(kind: Any, body: Any) -> list[Any]:
    """All nodes of a kind in a statement or an expression."""
    import tvm_ffi

    found: list[Any] = []
    tvm_ffi.structural_walk(body, (kind, found.append), order="post")
    return found


def _only_moves(tvm: Any, block: Any, width: int) -> bool:
    """Whether elements are moved and nothing is computed of them, neighbours from neighbours."""
    value = block.body.value
    return isinstance(value, tvm.ir.TensorLoad) and _is_vector(tvm, value, block.iter_vars[-1].var, width)


def _in_order(tvm: Any, block: Any, width: int) -> list[int]:
    """The inputs that are read at one place, at neighbours for neighbours of the output."""
    import tvm_ffi

    if any(str(call.op.name) == "tirx.if_then_else" for call in _found(tvm.ir.Call, block.body)):
        return []  # what it guards may lie outside of memory
    last = block.iter_vars[-1].var
    found = []
    for index, region in enumerate(block.reads):
        loads = [load for load in _loads(tvm, block.body) if load.source.same_as(region.source)]
        if not loads or not all(tvm_ffi.structural_equal(load.indices, loads[0].indices, True) for load in loads[1:]):
            continue
        where = loads[0].indices
        if len(where) and not any(_loads(tvm, item) for item in where) and _is_vector(tvm, loads[0], last, width):
            found.append(index)
    return found


def _is_vector(tvm: Any, load: Any, last: Any, width: int) -> bool:
    """Whether neighbours along an axis read neighbours, the first of them at a multiple of `width`."""
    import tvm_ffi

    if not len(load.indices):
        return False
    *outer, inner = load.indices
    row = load.source.ty.shape[-1]
    if any(_uses(tvm, index, last) for index in outer) or _loads(tvm, inner):
        return False
    if outer and not (isinstance(row, tvm.tirx.IntImm) and int(row) % width == 0):
        return False

    def without(item: Any) -> Any:
        return tvm.tirx.IntImm(str(item.ty.dtype), 0) if item.same_as(last) else item

    analyzer = tvm.sym.Analyzer()
    first = analyzer.simplify(tvm_ffi.structural_map(inner, (tvm.ir.Var, without), order="post"))
    if not tvm_ffi.structural_equal(analyzer.simplify(inner - first), last, True):
        return False
    return bool(analyzer.can_prove_equal(tvm.tirx.floormod(first, width), 0))


def _uses(tvm: Any, expression: Any, var: Any) -> bool:
    return any(item.same_as(var) for item in _found(tvm.ir.Var, expression))
