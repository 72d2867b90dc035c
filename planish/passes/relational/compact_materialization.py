"""Computes a value of edges once for each (source, edge type), or (destination, edge type), that it depends on.

Compact materialization of Hector (arXiv:2301.06284, section 3.3): a value whose backward slice reads only the source of
an edge and its type is equal on all edges that share both. It gets a row for each such pair instead of each edge;
nothing else changes, for what reads it reads it through the pair of its edge.
"""

from __future__ import annotations

from dataclasses import dataclass

from planish.ir.relational.domains import DST_PAIR, EDGE, PAIRS, SRC_PAIR
from planish.ir.relational.inter import Op, Program
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.base import Notes, Outcome, RelationalPass, Rewriter
from planish.passes.relational.moving import FIXED, moved

_WHAT = {SRC_PAIR: "(source, edge type)", DST_PAIR: "(destination, edge type)"}


@dataclass(frozen=True)
class CompactMaterialization(RelationalPass):
    """Moves values from edges to the pairs that they depend on.

    Attributes:
        max_ratio: pairs for each edge up to which it is done; with more, the saved rows do not pay for the look-up of
            the row that each edge reads.
    """

    name = "compact"

    max_ratio: float = 0.9

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes, rewriter = Notes(self.name), Rewriter(program)
        for op in map(rewriter.current, program.ops):
            compact = self._compact(rewriter, op, rows, notes)
            if compact is None:
                rewriter.keep(op)
                continue
            notes.fired += 1
            rewriter.keep(compact)
        return notes.outcome(rewriter.finish())

    def _compact(self, rewriter: Rewriter, op: Op, rows: Statistics, notes: Notes) -> Op | None:
        if op.over != EDGE or op.kind in FIXED or op.name in rewriter.source.outputs:
            return None
        legal = [(pair, found) for pair in PAIRS if (found := moved(op, pair, "", rewriter.known, rows)) is not None]
        if not legal:
            if op.kind == "linear":
                notes.decline(op.name, "it varies between edges of the same pair")
            return None
        pair, found = min(legal, key=lambda item: rows.ratio(item[0]))
        ratio = rows.ratio(pair)
        if ratio > self.max_ratio:
            notes.decline(
                op.name,
                f"{rows.rows(pair)} {_WHAT[pair]} for {rows.edges} edges: ratio {ratio:.2f} > {self.max_ratio:g}",
            )
            return None
        return found
