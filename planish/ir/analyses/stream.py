"""How data flows through a graph, and the values that all of it passes through: where a graph can be cut.

A *stream* starts at a graph input or at an embedding. Its *cuts* are the values that every path from there to an
output goes through, found as a chain of the dominator tree. Between two cuts lies a *segment*. What only depends on
shapes is no data: a mask made of sizes, or a position table, does not hide a cut, and neither does what comes from
another input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import networkx as nx
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, is_op, subgraphs_of

Item = ir.Value | ir.Node

#: A chain of fewer cuts holds no repeated layers.
_SHORTEST = 3
#: A second chain from one source has this share of the longest one for itself, and there are at most so many.
_BRANCH = 4
#: Chains looked at from one source, the longest.
_CANDIDATES = 12
#: Integers of eight bits and fewer may be quantized weights; these are indices, sizes and masks.
_NO_WEIGHTS = frozenset((ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING))


def reads(node: ir.Node) -> list[ir.Value]:
    """Operands of a node, and what the graphs inside of it take from outside."""
    values = [v for v in node.inputs if v is not None]
    for graph in subgraphs_of(node):
        inside = set(graph.inputs) | set(graph.initializers.values())
        for inner in graph:
            values += [v for v in reads(inner) if v not in inside]
            inside.update(inner.outputs)
        values += [v for v in graph.outputs if v not in inside]
    return values


@dataclass
class Flow:
    """The main graph of a model as data flow.

    Attributes:
        graph: the graph.
        nodes: its nodes in order of execution.
        constant: values that no input changes: initializers, constants, and what is computed from these alone.
        operands: node → what it reads, the graphs inside of it included.
        position: node → its place in the order of execution.
        digraph: numbers of values and nodes; edges go from a value to each node that reads its data, and from that
            to what it makes. (Not the objects: an exporter's values may overload comparison.)
    """

    graph: ir.Graph
    nodes: list[ir.Node] = field(init=False)
    constant: set[ir.Value] = field(init=False)
    digraph: Any = field(init=False)
    operands: dict[ir.Node, list[ir.Value]] = field(init=False)
    position: dict[ir.Node, int] = field(init=False)
    _outer: dict[ir.Node, ir.Node] = field(init=False)
    _numbers: dict[Item, int] = field(init=False)
    _items: list[Item] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = list(self.graph)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.operands = {node: reads(node) for node in self.nodes}
        self._outer = {n: node for node in self.nodes for graph in subgraphs_of(node) for n in graph.all_nodes()}
        self.constant = {v for v in self.graph.initializers.values() if not v.is_graph_input()}
        self.digraph = nx.DiGraph()
        self._numbers = {}
        self._items = []
        self.digraph.add_nodes_from(self._number(v) for v in self.inputs)
        for node in self.nodes:
            if all(v in self.constant for v in self.operands[node]) and not node.op_type.startswith("Random"):
                self.constant.update(node.outputs)
                continue
            number = self._number(node)
            self.digraph.add_edges_from((self._number(v), number) for v in self.data_operands(node))
            self.digraph.add_edges_from((number, self._number(v)) for v in node.outputs)

    def _number(self, item: Item) -> int:
        number = self._numbers.setdefault(item, len(self._items))
        if number == len(self._items):
            self._items.append(item)
        return number

    @property
    def inputs(self) -> list[ir.Value]:
        """Inputs that are not weights with a default."""
        return [v for v in self.graph.inputs if v.name not in self.graph.initializers]

    def data_operands(self, node: ir.Node) -> list[ir.Value]:
        """What a node reads the numbers of; a Shape reads none."""
        if is_op(node, "Shape", "Size"):
            return []
        return [v for v in self.operands[node] if v not in self.constant]

    def outer(self, node: ir.Node) -> ir.Node:
        """The node of the graph that `node` is, or is inside of."""
        return self._outer.get(node, node)

    def weights(self, node: ir.Node) -> list[ir.Value]:
        """The constant operands of a node that are more than one number, and numbers with a fraction at that.

        A file need not say what type computed constants have; they count.
        """
        found = []
        for value in self.operands[node]:
            tensor = constant_tensor(value) if value in self.constant else None
            dtype = value.dtype if tensor is None else tensor.dtype
            if value in self.constant and dtype not in _NO_WEIGHTS:
                size = _size(value)
                if size is None or size > 1:
                    found.append(value)
        return found

    def streams(self) -> list[Stream]:
        """The streams of the graph, those of embeddings first. Streams may join, and then share cuts from there on."""
        found: list[Stream] = []
        reached: set[int] = set()
        for source in self._sources():
            start = self._number(source)
            if source.is_graph_input() and all(user in reached for user in self.digraph.successors(start)):
                continue  # the cache of a layer: what it feeds is in a stream already
            numbers = nx.immediate_dominators(self.digraph, start)
            reached |= numbers.keys()
            dominators = {self._items[k]: self._items[start if d is None else d] for k, d in numbers.items()}
            found += [Stream(self, tuple(chain), dominators) for chain in self._chains(source, dominators)]
        return found

    def _sources(self) -> Iterator[ir.Value]:
        """Embeddings that an input picks rows of, then inputs: ids may also make the mask, an embedding does not."""
        changing: set[int] = set()
        for value in self.inputs:
            changing.update(nx.descendants(self.digraph, self._number(value)))
        for node in self.nodes:
            if (
                is_op(node, "Gather")
                and self._numbers.get(node) in changing
                and node.inputs[0] in self.constant
                and self.weights(node)
            ):
                yield node.outputs[0]
        yield from self.inputs

    def _chains(self, source: ir.Value, dominators: dict[Item, Item]) -> list[list[ir.Value]]:
        """The chain from `source` to the output that needs most of the graph, and others that leave it early."""
        chains = []
        for output in self.graph.outputs:
            if output in dominators:
                chain, at = [output], cast(Item, output)
                while at is not source:
                    at = dominators[at]
                    if isinstance(at, ir.Value):
                        chain.append(at)
                chains.append(chain[::-1])
        chains = sorted(chains, key=len, reverse=True)[:_CANDIDATES]
        # The last cache may have a chain as long as that of the result, which ends inside of the last layer.
        chains.sort(key=lambda chain: -len(nx.ancestors(self.digraph, self._number(chain[-1]))))
        kept: list[list[ir.Value]] = []
        taken: set[ir.Value] = set()
        for chain in chains:
            new = sum(v not in taken for v in chain)
            if len(chain) >= _SHORTEST and new * _BRANCH >= len(chains[0]) and len(kept) < _BRANCH:
                kept.append(chain)
                taken.update(chain)
        return kept


@dataclass
class Stream:
    """A chain of cuts and what lies between.

    Attributes:
        cuts: values that all data of the stream passes through, in order of execution.
        segment_of: node → index of the last cut that all paths to the node pass; nodes that the stream feeds only.
        core: for each segment, the nodes between its two cuts, in order of execution.
    """

    flow: Flow
    cuts: tuple[ir.Value, ...]
    dominators: dict[Item, Item]
    segment_of: dict[ir.Node, int] = field(init=False)
    core: list[list[ir.Node]] = field(init=False)

    def __post_init__(self) -> None:
        last: dict[Item, int] = {cut: k for k, cut in enumerate(self.cuts)}
        self.segment_of = {}
        for node in self.flow.nodes:
            if node not in self.dominators:
                continue
            # Dominators come before what they dominate, so those of this node are known.
            at, path = cast(Item, node), list[Item]()
            while at not in last and self.dominators.get(at, at) is not at:
                path.append(at)
                at = self.dominators[at]
            for item in path:
                last[item] = last.get(at, -1)
            self.segment_of[node] = last.get(node, -1)
        self.core = [self._core(k) for k in range(len(self.cuts) - 1)]

    def _core(self, k: int) -> list[ir.Node]:
        producer = self.cuts[k + 1].producer()
        found: dict[ir.Node, None] = {}
        pending = [producer] if producer is not None else []
        while pending:
            node = pending.pop()
            if node in found or self.segment_of.get(node) != k:
                continue
            found[node] = None
            for value in self.flow.data_operands(node):
                above = value.producer()
                if above is not None and value is not self.cuts[k]:
                    pending.append(above)
        return sorted(found, key=self.flow.position.__getitem__)


def _size(value: ir.Value) -> int | None:
    dims = static_dims(value)
    return None if dims is None else math.prod(dims)


def static_dims(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a value whose sizes are all known, else None."""
    shape = value.const_value.shape if value.const_value is not None else value.shape
    dims = [d for d in shape if isinstance(d, int)] if shape is not None else []
    return tuple(dims) if shape is not None and len(dims) == len(shape) else None
