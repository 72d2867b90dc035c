"""Liveness: from where to where each activation is needed, and the most that is needed at once.

Nodes run in the order of the graph, every result has memory of its own (no reuse in place, no views), and a
value is freed after its last use. A runtime that plans better needs less; the figure compares programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from planish.ir.analyses.cost import entry_of
from planish.ir.analyses.sizes import Sizes
from planish.ir.graphs import subgraphs_of
from planish.ir.program import Program


@dataclass(frozen=True)
class Interval:
    """A value is live from the node at position `start` to the one at `end`, both included."""

    start: int
    end: int
    bytes: int


@dataclass
class Liveness:
    """Lifetimes in the main graph of an entry.

    Attributes:
        peak_bytes: most bytes of activations live at one node; inputs count throughout (the caller holds them),
            weights and constants do not count.
        peak_node: name of the node where that is; "" for a graph without nodes.
        intervals: value name → where it is live. Positions count the nodes of the main graph; inputs start at 0.
        curve: live bytes at each node.
        unresolved: values whose size could not be told; they count as 0 bytes.
    """

    peak_bytes: int
    peak_node: str
    intervals: dict[str, Interval]
    curve: list[int]
    unresolved: list[str]


def liveness(item: Program | ir.Model, *, dims: Mapping[str, int] | None = None, entry: str | None = None) -> Liveness:
    """Lifetimes and peak of one entry (by default ``"main"``, or the first one) at given sizes of the symbols."""
    model = entry_of(item, entry)
    sizes = Sizes(model, dims)
    nodes = list(model.graph)
    intervals = _intervals(model.graph, nodes, sizes, count_inputs=True)
    curve = _curve(nodes, intervals, sizes)
    if not nodes:
        return Liveness(sum(i.bytes for i in intervals.values()), "", intervals, [], sizes.unresolved)
    top = max(range(len(nodes)), key=lambda i: curve[i])
    return Liveness(curve[top], nodes[top].name or "", intervals, curve, sizes.unresolved)


def _intervals(graph: ir.Graph, nodes: list[ir.Node], sizes: Sizes, *, count_inputs: bool) -> dict[str, Interval]:
    last = len(nodes) - 1
    ends: dict[ir.Value, int] = {}
    for position, node in enumerate(nodes):
        for value in _reads(node):
            ends[value] = position
    for value in graph.outputs:
        ends[value] = last
    result = {}
    for value in graph.inputs if count_inputs else ():
        if value.name not in graph.initializers:
            result[value.name or ""] = Interval(0, max(last, 0), sizes.nbytes(value))
    for position, node in enumerate(nodes):
        if node.op_type == "Constant" and not node.domain:
            continue
        for value in node.outputs:
            if value.name:
                result[value.name] = Interval(position, ends.get(value, position), sizes.nbytes(value))
    return result


def _curve(nodes: list[ir.Node], intervals: Mapping[str, Interval], sizes: Sizes) -> list[int]:
    steps = [0] * (len(nodes) + 1)
    for interval in intervals.values():
        steps[interval.start] += interval.bytes
        if nodes:
            steps[interval.end + 1] -= interval.bytes
    curve, live = [], 0
    for position, node in enumerate(nodes):
        live += steps[position]
        curve.append(live + max((_body_peak(g, sizes) for g in subgraphs_of(node)), default=0))
    return curve


def _body_peak(graph: ir.Graph, sizes: Sizes) -> int:
    nodes = list(graph)
    return max(_curve(nodes, _intervals(graph, nodes, sizes, count_inputs=True), sizes), default=0)


def _reads(node: ir.Node) -> list[ir.Value]:
    """Operands of a node, and what the graphs inside of it take from outside."""
    values = [v for v in node.inputs if v is not None]
    for graph in subgraphs_of(node):
        for inner in graph:
            values += _reads(inner)
        values += list(graph.outputs)
    return values
