"""How large the row domains of a graph are: what cost rules of passes ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, PAIRS, SRC_PAIR, Domain


@dataclass(frozen=True)
class Statistics:
    """Numbers of rows.

    Attributes:
        nodes, edges, edge_types, node_types: how many.
        src_pairs, dst_pairs: distinct (source, edge type) and (destination, edge type).
        canonical: each edge type has one node type of sources and one of destinations.
    """

    nodes: int
    edges: int
    src_pairs: int
    dst_pairs: int
    edge_types: int
    node_types: int = 1
    canonical: bool = True

    @classmethod
    def of(cls, graph: Any) -> Statistics:
        """Those of a `planish.ir.relational.graph.Graph`."""
        canonical = graph.num_node_types == 1 or bool(_canonical(graph))
        return cls(
            graph.num_nodes,
            graph.num_edges,
            graph.rows(SRC_PAIR),
            graph.rows(DST_PAIR),
            graph.num_edge_types,
            graph.num_node_types,
            canonical,
        )

    def rows(self, domain: Domain) -> int:
        """How many rows a value by `domain` has; for the nodes of one type, an even share."""
        if domain.index is not None:
            return self.nodes // max(self.node_types, 1)
        return {
            NODE: self.nodes,
            EDGE: self.edges,
            SRC_PAIR: self.src_pairs,
            DST_PAIR: self.dst_pairs,
            EDGE_TYPE: self.edge_types,
            NODE_TYPE: self.node_types,
            NONE: 1,
        }[domain]

    def ratio(self, pair: Domain) -> float:
        """The compaction ratio: pairs for each edge; 1 without edges."""
        assert pair in PAIRS
        return self.rows(pair) / self.edges if self.edges else 1.0


#: A graph where nothing is known: each (source, type) has two edges.
NOMINAL = Statistics(10_000, 40_000, 20_000, 20_000, 50)


def _canonical(graph: Any) -> np.bool_:
    """Whether all edges of a type join nodes of the same two types."""
    ptr = np.asarray(graph.node_ptr)
    found = np.searchsorted(ptr, np.asarray(graph.edge_index), "right") - 1
    keys = np.stack([np.asarray(graph.edge_type), *found])
    return np.bool_(len(np.unique(keys, axis=1).T) == len(np.unique(keys[0])))
