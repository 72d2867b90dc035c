"""The order of nodes in which chunks take turns, so that each computes while the sum of another is on its way."""

from __future__ import annotations

import heapq

import onnx_ir as ir

from planish.ir.graphs import subgraphs_of
from planish.ir.parallel import is_all_reduce


def in_turn(graph: ir.Graph, chunk_of: dict[ir.Node, int]) -> None:
    """Orders nodes by how many sums are above them, then by chunk: what waits for a sum comes behind other chunks.

    Args:
        chunk_of: which chunk a node computes; nodes of none come behind those that they are ready with.
    """
    nodes = list(graph)
    place = {node: index for index, node in enumerate(nodes)}
    depth: dict[ir.Node, int] = {}
    missing: dict[ir.Node, int] = {}
    below: dict[ir.Node, list[ir.Node]] = {node: [] for node in nodes}
    for node in nodes:
        above = {v.producer() for v in _reads(node)} & place.keys()
        depth[node] = max((depth[n] + is_all_reduce(n) for n in above if n is not None), default=0)
        missing[node] = len(above)
        for other in above:
            below[other].append(node)  # type: ignore[index]

    def rank(node: ir.Node) -> tuple[int, int, int]:
        return depth[node], chunk_of.get(node, len(chunk_of)), place[node]

    ready = [(*rank(node), node) for node in nodes if not missing[node]]
    heapq.heapify(ready)
    order = []
    while ready:
        node = heapq.heappop(ready)[-1]
        order.append(node)
        for other in below[node]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (*rank(other), other))
    graph.remove(nodes)
    graph.extend(order)


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, by the graphs inside of it too."""
    inner = [n for graph in subgraphs_of(node) for n in graph.all_nodes()]
    ends = [v for graph in subgraphs_of(node) for v in graph.outputs]
    return [v for n in (node, *inner) for v in n.inputs if v is not None] + ends
