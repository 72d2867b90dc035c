"""A typed graph, and the tables by which kernels traverse it: sorted edges, unique pairs, and CSR both ways.

Everything is checked when a graph is made, so kernels need not check indices. Tables are made when they are asked for
the first time and kept. Edges have two orders: the one they were given in, which is that of edge data, and the
*sorted* one of the tables, by (edge type, destination, source).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from planish.ir.errors import InputError
from planish.ir.relational.domains import (
    DOMAINS,
    DST_PAIR,
    EDGE,
    EDGE_TYPE,
    ENDS,
    NODE,
    NONE,
    PAIRS,
    SRC_PAIR,
    Domain,
    node_of,
    only_end,
    reaches,
)
from planish.ir.relational.graph_tables import MAKERS, compact

#: Rows of a kernel's index are int32.
_MOST = 2**31 - 1


class Graph:
    """A graph whose edges, and optionally nodes, have types.

    Args:
        edge_index: (2, E) integers: source and destination of each edge.
        edge_type: (E,) integers; None: one type.
        num_nodes: None: one more than the largest index, or what `node_ptr` says.
        num_edge_types: None: one more than the largest type, or as many as `edge_ends` has.
        node_ptr: (node types + 1,) ascending from 0: nodes of type k are ``node_ptr[k]:node_ptr[k + 1]``. None: one
            type.
        edge_ends: (edge types, 2): the type of the sources and that of the destinations of each edge type. None: they
            are read off the edges where programs need them.
        node_names, edge_names: names of the types: strings, and for edges triples (source type, relation, destination
            type).

    Raises:
        InputError: of wrong dtype or shape, or an index or type out of range: one line that says which.
    """

    def __init__(
        self,
        edge_index: Any,
        edge_type: Any = None,
        *,
        num_nodes: int | None = None,
        num_edge_types: int | None = None,
        node_ptr: Any = None,
        edge_ends: Any = None,
        node_names: Sequence[str] = (),
        edge_names: Sequence[tuple[str, str, str]] = (),
    ) -> None:
        index = integers("edge_index", edge_index)
        if index.ndim != 2 or index.shape[0] != 2:
            raise InputError(f"edge_index has shape {index.shape}; it must be (2, edges).")
        edges = index.shape[1]
        types = np.zeros(edges, np.int64) if edge_type is None else integers("edge_type", edge_type)
        if types.shape != (edges,):
            raise InputError(
                f"edge_type has shape {types.shape}; edge_index has {edges} edges, so it must be ({edges},)."
            )
        pointers = _pointers(node_ptr)
        if num_nodes is None:
            num_nodes = int(pointers[-1]) if pointers is not None else int(index.max(initial=-1)) + 1
        if pointers is None:
            pointers = np.array([0, num_nodes], np.int64)
        if pointers[-1] != num_nodes:
            raise InputError(f"node_ptr ends at {pointers[-1]}, but there are {num_nodes} nodes.")
        ends = None if edge_ends is None else integers("edge_ends", edge_ends)
        if num_edge_types is None:
            num_edge_types = len(ends) if ends is not None else int(types.max(initial=-1)) + 1
        for what, values, count, kind in (
            ("edge_index", index, num_nodes, "nodes"),
            ("edge_type", types, num_edge_types, "edge types"),
        ):
            if count < 0 or count > _MOST or edges > _MOST:
                raise InputError(f"{max(count, edges)} {kind} or edges; at most {_MOST}, and not below 0.")
            check_range(what, values, count, kind)
        self.num_nodes, self.num_edges, self.num_edge_types = int(num_nodes), edges, int(num_edge_types)
        self.num_node_types: int = len(pointers) - 1
        self.node_names, self.edge_names = tuple(node_names), tuple(tuple(name) for name in edge_names)
        for what, names, count in (
            ("node_names", self.node_names, self.num_node_types),
            ("edge_names", self.edge_names, self.num_edge_types),
        ):
            if names and len(names) != count:
                raise InputError(f"{what} has {len(names)} names for {count} types.")
        self.edge_index: np.ndarray = index
        self.edge_type: np.ndarray = types
        self.node_ptr: np.ndarray = pointers
        self._tables: dict[str, np.ndarray] = {}
        if ends is not None:
            self._tables["edge_ends"] = self._checked_ends(ends)

    def __repr__(self) -> str:
        return (
            f"Graph(nodes={self.num_nodes}, edges={self.num_edges}, node_types={self.num_node_types}, "
            f"edge_types={self.num_edge_types})"
        )

    # ---- tables

    def table(self, name: str) -> np.ndarray:
        """One of the tables, made now if it is not there yet; int32, compact, not to be written to.

        ==================  =======================================================================================
        order               (E,) where each sorted edge was given: ``sorted = given[order]``
        place               (E,) where each given edge is sorted: the inverse of `order`
        src dst type        (E,) of the sorted edges
        edge_ptr            (edge types + 1,) sorted edges of each type
        dst_pair_node       (P,) the node of each distinct (destination, edge type), by (edge type, destination)
        dst_pair_ptr        (P + 1,) its sorted edges, which are consecutive
        dst_pair_type_ptr   (edge types + 1,) the pairs of each type
        dst_pair_type       (P,) the type of each pair
        dst_pair_of         (E,) the pair of each sorted edge
        src_pair_...        the same for distinct (source, edge type); their edges are not consecutive but listed:
        src_pair_edges      (E,) sorted edges by pair, between ``src_pair_ptr``
        in_ptr in_edges     (N + 1,) and (E,): the sorted edges into each node
        out_ptr out_edges   the sorted edges out of each node
        dst_node_ptr        (N + 1,) and dst_node_pairs (P,): the (destination, edge type) pairs of each node
        src_node_ptr        the same for sources
        node_ptr            (node types + 1,) as given
        node_type           (N,) the type of each node
        edge_ends           (edge types, 2) the type of the sources, of the destinations
        src_kind dst_kind   (edge types,) its columns
        all_KIND            (2,): 0 and the number of rows of a domain of that kind
        ==================  =======================================================================================

        Raises:
            InputError: there is no such table.
        """
        if name not in self._tables:
            maker = MAKERS.get(name) or self._made_by_name(name)
            if maker is None:
                raise InputError(f"a graph has no table '{name}'. Known: {', '.join(sorted(MAKERS))}.")
            self._tables.update(maker(self))
        return self._tables[name]

    def _made_by_name(self, name: str) -> Any:
        """The maker of a table whose name says a domain."""
        head, _, rest = name.partition("_")
        known = {str(domain): domain for domain in DOMAINS} | {
            f"node_{k}": node_of(k) for k in range(self.num_node_types)
        }
        if head == "all" and rest in known:
            return lambda g: {name: compact(np.array([0, g.rows(known[rest])]))}
        if name.startswith("node_type_") and name[10:].isdigit():
            kind = int(name[10:])
            return lambda g: {name: compact(np.full(g.rows(node_of(kind)), kind))}
        return None

    def prepare(self, *names: str) -> Graph:
        """Makes these tables (without names: all), so that no later call spends time on them; returns the graph."""
        for name in names or MAKERS:
            self.table(name)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the tables that are there."""
        return sum(table.nbytes for table in self._tables.values())

    def rows(self, domain: Domain) -> int:
        """How many rows a value over `domain` has; 1 for ``none``.

        Raises:
            InputError: nodes of a type that is not there.
        """
        kind = domain.kind
        if kind in ("src_pair", "dst_pair"):
            return len(self.table(f"{kind}_node"))
        if domain.index is not None:
            if domain.index >= self.num_node_types:
                raise InputError(f"the graph has {self.num_node_types} node types; there is no type {domain.index}.")
            return int(self.node_ptr[domain.index + 1] - self.node_ptr[domain.index])
        counts = {
            "node": self.num_nodes,
            "edge": self.num_edges,
            "edge_type": self.num_edge_types,
            "node_type": self.num_node_types,
            "none": 1,
        }
        return int(counts[kind])

    def map(self, fine: Domain, coarse: Domain, end: str = "") -> np.ndarray:
        """The row of `coarse` for each row of `fine`, by `end`; edges in the order in which they were given.

        Raises:
            InputError: no map leads from one to the other by that end.
        """
        if not reaches(fine, coarse, end):
            raise InputError(f"no map leads from rows of {fine} to rows of {coarse} by '{end}'.")
        return np.asarray(self._map(fine, coarse, end or only_end(fine, coarse)))

    def _map(self, fine: Domain, coarse: Domain, end: str) -> Any:
        count = self.rows(fine)
        if coarse == NONE:
            return np.zeros(count, np.int64)
        if fine == coarse:
            return np.arange(count)
        if fine == EDGE:
            return self._edge_map(coarse, end)
        if fine == EDGE_TYPE:
            return self.table("edge_ends")[:, ENDS.index(end)]
        if fine.kind == "node":
            return np.full(count, fine.index) if fine.index is not None else self.table("node_type")
        if coarse == NODE:
            return self.table(f"{fine.kind}_node")
        types = self.table(f"{fine.kind}_type")
        if coarse == EDGE_TYPE:
            return types
        if fine.kind.startswith(end):  # the type of the node that the pair is of
            return self.table("node_type")[self.table(f"{fine.kind}_node")]
        return self.table("edge_ends")[types, ENDS.index(end)]

    def _edge_map(self, coarse: Domain, end: str) -> Any:
        if coarse == EDGE_TYPE:
            return self.edge_type
        if coarse in PAIRS:
            return self.table(f"{coarse.kind}_of")[self.table("place")]
        nodes = self.edge_index[ENDS.index(end)]
        return nodes if coarse == NODE else self.table("node_type")[nodes]

    @property
    def src(self) -> np.ndarray:
        """(E,) the source of each edge, as given; int64."""
        return np.asarray(self.edge_index[0])

    @property
    def dst(self) -> np.ndarray:
        """(E,) the destination of each edge, as given; int64."""
        return np.asarray(self.edge_index[1])

    @property
    def node_offsets(self) -> np.ndarray:
        """(node types,) the first node of each type."""
        return np.asarray(self.node_ptr[:-1])

    @property
    def compaction(self) -> tuple[float, float]:
        """Distinct pairs of (source, edge type), and of (destination, edge type), over edges; 1 without edges."""
        edges = max(self.num_edges, 1)
        both = (self.rows(SRC_PAIR) / edges, self.rows(DST_PAIR) / edges)
        return both if self.num_edges else (1.0, 1.0)

    def same_as(self, edge_index: np.ndarray, edge_type: np.ndarray | None) -> bool:
        """Whether the edges are these, in this order."""
        types = np.zeros(self.num_edges, np.int64) if edge_type is None else edge_type
        return bool(np.array_equal(self.edge_index, edge_index) and np.array_equal(self.edge_type, types))

    def given_ends(self) -> np.ndarray:
        """`edge_ends`, or (0, 2) if it was not given and is not known yet."""
        return self._tables.get("edge_ends", np.zeros((0, 2), np.int32))

    def transposed(self) -> Graph:
        """The graph with every edge turned round."""
        ends = self.given_ends()
        return Graph(
            self.edge_index[::-1],
            self.edge_type,
            num_nodes=self.num_nodes,
            num_edge_types=self.num_edge_types,
            node_ptr=self.node_ptr,
            edge_ends=ends[:, ::-1] if len(ends) else None,
        )

    # ---- from and to other forms

    @classmethod
    def from_hetero_data(cls, data: Any) -> Graph:
        """From PyG's ``HeteroData``: node types in its order, one after the other; edge types in its order.

        Raises:
            InputError: a node type whose number of nodes is not known, or an index out of its range.
        """
        return cls.from_edge_dict(
            {name: data[name].num_nodes for name in data.node_types},
            {triple: data[triple].edge_index for triple in data.edge_types},
        )

    @classmethod
    def from_edge_dict(cls, counts: Mapping[str, Any], edges: Mapping[tuple[str, str, str], Any]) -> Graph:
        """From the number of nodes of each type, and the (2, E) edges of each (source type, relation, destination
        type), whose indices are within their node types.

        Raises:
            InputError: a node type that is not known, or an index out of its range.
        """
        from planish.ir.relational.graph_forms import from_edge_dict

        return from_edge_dict(counts, edges)

    @classmethod
    def from_networkx(cls, graph: Any, *, edge_type: str = "type", node_type: str | None = None) -> Graph:
        """From a networkx graph; an undirected edge is one each way, of the same type.

        Types are numbered in sorted order of their values, nodes in the graph's order, but all of one type together.

        Args:
            graph: a ``networkx.Graph``, ``DiGraph``, ``MultiGraph`` or ``MultiDiGraph``.
            edge_type: the attribute of edges that is their type; edges without any such attribute have one type.
            node_type: the attribute of nodes that is theirs; None: one type.

        Raises:
            InputError: some edges or nodes have the attribute and others do not.
        """
        from planish.ir.relational.graph_forms import from_networkx

        return from_networkx(graph, edge_type, node_type)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the graph as ``.npz``: arrays only, no pickle. Tables are made again after loading."""
        from planish.ir.relational.graph_forms import save

        save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Graph:
        """Reads what `save` wrote, and checks it as every graph.

        Raises:
            InputError: the file is not such a graph.
        """
        from planish.ir.relational.graph_forms import load

        return load(path)

    # ---- making tables

    def _checked_ends(self, ends: np.ndarray) -> np.ndarray:
        if ends.shape != (self.num_edge_types, 2):
            raise InputError(f"edge_ends has shape {ends.shape}; it must be ({self.num_edge_types}, 2).")
        check_range("edge_ends", ends, self.num_node_types, "node types")
        if self.num_node_types > 1:
            found = np.searchsorted(self.node_ptr, self.edge_index, "right") - 1
            wrong = np.flatnonzero((ends[self.edge_type] != found.T).any(1))
            if len(wrong):
                edge = int(wrong[0])
                says = tuple(int(end) for end in ends[self.edge_type[edge]])
                raise InputError(
                    f"edge {edge} of type {self.edge_type[edge]} leads from a node of type {found[0, edge]} to one of "
                    f"type {found[1, edge]}, but edge_ends says {says}."
                )
        return compact(ends)


#: What the interpreter asks of a graph.
Tables = Graph


def integers(name: str, array: Any) -> np.ndarray:
    """A copy of an array, a torch tensor or a list as int64, compact, read-only."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().numpy()
    found = np.asarray(array)
    if found.size == 0 and not isinstance(array, np.ndarray):
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {found.dtype}; it must be integers.")
    owned = np.array(found, np.int64, order="C")  # a copy: what was checked must not change later
    owned.flags.writeable = False
    return owned


def check_range(name: str, values: np.ndarray, count: int, kind: str) -> None:
    low, high = int(values.min(initial=0)), int(values.max(initial=-1))
    if low < 0 or high >= count:
        raise InputError(f"{name} holds {low if low < 0 else high}; there are {count} {kind}, so 0 to {count - 1}.")


def _pointers(node_ptr: Any) -> np.ndarray | None:
    if node_ptr is None:
        return None
    found = integers("node_ptr", node_ptr)
    if found.ndim != 1 or not len(found) or found[0] != 0 or (np.diff(found) < 0).any():
        raise InputError("node_ptr must be a vector that ascends from 0.")
    return found
