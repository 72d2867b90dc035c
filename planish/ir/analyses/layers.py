"""The repeated layers of a model: where each starts and ends, what else it reads, and what it is made of.

Two routes find them: module scopes, where the exporter left them, and structure alone. Both only say between which
cuts of a stream (see `planish.ir.analyses.stream`) a layer lies; everything else follows from the graph, so the two
give the same layers wherever they give the same cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import onnx_ir as ir

from planish.ir.analyses.layer_parts import Part, find_parts, is_view, multiplies, parameters, residual, signature
from planish.ir.analyses.stream import Flow, Stream, static_dims
from planish.ir.graphs import dims_of

Route = Literal["scopes", "structure"]


@dataclass(frozen=True)
class Layer:
    """One layer of a stack.

    Attributes:
        index: position in its stack, from 0.
        name: the module's path, such as ``encoder.layer.3``; for the structure route ``layer 3``.
        hidden_in, hidden_out: the hidden state that it takes and the one that it makes.
        nodes: what would be dead without it, in order of execution; what other layers read too is not part of it.
        side_inputs: other values that it reads: masks, rotary tables, states of an encoder.
        cache_inputs, cache_outputs: inputs of the graph that only this layer reads, and outputs that it makes of its
            keys and values.
        other_outputs: further outputs of the graph that it makes, such as attention probabilities.
        parts: the branches of the residual stream, in order.
        form: ``residual``: hidden_out is hidden_in plus branches. ``normed``: a norm or another operator stands in
            the stream, as in BERT. ``plain``: nothing is added to a stream.
        parameters: numbers in the weights that its nodes read.
    """

    index: int
    name: str
    hidden_in: ir.Value
    hidden_out: ir.Value
    nodes: tuple[ir.Node, ...]
    side_inputs: tuple[ir.Value, ...] = ()
    cache_inputs: tuple[ir.Value, ...] = ()
    cache_outputs: tuple[ir.Value, ...] = ()
    other_outputs: tuple[ir.Value, ...] = ()
    parts: tuple[Part, ...] = ()
    form: str = "residual"
    parameters: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "name": self.name,
            "hidden_in": self.hidden_in.name,
            "hidden_out": self.hidden_out.name,
            "nodes": len(self.nodes),
            "parameters": self.parameters,
            "form": self.form,
            "side_inputs": [v.name for v in self.side_inputs],
            "cache_inputs": [v.name for v in self.cache_inputs],
            "cache_outputs": [v.name for v in self.cache_outputs],
            "parts": [part.to_dict() for part in self.parts],
        }


@dataclass(frozen=True)
class LayerStack:
    """Layers that follow each other.

    Attributes:
        name: path of the list of modules, such as ``encoder.layer``; for the structure route ``stack 1``.
        layers: in order.
        route: what found it.
        width: size of the hidden state; None if not known.
        tied: the layers share weight matrices, as in ALBERT.
        uniform: every layer has weight matrices of the same shapes.
    """

    name: str
    layers: tuple[Layer, ...]
    route: Route
    width: int | None = None
    tied: bool = False
    uniform: bool = True

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> int:
        """Numbers in the weights of all layers; tied weights count once."""
        return self.layers[0].parameters if self.tied else sum(layer.parameters for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": self.name, "route": self.route, "width": self.width, "tied": self.tied}
        facts |= {"parameters": self.parameters, "uniform": self.uniform}
        return facts | {"layers": [layer.to_dict() for layer in self.layers]}


@dataclass(frozen=True)
class LayerAnalysis:
    """Stacks in order of execution, and what looked like layers and is not, with the reason."""

    stacks: tuple[LayerStack, ...]
    declined: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"stacks": [stack.to_dict() for stack in self.stacks], "declined": list(self.declined)}


@dataclass(frozen=True)
class Span:
    """What a route finds: a stack is `bounds` of cuts of a stream; layer i lies between bounds i and i + 1."""

    stream: Stream
    bounds: tuple[int, ...]
    name: str
    names: tuple[str, ...]
    route: Route


def find_layers(item: ir.Model | ir.Graph, *, route: Literal["auto", "scopes", "structure"] = "auto") -> LayerAnalysis:
    """Finds the repeated layers in the main graph of a model.

    Args:
        route: ``"auto"`` takes module scopes where they give stacks, structure on the streams where they do not.
    """
    from planish.ir.analyses.layer_routes import by_scopes, by_structure, entangled

    flow = Flow(item.graph if isinstance(item, ir.Model) else item)
    spans: list[Span] = []
    declined: dict[str, str] = {}
    streams = flow.streams()
    if route != "structure":
        for stream in streams:
            found, reasons = by_scopes(stream)
            spans += found
            declined = reasons | declined
    if route != "scopes" and not spans:
        spans = [span for stream in streams for span in by_structure(stream)]
    spans = _largest(spans)
    why_not = tuple(f"'{n}': {why}" for n, why in declined.items() if not any(_within(n, s.name) for s in spans))
    stacks = [_stack(flow, span, number) for number, span in enumerate(_in_order(flow, spans), 1)]
    if not stacks and not why_not:
        why_not = (entangled(streams) or "no segments between values that all data passes through repeat",)
    return LayerAnalysis(tuple(stacks), why_not)


def _within(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def _largest(spans: list[Span]) -> list[Span]:
    """Of stacks that overlap, the one of the most weight matrices and attentions: streams that join show one twice,
    and one that joins late, such as that of a mask, shows less of it."""

    def size(span: Span) -> int:
        return sum(len(signature(span.stream, k)) for k in range(span.bounds[0], span.bounds[-1]))

    kept: list[Span] = []
    taken: set[ir.Node] = set()
    for span in sorted(spans, key=size, reverse=True):
        nodes = {node for k in range(span.bounds[0], span.bounds[-1]) for node in span.stream.core[k]}
        if not nodes & taken:
            kept.append(span)
            taken |= nodes
    return kept


def _in_order(flow: Flow, spans: list[Span]) -> list[Span]:
    def place(span: Span) -> int:
        producer = span.stream.cuts[span.bounds[1]].producer()
        return flow.position[producer] if producer is not None else -1

    return sorted(spans, key=place)


def _stack(flow: Flow, span: Span, number: int) -> LayerStack:
    stream, bounds = span.stream, span.bounds
    owners = _owners(flow, stream, bounds)
    members: list[list[ir.Node]] = [[] for _ in bounds[1:]]
    for node, owner in owners.items():
        members[owner].append(node)
    layers = []
    for i, (start, end) in enumerate(pairwise(bounds)):
        nodes = sorted(members[i], key=flow.position.__getitem__)
        name = span.names[i] if span.names else f"layer {i}"
        layers.append(_layer(flow, stream, i, name, (start, end), nodes, owners))
    layers = _without_lone_caches(layers)
    weights = [_matrices(flow, layer.nodes) for layer in layers]
    tied = all(a & b for a, b in pairwise(weights))
    signatures = {tuple(signature(stream, k) for k in range(a, b)) for a, b in pairwise(bounds)}
    name = span.name or f"stack {number}"
    return LayerStack(name, tuple(layers), span.route, _width(layers[0]), tied, len(signatures) == 1)


def _owners(flow: Flow, stream: Stream, bounds: Sequence[int]) -> dict[ir.Node, int]:
    """Node → index of the layer that it belongs to: what lies between the layer's cuts, and what only feeds it."""
    layer_of = {k: i for i, (a, b) in enumerate(pairwise(bounds)) for k in range(a, b)}
    starts = {stream.cuts[b] for b in bounds}
    owners: dict[ir.Node, int] = {}
    core = {node: layer_of[k] for k in layer_of for node in stream.core[k]}
    for node in flow.nodes:  # in order of execution, so that what hangs off the core follows it
        if node in core:
            owners[node] = core[node]
        elif (k := stream.segment_of.get(node, -1)) in layer_of:
            above = [v.producer() for v in flow.data_operands(node) if v not in starts]
            if any(p is not None and owners.get(p) == layer_of[k] for p in above):
                owners[node] = layer_of[k]
    for node in reversed(flow.nodes):
        if node in owners or any(v.is_graph_output() for v in node.outputs) or node in stream.segment_of:
            continue
        users = {owners.get(flow.outer(user), -1) for v in node.outputs for user, _ in v.uses()}
        if len(users) == 1 and -1 not in users:
            owners[node] = users.pop()
    return owners


def _layer(
    flow: Flow,
    stream: Stream,
    index: int,
    name: str,
    span: tuple[int, int],
    nodes: list[ir.Node],
    owners: dict[ir.Node, int],
) -> Layer:
    start, end = span
    hidden_in, hidden_out = stream.cuts[start], stream.cuts[end]
    inside = set(nodes)
    mine = {node: index for node, owner in owners.items() if owner == index}
    parts = [part for k in range(start, end) for part in find_parts(stream, k, mine)]
    external = dict.fromkeys(v for n in nodes for v in flow.operands[n] if v.producer() not in inside)
    external = {v: None for v in external if v is not hidden_in and v not in flow.constant and not _is_sizes(v)}
    caches = [v for v in external if v.is_graph_input() and _is_cache(flow, v, inside)]
    outputs = [v for n in nodes for v in n.outputs if v.is_graph_output() and v is not hidden_out]
    probabilities = _after_softmax(flow, nodes)
    forms = [residual(stream, k) is not None or is_view(stream, k) for k in range(start, end)]
    form = "residual" if all(forms) and parts else ("normed" if parts else "plain")
    return Layer(
        index,
        name,
        hidden_in,
        hidden_out,
        tuple(nodes),
        tuple(v for v in external if v not in set(caches)),
        tuple(caches),
        tuple(v for v in outputs if v.producer() not in probabilities),
        tuple(v for v in outputs if v.producer() in probabilities),
        tuple(parts),
        form,
        parameters(flow, nodes),
    )


def _is_sizes(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT64 and value.shape is not None and len(value.shape) <= 1


def _is_cache(flow: Flow, value: ir.Value, inside: set[ir.Node]) -> bool:
    readers = {flow.outer(user) for user, _ in value.uses()}
    return len(dims_of(value) or ()) >= 3 and all(n in inside or n.op_type in ("Shape", "Size") for n in readers)


def _after_softmax(flow: Flow, nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """Nodes of a layer that depend on its attention probabilities; its keys and values do not."""
    found: set[ir.Node] = set()
    for node in nodes:
        above = (v.producer() for v in flow.data_operands(node))
        if node.op_type == "Softmax" or any(p in found or (p is not None and _is_fused(p, node)) for p in above):
            found.add(node)
    return found


def _is_fused(attention: ir.Node, reader: ir.Node) -> bool:
    """Whether `reader` takes the result of a fused attention, not one of its caches."""
    return "Attention" in attention.op_type and any(v is attention.outputs[0] for v in reader.inputs)


def _without_lone_caches(layers: list[Layer]) -> list[Layer]:
    """An input that one layer reads and its sisters have no counterpart of is no cache."""
    if len({len(layer.cache_inputs) for layer in layers}) == 1:
        return layers
    return [replace(layer, side_inputs=(*layer.side_inputs, *layer.cache_inputs), cache_inputs=()) for layer in layers]


def _matrices(flow: Flow, nodes: Sequence[ir.Node]) -> set[int]:
    """Identities of the weight matrices that nodes multiply by; two initializers may hold one tensor."""
    values = {v for node in nodes if multiplies(node) for v in flow.weights(node)}
    return {id(v.const_value if v.const_value is not None else v) for v in values if len(static_dims(v) or ()) > 1}


def _width(layer: Layer) -> int | None:
    dims = dims_of(layer.hidden_out)
    if not dims:
        return None
    image = len(dims) == 4 and any(node.op_type == "Conv" for node in layer.nodes) and isinstance(dims[1], int)
    width = dims[1] if image and not _channels_last(layer) else dims[-1]
    return width if isinstance(width, int) else None


def _channels_last(layer: Layer) -> bool:
    """Whether the stream itself is channels-last: its convolutions have to transpose it first."""
    users = [user.op_type for user, _ in layer.hidden_in.uses()]
    return "Conv" not in users


__all__ = ["Layer", "LayerAnalysis", "LayerStack", "Part", "Span", "find_layers"]
