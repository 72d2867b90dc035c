"""Row domains of relational programs, and the maps between them.

A value of a relational program is an array ``[rows, *shape]``: the rows are those of a domain and as many as the graph
says, the trailing shape is static. Between domains go maps, functions from rows of the finer to rows of the coarser:
an edge has one source, a node one type. An operator reads a coarser value through such a map (a gather), and a
reduction accumulates along one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Domain:
    """What the rows of a value stand for.

    Attributes:
        kind: the name, one of the constants of this module.
        index: for `node_of`, the node type whose nodes alone are rows.
    """

    kind: str
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}[{self.index}]"


#: One row for each node; nodes are sorted by type.
NODE = Domain("node")
#: One row for each edge.
EDGE = Domain("edge")
#: One row for each distinct (source, edge type).
SRC_PAIR = Domain("src_pair")
#: One row for each distinct (destination, edge type).
DST_PAIR = Domain("dst_pair")
#: One row for each edge type.
EDGE_TYPE = Domain("edge_type")
#: One row for each node type.
NODE_TYPE = Domain("node_type")
#: No rows: an array of just the trailing shape.
NONE = Domain("none")

DOMAINS = (NODE, EDGE, SRC_PAIR, DST_PAIR, EDGE_TYPE, NODE_TYPE, NONE)
TYPES = (EDGE_TYPE, NODE_TYPE, NONE)
PAIRS = (SRC_PAIR, DST_PAIR)

#: The ends of an edge, where a map has to say which.
ENDS = ("src", "dst")


def node_of(index: int) -> Domain:
    """The nodes of one type."""
    return Domain("node", index)


def ends(fine: Domain, coarse: Domain) -> tuple[str, ...]:
    """The ends by which rows of `fine` determine rows of `coarse`: ``("",)`` if there is one way, () if there is none.

    ``ends(EDGE, NODE)`` is ``("src", "dst")``; ``ends(SRC_PAIR, NODE)`` is ``("src",)``, and ``""`` stands for it too.
    From an edge type to a node type leads the type of its sources or that of its destinations.
    """
    if fine == coarse or coarse == NONE:
        return ("",)
    if coarse == EDGE_TYPE:
        return ("",) if fine in (EDGE, *PAIRS) else ()
    if coarse in PAIRS:
        return ("",) if fine == EDGE else ()
    if coarse == NODE:
        return {EDGE: ENDS, SRC_PAIR: ("src",), DST_PAIR: ("dst",)}.get(fine, ())
    if coarse == NODE_TYPE:
        return ("",) if fine.kind == "node" else ENDS if fine in (EDGE, *PAIRS, EDGE_TYPE) else ()
    return ()


def only_end(fine: Domain, coarse: Domain) -> str:
    """The end of a map without a choice: ``"src"`` from (source, type) pairs to nodes; else ``""``."""
    found = ends(fine, coarse)
    return found[0] if len(found) == 1 else ""


def reaches(fine: Domain, coarse: Domain, end: str) -> bool:
    """Whether a map leads from rows of `fine` to rows of `coarse` by `end`."""
    found = ends(fine, coarse)
    return end in found or (end == "" and len(found) == 1)


def compose(fine: Domain, middle: Domain, by: str, coarse: Domain, end: str) -> str:
    """The end by which rows of `fine` read `coarse`, given that they lead to `middle` by `by`, and that by `end`.

    An edge's source has a type: from edges by "src" to nodes and on to types is from edges to node types by "src".
    """
    if fine == middle or middle == coarse:
        return end if fine == middle else by
    if len(ends(fine, coarse)) < 2:
        return ""
    step = end or only_end(middle, coarse)
    return step or by or only_end(fine, middle)
