"""How the tables of a typed graph are made (`planish.ir.relational.graph`, whose `Graph.table` says what they hold)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.errors import InputError

if TYPE_CHECKING:
    from planish.ir.relational.graph import Graph


def compact(array: np.ndarray) -> np.ndarray:
    """int32, at a multiple of 64 bytes, read-only."""
    memory = np.empty(array.size * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    table: np.ndarray = np.ndarray(array.shape, np.int32, memory, start)
    table[...] = array
    table.flags.writeable = False
    return table


def _order(keys: Sequence[np.ndarray], limits: Sequence[int]) -> np.ndarray:
    """Positions in the order of the first key, then the second and so on; equal ones as they come."""
    key, room = keys[0].astype(np.int64), max(limits[0], 1)
    for more, limit in zip(keys[1:], limits[1:], strict=True):
        room *= max(limit, 1)
        if room > 2**62:
            return np.lexsort(keys[::-1])
        key = key * max(limit, 1) + more
    return np.argsort(key, kind="stable")


def _starts(sorted_values: np.ndarray, count: int) -> np.ndarray:
    """Pointers (count + 1,) to the runs of 0 ... count - 1 in ascending values."""
    return np.concatenate([[0], np.cumsum(np.bincount(sorted_values, minlength=count))])


def _sorted_edges(g: Graph) -> dict[str, np.ndarray]:
    (src, dst), types = g.edge_index, g.edge_type
    order = _order((types, dst, src), (g.num_edge_types, g.num_nodes, g.num_nodes))
    found = {"order": order, "src": src[order], "dst": dst[order], "type": types[order]}
    return {name: compact(array) for name, array in found.items()} | {
        "edge_ptr": compact(_starts(types, g.num_edge_types))
    }


def _place(g: Graph) -> dict[str, np.ndarray]:
    place = np.empty(g.num_edges, np.int64)
    place[g.table("order")] = np.arange(g.num_edges)
    return {"place": compact(place)}


def _pairs(side: str) -> Callable[[Graph], dict[str, np.ndarray]]:
    def make(g: Graph) -> dict[str, np.ndarray]:
        types, node = g.table("type"), g.table(side)
        tables: dict[str, np.ndarray] = {}
        if side == "src":  # sorted edges are by destination
            edges = _order((types, node), (g.num_edge_types, g.num_nodes))
            types, node = types[edges], node[edges]
            tables["src_pair_edges"] = edges
        first = np.ones(len(node), bool)
        first[1:] = (node[1:] != node[:-1]) | (types[1:] != types[:-1])
        at = np.flatnonzero(first)
        of = np.cumsum(first) - 1
        if side == "src":
            by_edge = np.empty_like(of)
            by_edge[edges] = of
            of = by_edge
        tables |= {
            f"{side}_pair_node": node[at],
            f"{side}_pair_type": types[at],
            f"{side}_pair_ptr": np.append(at, len(node)),
            f"{side}_pair_type_ptr": _starts(types[at], g.num_edge_types),
            f"{side}_pair_of": of,
        }
        return {name: compact(table) for name, table in tables.items()}

    return make


def _adjacent(end: str, prefix: str) -> Callable[[Graph], dict[str, np.ndarray]]:
    def make(g: Graph) -> dict[str, np.ndarray]:
        node = g.table(end)
        order = _order((node,), (g.num_nodes,))
        return {f"{prefix}_edges": compact(order), f"{prefix}_ptr": compact(_starts(node, g.num_nodes))}

    return make


def _node_pairs(side: str) -> Callable[[Graph], dict[str, np.ndarray]]:
    def make(g: Graph) -> dict[str, np.ndarray]:
        node = g.table(f"{side}_pair_node")
        order = _order((node,), (g.num_nodes,))
        return {f"{side}_node_pairs": compact(order), f"{side}_node_ptr": compact(_starts(node, g.num_nodes))}

    return make


def _ends(g: Graph) -> dict[str, np.ndarray]:
    """From the edges; types without edges lead from node type 0 to node type 0."""
    ends = np.zeros((g.num_edge_types, 2), np.int64)
    kinds = np.searchsorted(g.node_ptr, g.edge_index, "right") - 1
    ends[g.edge_type] = kinds.T
    wrong = np.flatnonzero((ends[g.edge_type] != kinds.T).any(1))
    if len(wrong):
        edge = int(wrong[0])
        raise InputError(
            f"edges of type {g.edge_type[edge]} lead between different types of nodes (edge {edge} is one of them); "
            "a layer with weights by node type needs one type of source and of destination for each edge type."
        )
    return {"edge_ends": compact(ends)}


def _group(names: str, maker: Callable[[Graph], dict[str, np.ndarray]]) -> dict[str, Any]:
    return dict.fromkeys(names.split(), maker)


MAKERS: dict[str, Callable[[Graph], dict[str, np.ndarray]]] = {
    **_group("order src dst type edge_ptr", _sorted_edges),
    "place": _place,
    **_group("dst_pair_node dst_pair_type dst_pair_ptr dst_pair_type_ptr dst_pair_of", _pairs("dst")),
    **_group("src_pair_node src_pair_type src_pair_ptr src_pair_type_ptr src_pair_of src_pair_edges", _pairs("src")),
    **_group("in_ptr in_edges", _adjacent("dst", "in")),
    **_group("out_ptr out_edges", _adjacent("src", "out")),
    **_group("dst_node_ptr dst_node_pairs", _node_pairs("dst")),
    **_group("src_node_ptr src_node_pairs", _node_pairs("src")),
    "node_ptr": lambda g: {"node_ptr": compact(g.node_ptr)},
    "node_type": lambda g: {"node_type": compact(np.repeat(np.arange(g.num_node_types), np.diff(g.node_ptr)))},
    "edge_ends": _ends,
    "src_kind": lambda g: {"src_kind": compact(g.table("edge_ends")[:, 0])},
    "dst_kind": lambda g: {"dst_kind": compact(g.table("edge_ends")[:, 1])},
}
