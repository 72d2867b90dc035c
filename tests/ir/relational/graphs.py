"""Typed graphs made to break things."""

from __future__ import annotations

import numpy as np

from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Program
from planish.ir.relational.interpret import full_shape


def random_graph(
    seed: int = 0, node_types: tuple[int, ...] = (7, 0, 5), edge_types: int = 6, edges: int = 40, canonical: bool = True
) -> Graph:
    """Edges with duplicates, self-loops, types without edges, nodes without edges, and skewed types and degrees."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(node_types)])
    filled = [k for k, count in enumerate(node_types) if count]
    if not filled:
        edges = 0
    type_ends = random.choice(filled or [0], (edge_types, 2)) if edge_types else np.zeros((0, 2), np.int64)
    etype = np.minimum(random.geometric(0.4, edges) - 1, max(edge_types - 2, 0)).astype(np.int64)

    def ends(column: int) -> np.ndarray:
        if not canonical:
            return (random.integers(0, offsets[-1], edges) * random.random(edges)).astype(np.int64)
        kinds = type_ends[etype, column] if edges else np.zeros(0, np.int64)
        sizes = np.asarray(node_types)[kinds]
        return (offsets[kinds] + (random.random(edges) ** 2 * sizes).astype(np.int64)).astype(np.int64)

    src, dst = ends(0), ends(1)
    if edges >= 4:
        src[1], dst[1], etype[1] = src[0], dst[0], etype[0]
        if not canonical or type_ends[etype[2], 0] == type_ends[etype[2], 1]:
            dst[2] = src[2]
    return Graph(
        np.stack([src, dst]),
        etype,
        num_edge_types=edge_types,
        node_ptr=offsets,
        edge_ends=type_ends if canonical else None,
    )


def graphs() -> dict[str, Graph]:
    """Named graphs: every one with something that kernels and passes get wrong."""
    return {
        "typed": random_graph(1),
        "one node type": random_graph(2, (11,), 5, 60),
        "any types": random_graph(3, (4, 6), 3, 50, canonical=False),
        "many types": random_graph(4, (9, 3), 50, 70),
        "one type": random_graph(5, (6,), 1, 20),
        "no edges": random_graph(6, (3, 2), 4, 0),
        "no nodes": random_graph(7, (0,), 2, 0),
        "one node": random_graph(8, (1,), 2, 5),
        "isolated": Graph([[0, 0, 0], [4, 4, 4]], [0, 2, 2], num_nodes=6, num_edge_types=4),
    }


def random_values(program: Program, graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Arguments for a program."""
    random = np.random.default_rng(seed)
    return {v.name: random.normal(size=full_shape(v, graph)) for v in program.arguments}
