"""What the segments of a stream are: which hold attention, which add a branch to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from planish.ir.analyses.stream import Flow, Stream, static_dims
from planish.ir.graphs import is_op, subgraphs_of

#: Operators between the product of queries and keys and its softmax.
_SCORE_OPS = frozenset(
    ("Add", "Sum", "Sub", "Mul", "Div", "Where", "Tanh", "Clip", "Max", "Min", "Cast", "CastLike")
) | frozenset(("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Slice"))
_ADDS = ("Add", "Sum")
_PRODUCTS = frozenset(
    ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Gather", "LSTM", "GRU", "RNN")
) | frozenset(("MatMulInteger", "ConvInteger"))
#: Views and casts: a residual stream that goes through one is still the same stream.
_VIEWS = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"))

Signature = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Part:
    """A branch of the residual stream: what attention, or the feed-forward network, adds to it.

    Attributes:
        kind: ``attention``, ``cross-attention``, ``ffn``, ``moe``, ``conv`` or ``mixer`` (anything else).
        nodes: the nodes that only this branch needs, in order of execution.
        add: the node that adds `branch`; its other operand is what is left without the part.
        branch: what is added.
        stream_in, stream_out: the residual stream before and after the segment.
        parallel: another branch starts at the same `stream_in` and is added to it too.
        parameters: numbers in the weights that its nodes read.
        rest: the operand that carries the stream: `stream_in`, or a view of it.
        shared_bias: constants are added in one go with several branches.
    """

    kind: str
    nodes: tuple[ir.Node, ...]
    add: ir.Node
    branch: ir.Value
    stream_in: ir.Value
    stream_out: ir.Value
    rest: ir.Value
    parallel: bool = False
    parameters: int = 0
    shared_bias: bool = False

    def to_dict(self) -> dict[str, object]:
        facts = {"kind": self.kind, "nodes": len(self.nodes), "parameters": self.parameters}
        return facts | {"parallel": self.parallel, "branch": self.branch.name}


def signature(stream: Stream, k: int) -> Signature:
    """What makes two segments repeats of each other: their weight matrices by shape, and their attentions.

    Vectors (biases, scales of norms) and operators without weights do not count: rewrites move them, and layers may
    differ in the mask. A segment with the empty signature holds no weights: a norm, a view, an activation.
    """
    flow, found = stream.flow, list[tuple[str, tuple[int, ...]]]()
    for node in stream.core[k]:
        for value in flow.weights(node):
            dims = tuple(sorted(d for d in static_dims(value) or (0, 0) if d != 1))
            if len(dims) > 1 and multiplies(node):
                found.append(("weight", dims))
        if attends(stream, k, node) is not None:
            found.append(("attention", ()))
    return tuple(sorted(found))


def multiplies(node: ir.Node) -> bool:
    """Whether constant operands of a node are weight matrices, and not tables, masks or scales."""
    return bool(node.domain) or node.op_type in _PRODUCTS


def attends(stream: Stream, k: int, node: ir.Node) -> bool | None:
    """None for a node that is no attention; else whether its keys come from outside of the segment."""
    flow, inside = stream.flow, stream.segment_of
    if "Attention" in node.op_type:
        return len(node.inputs) > 1 and node.inputs[1] is not None and not _from(stream, k, node.inputs[1])
    if any(_holds_attention(graph) for graph in subgraphs_of(node)):
        return False
    if not is_op(node, "Softmax"):
        return None
    at = node.inputs[0]
    while at is not None:
        above = at.producer()
        if above is None or inside.get(above) != k:
            return None
        if is_op(above, "MatMul", "Einsum", "Gemm"):
            if flow.weights(above):
                return None  # a softmax over logits: of a router
            return not all(_from(stream, k, v) for v in above.inputs[:2])
        if above.op_type not in _SCORE_OPS:
            return None
        at = next((v for v in above.inputs if v is not None and _from(stream, k, v)), None)
    return None


def _holds_attention(graph: ir.Graph) -> bool:
    return any("Attention" in node.op_type or is_op(node, "Softmax") for node in graph.all_nodes())


def _from(stream: Stream, k: int, value: ir.Value | None) -> bool:
    """Whether a value depends on the stream at segment `k`."""
    if value is None:
        return False
    producer = value.producer()
    return value is stream.cuts[k] or (producer is not None and stream.segment_of.get(producer) == k)


def residual(stream: Stream, k: int) -> tuple[ir.Value, list[ir.Value]] | None:
    """(the residual operand, the branches) of a segment whose end is its start plus something; else None."""
    leaves = _addends(stream, k, stream.cuts[k + 1])
    carried = [v for v in leaves if _same_stream(stream, k, v)]
    branches = [v for v in leaves if v not in set(carried) | stream.flow.constant]
    if len(leaves) < 2 or len(carried) != 1 or not branches:
        return None
    return carried[0], branches


def _addends(stream: Stream, k: int, value: ir.Value) -> list[ir.Value]:
    """Operands of a tree of additions inside of a segment; a bias is no addition of two streams."""
    node = value.producer()
    if not is_op(node, *_ADDS) or node is None or stream.segment_of.get(node) != k:
        return [value]
    operands = [v for v in node.inputs if v is not None]
    if value is not stream.cuts[k + 1] and (len(value.uses()) > 1 or any(v in stream.flow.constant for v in operands)):
        return [value]
    return [leaf for operand in operands for leaf in _addends(stream, k, operand)]


def _same_stream(stream: Stream, k: int, value: ir.Value) -> bool:
    while value is not stream.cuts[k]:
        node = value.producer()
        if node is None or node.op_type not in _VIEWS or stream.segment_of.get(node) != k:
            return False
        first = node.inputs[0]
        if first is None:
            return False
        value = first
    return True


def is_view(stream: Stream, k: int) -> bool:
    """Whether the segment only changes the form of the stream, not its numbers."""
    return all(node.op_type in _VIEWS and not node.domain for node in stream.core[k])


def find_parts(stream: Stream, k: int, exclusive: dict[ir.Node, int]) -> list[Part]:
    """The branches that a segment adds to the residual stream; none where it is not residual.

    Args:
        exclusive: nodes that feed the layer only, with anything as number; those of a branch go to its part.
    """
    found = residual(stream, k)
    if found is None:
        return []
    rest, branches = found
    shared = any(v in stream.flow.constant for v in _addends(stream, k, stream.cuts[k + 1]))
    cones = [_cone(stream, k, branch) for branch in branches]
    kinds = [_kind(stream, k, cone) for cone in cones]
    if len(branches) > 1 and (kinds.count("attention") != 1 or len(branches) > 2):
        branches, cones, kinds = _merge(stream, k, branches, cones)
    parts = []
    for branch, cone, kind in zip(branches, cones, kinds, strict=True):
        add = _adder(stream, k, branch)
        if add is None:
            continue
        others = set().union(*(c for c in cones if c is not cone)) if len(cones) > 1 else set()
        nodes = _with_feeders(stream.flow, [n for n in cone if n not in others], exclusive)
        parallel = len(branches) > 1
        size = parameters(stream.flow, nodes)
        ends = stream.cuts[k], stream.cuts[k + 1], rest
        parts.append(Part(kind, nodes, add, branch, *ends, parallel, size, parallel and shared))
    return sorted(parts, key=lambda part: part.kind != "attention")


def parameters(flow: Flow, nodes: Sequence[ir.Node]) -> int:
    """Numbers in the weights that nodes read."""
    values = {v for node in nodes for v in flow.weights(node)}
    return sum(int(v.const_value.size) for v in values if v.const_value is not None)


def _merge(
    stream: Stream, k: int, branches: list[ir.Value], cones: list[set[ir.Node]]
) -> tuple[list[ir.Value], list[set[ir.Node]], list[str]]:
    """Sums of experts and the like: one part, whose branch is the operand of the last addition."""
    node = stream.cuts[k + 1].producer()
    assert node is not None
    whole = [v for v in node.inputs if v is not None and not _same_stream(stream, k, v)]
    whole = [v for v in whole if v not in stream.flow.constant]
    if len(whole) != 1:
        return [], [], []
    cone = _cone(stream, k, whole[0])
    return whole, [cone], [_kind(stream, k, cone)]


def _adder(stream: Stream, k: int, branch: ir.Value) -> ir.Node | None:
    users = [node for node, _ in branch.uses()]
    return users[0] if len(users) == 1 and is_op(users[0], *_ADDS) and stream.segment_of.get(users[0]) == k else None


def _cone(stream: Stream, k: int, value: ir.Value) -> set[ir.Node]:
    """Nodes of the segment that `value` needs."""
    found: set[ir.Node] = set()
    pending = [value]
    while pending:
        at = pending.pop()
        node = at.producer()
        if at is stream.cuts[k] or node is None or node in found or stream.segment_of.get(node) != k:
            continue
        found.add(node)
        pending += stream.flow.data_operands(node)
    return found


def _with_feeders(flow: Flow, nodes: list[ir.Node], exclusive: dict[ir.Node, int]) -> tuple[ir.Node, ...]:
    found = dict.fromkeys(nodes)
    pending = list(nodes)
    while pending:
        for value in flow.operands[pending.pop()]:
            above = value.producer()
            if above is None or above in found or above not in exclusive:
                continue
            if all(user in found for user, _ in value.uses()):
                found[above] = None
                pending.append(above)
    return tuple(sorted(found, key=flow.position.__getitem__))


def _kind(stream: Stream, k: int, cone: set[ir.Node]) -> str:
    attention = [crossed for node in cone if (crossed := attends(stream, k, node)) is not None]
    if attention:
        return "cross-attention" if any(attention) else "attention"
    ops = {node.op_type for node in cone}
    if "TopK" in ops:
        return "moe"
    convolutions = [n for n in cone if n.op_type == "Conv"]
    if any(_is_spatial(stream.flow, n) for n in convolutions):
        return "conv"
    if convolutions or ops & {"MatMul", "Gemm", "SwiGLU", "MatMulNBits", "MatMulInteger"}:
        return "ffn"
    return "mixer"


def _is_spatial(flow: Flow, conv: ir.Node) -> bool:
    weights = [static_dims(v) for v in flow.weights(conv)]
    return any(dims is None or any(d != 1 for d in dims[2:]) for dims in weights)
