"""Chooses the schedules of kernels from statistics of a graph; each choice can be overridden."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from planish.ir.errors import InputError
from planish.ir.relational.intra import Kernel, Lowered, Schedule
from planish.ir.relational.statistics import Statistics

#: Numbers of both operands of a tile that should fit into the nearest cache beside a panel of weights.
_TILE_NUMBERS = 6144
_FIELDS = {f.name for f in fields(Schedule)}


def choose(lowered: Lowered, rows: Statistics, threads: int = 1, **overrides: Any) -> Lowered:
    """The same kernels with schedules.

    Args:
        lowered: kernels.
        rows: statistics of the graph.
        threads: that calls may use.
        overrides: fields of `Schedule`, for all kernels.

    Raises:
        InputError: an override that is no field of a schedule, or out of its range.
    """
    wrong = [name for name in overrides if name not in _FIELDS]
    if wrong:
        raise InputError(f"a schedule has no '{wrong[0]}'. Known: {', '.join(sorted(_FIELDS))}.")
    if not 1 <= int(overrides.get("tile_rows", 1)) <= 4096:
        raise InputError(f"tile_rows is {overrides['tile_rows']}; it must be between 1 and 4096.")
    if overrides.get("compute", "float32") not in ("float32", "bfloat16"):
        raise InputError(f"compute is '{overrides['compute']}'; it must be float32 or bfloat16.")
    steps = tuple(
        replace(step, schedule=replace(schedule(step, lowered, rows, threads), **overrides))
        if isinstance(step, Kernel)
        else step
        for step in lowered.steps
    )
    return replace(lowered, steps=steps)


def schedule(kernel: Kernel, lowered: Lowered, rows: Statistics, threads: int) -> Schedule:
    """What is chosen for one kernel."""
    adds = any(kernel.writes().values())
    parallel = threads > 1 and not adds
    if kernel.gemm is None:
        return Schedule(parallel=parallel)
    gemm = kernel.gemm
    width = math.prod(gemm.result.shape)
    if gemm.kind == "linear" and gemm.weight is not None:
        shape = lowered.values[gemm.weight].shape
        width += math.prod(gemm.result.shape[:-1]) * shape[-2]
    else:
        width = 2 * max(width, 1)
        width = min(width, 512)
    # Segments of a few rows need no more; with long ones, weights are read from the cache for as many rows as fit.
    most = max(12, _TILE_NUMBERS // max(width, 1) // 6 * 6)
    return Schedule(tile_rows=min(most, 96), parallel=parallel)
