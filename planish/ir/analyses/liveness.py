"""Liveness: from where to where each activation is needed, and the most that is needed at once.

Nodes run in the order of the graph, and a value is freed after its last use. As in ONNX Runtime, views (Reshape,
Squeeze, ...) have the memory of their operand, and an elementwise node writes over an operand of its size that
nothing reads afterwards; inputs of the graph are never written over, and outputs have memory of their own. What
kernels need inside is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.analyses.cost import entry_of
from planish.ir.analyses.sizes import Sizes
from planish.ir.graphs import subgraphs_of
from planish.ir.program import Program

#: Nodes whose result is their first operand with another shape.
_VIEWS = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
#: Nodes that ONNX Runtime lets write over an operand.
_IN_PLACE = frozenset(
    (
        *("Abs", "Add", "Ceil", "Clip", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"),
        *("LeakyRelu", "Log", "Mul", "Neg", "Not", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softmax", "Softplus"),
        *("Sqrt", "Sub", "Sum", "Tanh"),
    )
)


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
        shared: value name → the value whose memory it takes over, as a view or in place.
        unresolved: values whose size could not be told; they count as 0 bytes.
    """

    peak_bytes: int
    peak_node: str
    intervals: dict[str, Interval]
    curve: list[int]
    unresolved: list[str]
    shared: dict[str, str] = field(default_factory=dict)


def liveness(item: Program | ir.Model, *, dims: Mapping[str, int] | None = None, entry: str | None = None) -> Liveness:
    """Lifetimes and peak of one entry (by default ``"main"``, or the first one) at given sizes of the symbols."""
    model = entry_of(item, entry)
    sizes = Sizes(model, dims)
    nodes = list(model.graph)
    intervals = _intervals(model.graph, nodes, sizes, count_inputs=True)
    buffers, shared = _buffers(model.graph, nodes, intervals, sizes)
    curve = _curve(nodes, buffers, sizes)
    if not nodes:
        return Liveness(sum(i.bytes for i in intervals.values()), "", intervals, [], sizes.unresolved)
    top = max(range(len(nodes)), key=lambda i: curve[i])
    return Liveness(curve[top], nodes[top].name or "", intervals, curve, sizes.unresolved, shared)


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


def _buffers(
    graph: ir.Graph, nodes: list[ir.Node], intervals: Mapping[str, Interval], sizes: Sizes
) -> tuple[list[Interval], dict[str, str]]:
    """Blocks of memory, and the values that live in the block of another one."""
    blocks: list[Interval] = []
    block_of: dict[ir.Value, int] = {}
    shared: dict[str, str] = {}
    fixed = {value for value in graph.inputs if value.name in intervals}
    for value in fixed:
        block_of[value] = len(blocks)
        blocks.append(intervals[value.name or ""])
    for position, node in enumerate(nodes):
        for value in node.outputs:
            own = intervals.get(value.name or "")
            if own is None:
                continue
            source = _shares_with(node, value, position, blocks, block_of, fixed, sizes)
            if source is None:
                block_of[value] = len(blocks)
                blocks.append(own)
                continue
            shared[value.name or ""] = source.name or ""
            number = block_of[value] = block_of[source]
            block = blocks[number]
            blocks[number] = Interval(block.start, max(block.end, own.end), block.bytes)
    return blocks, shared


def _shares_with(
    node: ir.Node,
    value: ir.Value,
    position: int,
    blocks: list[Interval],
    block_of: Mapping[ir.Value, int],
    fixed: set[ir.Value],
    sizes: Sizes,
) -> ir.Value | None:
    """The operand whose memory the result of a node takes."""
    if value.is_graph_output() or node.domain not in ("", "com.microsoft"):
        return None
    size = sizes.nbytes(value)
    operands = [v for v in node.inputs if v is not None and v in block_of and sizes.nbytes(v) == size]
    if node.op_type in _VIEWS and operands and operands[0] is node.inputs[0]:
        return operands[0]
    if node.op_type not in _IN_PLACE or not size or value is not node.outputs[0]:
        return None
    inputs = {block_of[v] for v in fixed}
    free = (v for v in operands if blocks[block_of[v]].end == position and block_of[v] not in inputs)
    return next((v for v in free if not v.is_graph_output()), None)


def _curve(nodes: list[ir.Node], buffers: list[Interval], sizes: Sizes) -> list[int]:
    steps = [0] * (len(nodes) + 1)
    for interval in buffers:
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
    intervals = _intervals(graph, nodes, sizes, count_inputs=True)
    return max(_curve(nodes, _buffers(graph, nodes, intervals, sizes)[0], sizes), default=0)


def _reads(node: ir.Node) -> list[ir.Value]:
    """Operands of a node, and what the graphs inside of it take from outside."""
    values = [v for v in node.inputs if v is not None]
    for graph in subgraphs_of(node):
        for inner in graph:
            values += _reads(inner)
        values += list(graph.outputs)
    return values
