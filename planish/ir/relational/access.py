"""Access schemes: by which index tables of a graph a row of one domain finds its row of another."""

from __future__ import annotations

from dataclasses import dataclass

from planish.ir.relational.domains import (
    DST_PAIR,
    EDGE,
    EDGE_TYPE,
    NODE,
    NODE_TYPE,
    NONE,
    PAIRS,
    SRC_PAIR,
    Domain,
    only_end,
)


@dataclass(frozen=True)
class Relation:
    """How the finer rows of a row are listed.

    Attributes:
        fine: their domain.
        end: by which they belong to the row.
        pointers: the table of pointers; `rows`: the table of numbers between them, or None if they are consecutive.
    """

    fine: Domain
    end: str
    pointers: str
    rows: str | None = None


_LISTS = {
    (NODE, EDGE, "dst"): ("in_ptr", "in_edges"),
    (NODE, EDGE, "src"): ("out_ptr", "out_edges"),
    (DST_PAIR, EDGE, ""): ("dst_pair_ptr", None),
    (SRC_PAIR, EDGE, ""): ("src_pair_ptr", "src_pair_edges"),
    (NODE, DST_PAIR, "dst"): ("dst_node_ptr", "dst_node_pairs"),
    (NODE, SRC_PAIR, "src"): ("src_node_ptr", "src_node_pairs"),
    (EDGE_TYPE, EDGE, ""): ("edge_ptr", None),
    (EDGE_TYPE, DST_PAIR, ""): ("dst_pair_type_ptr", None),
    (EDGE_TYPE, SRC_PAIR, ""): ("src_pair_type_ptr", None),
    (NODE_TYPE, NODE, ""): ("node_ptr", None),
}


def relation(coarse: Domain, fine: Domain, end: str) -> Relation | None:
    """The list of the `fine` rows of each row of `coarse`; None if graphs have none."""
    end = end or only_end(fine, coarse)
    if coarse == NONE:
        return Relation(fine, "", f"all_{fine.kind}" + ("" if fine.index is None else f"_{fine.index}"))
    found = _LISTS.get((coarse, fine, end))
    return None if found is None else Relation(fine, end, *found)


def segments(rows: Domain, weight: Domain, end: str) -> str | None:
    """The pointers to the rows with the same weight; ``""``: all of them; None: such rows are not consecutive."""
    if weight == NONE:
        return ""
    if weight == rows or (rows.index is not None and weight == NODE_TYPE):
        return None
    tables = {
        (EDGE, EDGE_TYPE): "edge_ptr",
        (DST_PAIR, EDGE_TYPE): "dst_pair_type_ptr",
        (SRC_PAIR, EDGE_TYPE): "src_pair_type_ptr",
        (NODE, NODE_TYPE): "node_ptr",
    }
    return tables.get((rows, weight))


def tables(fine: Domain, coarse: Domain, end: str) -> tuple[str, ...]:
    """The tables that lead from a row of `fine` to its row of `coarse`; edges are sorted ones."""
    end = end or only_end(fine, coarse)
    if coarse in (fine, NONE):
        return ()
    if fine == EDGE:
        if coarse == EDGE_TYPE:
            return ("type",)
        if coarse in PAIRS:
            return (f"{coarse.kind}_of",)
        return (end,) if coarse == NODE else (end, "node_type")
    if fine == EDGE_TYPE:
        return (f"{end}_kind",)
    if fine.kind == "node":
        return ("node_type",) if fine.index is None else (f"node_type_{fine.index}",)
    if coarse == NODE:
        return (f"{fine.kind}_node",)
    if coarse == EDGE_TYPE:
        return (f"{fine.kind}_type",)
    if fine.kind.startswith(end):
        return (f"{fine.kind}_node", "node_type")
    return (f"{fine.kind}_type", f"{end}_kind")


def from_row(inner: Relation, rows: Domain, coarse: Domain, end: str) -> tuple[str, ...] | None:
    """The tables from the row of a kernel to a row of `coarse` that all its inner rows share; None if they need not.

    In a loop over the edges into a node, what is read at the destination is that of the node.
    """
    if coarse == NONE:
        return ()
    own = {SRC_PAIR: "src", DST_PAIR: "dst"}.get(rows, inner.end)
    if coarse == rows:
        return () if not end or rows != NODE or end == own else None
    if rows in PAIRS:
        if coarse == EDGE_TYPE or (coarse in (NODE, NODE_TYPE) and end == own):
            return tables(rows, coarse, end)
        return None
    if rows == NODE and coarse == NODE_TYPE and end == own:
        return ("node_type",)
    return None
