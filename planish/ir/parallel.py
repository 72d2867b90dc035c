"""Programs that work on one model together, one on each device: what marks them, and the sum over all of them."""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.program import Program

#: (domain, operator): the sum of a tensor over all ranks. It is ONNX Runtime's, whose builds with NCCL have a kernel
#: for it; others refuse a model with it. `planish.runtime.parallel` runs it without one.
ALL_REDUCE = ("com.microsoft", "AllReduce")
#: Provenance of a program that is one of several: which it is, counted from 0, and how many there are.
RANK, RANKS = "rank", "ranks"
#: Metadata of an input or output that holds a part of what the whole program's holds: the axis, counted from the end.
SHARD_AXIS = "planish.shard_axis"


def is_all_reduce(node: ir.Node | None) -> bool:
    return node is not None and (node.domain, node.op_type) == ALL_REDUCE


def rank_of(program: Program) -> tuple[int, int]:
    """(rank, ranks) of a program; (0, 1) of one that works alone."""
    return int(program.provenance.get(RANK, "0")), int(program.provenance.get(RANKS, "1"))


def shard_axis(value: ir.Value) -> int | None:
    """The axis along which an input or output is one rank's part; None if it is the same on all ranks."""
    text = value.metadata_props.get(SHARD_AXIS)
    return int(text) if text is not None else None
