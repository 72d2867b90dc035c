"""How much memory a piece of a model takes while it runs, beside its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from planish.ir.analyses.liveness import Interval, liveness
from planish.runtime.ort import with_bodies


def workspace(model: ir.Model, dims: Mapping[str, int]) -> int:
    """Most bytes of inner values that are live at once, by liveness, and of what nodes need inside, at these sizes.

    Raises:
        ValueError: the size of a value can not be told.
    """
    model = _inlined(model)
    found = liveness(model, dims=dims)
    if found.unresolved:
        raise ValueError(f"the size of '{found.unresolved[0]}' is not known")
    outside = {v.name for v in (*model.graph.inputs, *model.graph.outputs)}
    ends: dict[str, int] = {}
    for name, interval in found.intervals.items():  # what takes over memory makes its owner live longer
        owner = name
        while owner in found.shared:
            owner = found.shared[owner]
        ends[owner] = max(ends.get(owner, 0), interval.end)
    steps = [0] * (len(found.curve) + 1)
    for owner, end in ends.items():
        if owner not in outside:
            steps[found.intervals[owner].start] += found.intervals[owner].bytes
            steps[end + 1] -= found.intervals[owner].bytes
    inside = [*(_inside(node, found.intervals) for node in model.graph), 0]
    live = peak = 0
    for step, more in zip(steps, inside, strict=True):
        live += step
        peak = max(peak, live + more)
    return peak


def _inside(node: ir.Node, intervals: Mapping[str, Interval]) -> int:
    """What a node takes while it runs: MatMulNBits restores its weight on CUDA, unless it has one row."""
    x = node.inputs[0] if (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits") else None
    if x is None or x.dtype is None or x.name is None or x.name not in intervals:
        return 0
    n, k, block = (node.attributes[name].as_int() for name in ("N", "K", "block_size"))
    item = int(x.dtype.itemsize)
    rows = intervals[x.name].bytes // (k * item)
    return n * -(-k // block) * block * item if rows > 1 else 0


def _inlined(model: ir.Model) -> ir.Model:
    """The model with the bodies of its functions in their places, as ONNX Runtime runs what it has no kernel for."""
    model = with_bodies(model).clone()
    if model.functions:
        InlinePass()(model)
    return model
