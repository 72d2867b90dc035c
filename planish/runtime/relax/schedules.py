"""The schedule of elementwise code: one loop nest, parallel outside, vectors inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.template import import_tvm

#: Work below this many elements a row is not worth a vector loop.
_NARROW = 4
#: The attribute of functions that are scheduled already.
SCHEDULED = "tirx.is_scheduled"


def schedule_module(module: Any, schedule: Callable[[Any], Any]) -> Any:
    """A Relax module with every function of TIR scheduled that is not yet."""
    tvm = import_tvm()
    scheduled = tvm.IRModule(dict(module.functions.items()), attrs=module.attrs)
    for name, function in module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc) and SCHEDULED not in (function.attrs or {}):
            scheduled[name] = schedule(function)
    return scheduled


def schedule(function: Any, cpu: Cpu) -> Any:
    """One function: rows run in parallel, vectors within them."""
    import_tvm()
    from tvm import s_tir

    built = s_tir.Schedule(function)
    (block,) = built.get_child_blocks(built.get_sblock("root"))
    _nest(built, block, cpu)
    return built.mod["main"].with_attr(dict(function.attrs))


def _nest(built: Any, block: Any, cpu: Cpu) -> None:
    from tvm import tirx

    def extent(loop: Any) -> int | None:
        """The number of steps, or None if it is symbolic."""
        found = built.get(loop).extent
        return int(found) if isinstance(found, tirx.IntImm) else None

    loops = list(built.get_loops(block))
    if not loops:
        return
    # The inner loop: the last axis that has several elements, with what is behind it; a short one takes in the next.
    first = len(loops) - 1
    while first > 0 and all((extent(loop) or _NARROW) < _NARROW for loop in loops[first:]):
        first -= 1
    outer = loops[:first]
    inner = built.fuse(*loops[first:]) if len(loops) - first > 1 else loops[first]
    width = extent(inner)
    if width is not None and width >= cpu.lanes and width % cpu.lanes == 0:
        _, lanes = built.split(inner, [None, cpu.lanes])
        built.vectorize(lanes)
    if outer:
        built.parallel(built.fuse(*outer) if len(outer) > 1 else outer[0])
