"""A decoder cut along its layers: what is before them, one model for each distinct layer, what is after them.

Layers of one structure become one model whose weights are inputs, so they share one session and weights can be
wherever there is room. A layer is also cut around its attention over the cache, for caches that stay on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.analyses.layers import Layer, find_layers
from planish.ir.causal_lm import cache_layer
from planish.ir.errors import UnsupportedError
from planish.ir.external import stored_bytes
from planish.ir.graphs import subgraphs_of
from planish.runtime.offload.pieces import SMALL, Lower, Piece, make_piece

ATTENTION = "GroupQueryAttention"


@dataclass
class LayerUnit:
    """A layer, whole and cut around its attention.

    Attributes:
        name: the module's path.
        number: of its cache: 3 for ``past_3_key``.
        whole: carried and side values, the caches → carried values, the caches.
        before: carried and side values → what attention takes beside the caches; None where it can not be cut.
        attention: these and the caches → its result and the caches.
        after: carried and side values, the result of attention → carried values.
        queries: names of the values that go from `before` to `attention`.
        mixed: name of the value that `attention` gives to `after`.
    """

    name: str
    number: int
    whole: Piece
    before: Piece | None = None
    attention: Piece | None = None
    after: Piece | None = None
    queries: tuple[str, ...] = ()
    mixed: str = ""

    @property
    def pieces(self) -> list[Piece]:
        """Those that need weights on the device."""
        return [piece for piece in (self.whole, self.before, self.after) if piece is not None]


@dataclass
class Split:
    """A decoder in units that run one after another.

    Attributes:
        head: token ids and lengths → side values and what the first layer takes; small enough to run on the host.
        layers: in order.
        tail: what the last layer gives, side values → logits.
        carried: for each boundary, `len(layers) + 1` of them, the names of the values that cross it.
        sides: values that the head gives to more than the first layer, by name.
    """

    head: Piece
    layers: list[LayerUnit]
    tail: Piece
    carried: list[tuple[str, ...]]
    sides: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


def split_decoder(model: ir.Model, lower: Lower | None = None) -> Split:
    """Cuts the entry ``decode`` of a causal language model.

    Args:
        model: before forms were chosen for a device, since these may reach from layer to layer.
        lower: chooses them for one part.

    Raises:
        UnsupportedError: its layers are not found, or do not follow each other.
    """
    graph = model.graph
    layers = [layer for stack in find_layers(model).stacks for layer in stack.layers if _cache_values(layer, graph)]
    if not layers:
        raise UnsupportedError("the model has no layers with a cache of their own that it could be cut along.")
    owners = _owners(graph, layers)
    reads = _Crossings(graph, owners, len(layers))
    carried = [reads.carried(k) for k in range(len(layers) + 1)]
    sides = reads.sides()
    head_gives = _unique([*sides, *carried[0]])
    given = [v for v in graph.inputs if _is_side_input(v)]
    head = make_piece(model, given, [v for v in head_gives if v not in given], keep=True)
    units = [_unit(model, layer, k, carried, reads, lower) for k, layer in enumerate(layers)]
    logits = [v for v in graph.outputs if cache_layer(v.name or "") is None]
    given = _unique([*carried[-1], *reads.external(len(layers), sides)])
    tail = make_piece(model, given, logits, lower=lower)
    _share([unit.whole for unit in units])
    for part in ("before", "attention", "after"):
        _share([piece for unit in units if (piece := getattr(unit, part)) is not None])
    names = [tuple(v.name or "" for v in values) for values in carried]
    return Split(head, units, tail, names, tuple(v.name or "" for v in sides))


def _cache_values(layer: Layer, graph: ir.Graph) -> list[ir.Value]:
    """Key and value that the layer reads, in this order; empty for a layer without a cache."""
    found = [v for v in (*layer.cache_inputs, *layer.side_inputs) if v.is_graph_input()]
    found = [v for v in found if cache_layer(v.name or "") is not None]
    return sorted(found, key=lambda v: list(graph.inputs).index(v)) if len(found) == 2 else []


def _owners(graph: ir.Graph, layers: Sequence[Layer]) -> dict[ir.Node, int]:
    """Node → -1 for the head, the number of its layer, or the number of layers for the tail."""
    owners = {node: k for k, layer in enumerate(layers) for node in layer.nodes}
    pending = [layers[0].hidden_in]  # what only feeds the first layer is found as a part of it
    while pending:
        node = pending.pop().producer()
        if node is not None and owners.get(node) != -1:
            owners[node] = -1
            pending += reads_of(node)
    for node in graph:
        if node not in owners:
            above = [owners[p] for v in reads_of(node) if (p := v.producer()) is not None and p in owners]
            owners[node] = len(layers) if any(k >= 0 for k in above) else -1
    return owners


def reads_of(node: ir.Node) -> list[ir.Value]:
    """Operands of a node, and what the graphs inside of it take from outside."""
    inner = [v for graph in subgraphs_of(node) for n in graph for v in reads_of(n)]
    inner += [v for graph in subgraphs_of(node) for v in graph.outputs]
    return [v for v in node.inputs if v is not None] + inner


class _Crossings:
    """Which values go from which unit to which."""

    def __init__(self, graph: ir.Graph, owners: dict[ir.Node, int], count: int) -> None:
        self.graph, self.owners, self.count = graph, owners, count
        self.order = {node: at for at, node in enumerate(graph)}
        self.users: dict[ir.Value, set[int]] = {}
        for node in graph:
            for value in reads_of(node):
                if value.graph is graph or value.is_graph_input():
                    self.users.setdefault(value, set()).add(owners[node])
        for value in graph.outputs:
            if cache_layer(value.name or "") is None:
                self.users.setdefault(value, set()).add(count)
        for value, users in self.users.items():
            made = self.made(value)
            late = [k for k in users if made >= 0 and k not in (made, made + 1)]
            if late:
                raise UnsupportedError(
                    f"'{value.name}' goes from layer {made} to unit {late[0]}: layers that share values can not be cut."
                )

    def made(self, value: ir.Value) -> int:
        producer = value.producer()
        return -2 if producer is None else self.owners.get(producer, -2)

    def carried(self, boundary: int) -> list[ir.Value]:
        """What unit `boundary` takes from the one before it, in order of execution."""
        if boundary == 0:  # what only the first layer reads of the head, its hidden state
            found = [v for v, users in self.users.items() if self.made(v) == -1 and users - {-1} == {0}]
        else:
            found = [v for v, users in self.users.items() if self.made(v) == boundary - 1 and boundary in users]
        return sorted(found, key=self._place)

    def sides(self) -> list[ir.Value]:
        """What the head gives to several units, or to a later one."""
        found = [v for v, u in self.users.items() if self.made(v) == -1 and u - {-1} and u - {-1} != {0}]
        found += [v for v, u in self.users.items() if _is_side_input(v) and u - {-1}]
        return sorted(found, key=self._place)

    def external(self, unit: int, sides: Sequence[ir.Value]) -> list[ir.Value]:
        """Of the side values those that a unit reads."""
        return [v for v in sides if unit in self.users[v]]

    def _place(self, value: ir.Value) -> tuple[int, str]:
        producer = value.producer()
        return (-1 if producer is None else self.order[producer]), value.name or ""


def _is_side_input(value: ir.Value) -> bool:
    return value.is_graph_input() and not value.is_initializer() and cache_layer(value.name or "") is None


def _unit(
    model: ir.Model,
    layer: Layer,
    k: int,
    carried: list[list[ir.Value]],
    reads: _Crossings,
    lower: Lower | None,
) -> LayerUnit:
    caches = _cache_values(layer, model.graph)
    number = cache_layer(caches[0].name or "")
    assert number is not None
    given = _unique([*carried[k], *reads.external(k, reads.sides())])
    outputs = {v.name: v for v in model.graph.outputs}
    present = [outputs[(v.name or "").replace("past_", "present_", 1)] for v in caches]
    whole = make_piece(model, [*given, *caches], [*carried[k + 1], *present], lower=lower)
    unit = LayerUnit(layer.name, number, whole)
    attends = [n for n in layer.nodes if n.op_type == ATTENTION and set(caches) <= set(n.inputs)]
    if len(attends) != 1 or any(user is not attends[0] for v in caches for user, _ in v.uses()):
        return unit
    node = attends[0]
    mixed = node.outputs[0]
    inner = [v for v in node.inputs if v is not None and v not in caches and not v.is_initializer()]
    made = [v for v in _unique(inner) if reads.made(v) == k]
    if not made or any(v in carried[k + 1] for v in made):
        return unit
    unit.before = make_piece(model, given, made, lower=lower)
    unit.attention = make_piece(model, [*_unique(inner), *caches], [mixed, *present])
    unit.after = make_piece(model, [*given, mixed], carried[k + 1], lower=lower)
    unit.queries, unit.mixed = tuple(v.name or "" for v in made), mixed.name or ""
    return unit


def _unique(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))


def _share(pieces: Sequence[Piece]) -> None:
    """Gives pieces of one structure one model; a small weight that is the same in all of them becomes a constant."""
    groups: dict[bytes, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.key, []).append(piece)
    for group in groups.values():
        first = group[0]
        for at in reversed(range(len(first.weights) if len(group) > 1 else 0)):
            tensors = [piece.weights[at] for piece in group]
            same = all(
                t is tensors[0] or stored_bytes(t).tobytes() == stored_bytes(tensors[0]).tobytes() for t in tensors
            )
            if tensors[0].nbytes <= SMALL and same:
                first.fix(at)
                for piece in group[1:]:
                    del piece.weights[at]
        for piece in group[1:]:
            piece.model, piece.slots = first.model, first.slots
