"""The schedule of elementwise code on GPUs: a thread for 16 bytes of the output, loads and stores as wide as that."""

from __future__ import annotations

import math
from typing import Any

from planish.runtime.kernels.template import import_tvm

THREADS = 256
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
    plain = _only_moves(tvm, body, built.get(block).iter_vars[-1].var if len(built.get(block).iter_vars) else None)
    cached = [] if plain or width == 1 else _in_order(tvm, built.get(block))
    lanes = None
    if width > 1:
        outer, lanes = built.split(loops[-1], [None, width])
        loops = [*loops[:-1], outer]
    flat = built.fuse(*loops) if len(loops) > 1 else loops[0]
    grid, thread = built.split(flat, [None, THREADS])
    built.bind(grid, "blockIdx.x")
    built.bind(thread, "threadIdx.x")
    if lanes is not None and plain:
        built.vectorize(lanes)
    elif lanes is not None:
        _through_registers(built, block, thread, cached)
        built.unroll(lanes)
    return built.mod["main"].with_attr(dict(function.attrs))


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


def _only_moves(tvm: Any, body: Any, last: Any) -> bool:
    """Whether elements are moved and nothing is computed of them, neighbours from one row."""
    value = body.value
    if not isinstance(value, tvm.ir.TensorLoad):
        return False
    return not any(_uses(tvm, load, last) for index in value.indices for load in _loads(tvm, index))


def _in_order(tvm: Any, block: Any) -> list[int]:
    """The inputs that are read at one place, at neighbours for neighbours of the output."""
    import tvm_ffi

    if any(str(call.op.name) == "tirx.if_then_else" for call in _found(tvm.ir.Call, block.body)):
        return []  # what it guards may lie outside of memory
    last = block.iter_vars[-1].var
    found = []
    for index, region in enumerate(block.reads):
        loads = [load for load in _loads(tvm, block.body) if load.source.same_as(region.source)]
        if not loads or not len(loads[0].indices):
            continue
        if not all(tvm_ffi.structural_equal(load.indices, loads[0].indices, True) for load in loads[1:]):
            continue
        *outer, inner = loads[0].indices
        moving = [_uses(tvm, item, last) or bool(_loads(tvm, item)) for item in outer]
        if inner.same_as(last) and not any(moving):
            found.append(index)
    return found


def _uses(tvm: Any, expression: Any, var: Any) -> bool:
    return any(item.same_as(var) for item in _found(tvm.ir.Var, expression))
