"""Computes a value once for each node, each type, or at all, when it depends on nothing more.

Loop-invariant code motion between row domains: ``exp(x[e.src])`` in a loop over edges is a value of nodes, and what is
only made of weights is a value of types.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planish.ir.relational.domains import EDGE, EDGE_TYPE, ENDS, NODE, NODE_TYPE, NONE, PAIRS, Domain, ends
from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.base import Notes, Outcome, RelationalPass, Rewriter
from planish.passes.relational.moving import FIXED, moved


@dataclass(frozen=True)
class HoistInvariants(RelationalPass):
    """Moves operators to the coarsest of nodes, types and nothing that their operands allow, if that has fewer rows."""

    name = "hoist"

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes, rewriter = Notes(self.name), Rewriter(program)
        for op in map(rewriter.current, program.ops):
            found = _hoisted(rewriter, op, rows, notes)
            if found is None:
                rewriter.keep(op)
                continue
            notes.fired += 1
            hoisted, end = found
            name = rewriter.unique(op.name)
            rewriter.keep(replace(hoisted, result=replace(hoisted.result, name=name)))
            rewriter.replace(op, Operand(name, end))
        return notes.outcome(rewriter.finish())


def _targets(over: Domain) -> list[tuple[Domain, str]]:
    """Coarser domains with the ends that lead there, the coarsest first."""
    found: list[tuple[Domain, str]] = [(NONE, "")]
    for domain in (NODE_TYPE, EDGE_TYPE, NODE):
        if domain != over:
            choice = ends(over, domain)
            found += [(domain, end) for end in (choice if len(choice) < 2 else ENDS)]
    return found


def _hoisted(rewriter: Rewriter, op: Op, rows: Statistics, notes: Notes) -> tuple[Op, str] | None:
    if op.over not in (EDGE, *PAIRS, NODE, EDGE_TYPE) or op.kind in FIXED | {"copy", "expand"}:
        return None
    if op.name in rewriter.source.outputs:
        return None
    for domain, end in _targets(op.over):
        found = moved(op, domain, end, rewriter.known, rows)
        if found is None:
            continue
        if rows.rows(domain) >= rows.rows(op.over) and domain == NODE:
            notes.decline(
                op.name, f"{rows.rows(domain)} nodes are not fewer than {rows.rows(op.over)} rows of {op.over}"
            )
            continue
        return found, end
    return None
