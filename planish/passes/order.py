"""Positions of nodes in a graph, kept up while rules edit it; needed only by patterns with several outputs.

Such a pattern can be found where a consumer of one output stands before the node of another output. The
replacement computes both at once, so that consumer (and what depends on it) moves behind, or, where the match
needs the consumer's own result, the site is declined: the graph would have a cycle.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from planish.ir.graphs import subgraphs_of
from planish.passes.base import Decline

# Lexicographic, so that nodes can be inserted anywhere without numbering the others anew.
Key = tuple[int, ...]


class Order:
    """Positions of the nodes of one graph, numbered at first use."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._keys: dict[ir.Node, Key] | None = None
        self._owners: dict[ir.Graph, ir.Node] = {}

    def _all(self) -> dict[ir.Node, Key]:
        if self._keys is None:
            self._keys = {node: (number,) for number, node in enumerate(self.graph)}
            for node in self.graph:
                self._own(node, node)
        return self._keys

    def _own(self, node: ir.Node, owner: ir.Node) -> None:
        for graph in subgraphs_of(node):
            self._owners[graph] = owner
            for inner in graph:
                self._own(inner, owner)

    def _here(self, node: ir.Node) -> ir.Node | None:
        """The node of this graph that `node` is, or is inside of."""
        if node.graph is self.graph:
            return node
        return self._owners.get(node.graph) if node.graph is not None else None

    def place(
        self, matched: Sequence[ir.Node], outputs: Sequence[ir.Value], needed: Sequence[ir.Value]
    ) -> tuple[ir.Node, list[ir.Node]]:
        """Returns the node to insert behind, and the nodes that then have to move behind the new ones, in order.

        Raises:
            Decline: the replacement would need its own result.
        """
        keys = self._all()
        anchor = max(matched, key=keys.__getitem__)
        end, inside = keys[anchor], set(matched)
        late: set[ir.Node] = set()
        frontier = [user for value in outputs for user in value.consumers()]
        while frontier:
            node = self._here(frontier.pop())
            if node is None or node in inside or node in late or keys[node] > end:
                continue
            late.add(node)
            frontier += [user for value in node.outputs for user in value.consumers()]
        if late:
            self._require_acyclic(late, needed)
        return anchor, sorted(late, key=keys.__getitem__)

    def _require_acyclic(self, late: set[ir.Node], needed: Sequence[ir.Value]) -> None:
        # `late` is closed under "depends on", so what the replacement reads must not come out of it.
        for value in needed:
            producer = value.producer()
            if producer is not None and producer in late:
                raise Decline(f"'{value.name}' depends on an output of the match; replacing both would make a cycle")

    def inserted(self, anchor: ir.Node, new: Sequence[ir.Node], late: Sequence[ir.Node]) -> None:
        """Moves `late` behind the new nodes and numbers all of them between `anchor` and its successor."""
        if late:
            self.graph.remove(late)
            self.graph.insert_after(new[-1] if new else anchor, late)
        if self._keys is None:
            return
        base = self._keys.get(anchor, (0,))
        for number, node in enumerate((*new, *late)):
            self._keys[node] = (*base, number)
