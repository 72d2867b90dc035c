"""Computes a value once for each node, each type, or at all, when it depends on nothing more.

Loop-invariant code motion between row domains: ``exp(x[e.src])`` in a loop over edges is a value of nodes, and what is
only made of weights is a value of types. A factor that is the same for all rows of a sum is applied to the sum.

Nodes without edges and types without edges get values that nothing reads. These must be finite, and so must what
gradients make of them, or 0 times infinity would come back: operators with poles, and exp, stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from planish.ir.relational.domains import EDGE, EDGE_TYPE, ENDS, NODE, NODE_TYPE, NONE, PAIRS, Domain, compose, ends
from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.ops import full_end
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.base import Notes, Outcome, RelationalPass, Rewriter
from planish.passes.relational.moving import FIXED, allowed, moved

#: They, or their derivatives, may be infinite where operands are not.
_POLES = frozenset(("recip", "log", "sqrt", "div", "exp"))


@dataclass(frozen=True)
class HoistInvariants(RelationalPass):
    """Moves operators to the coarsest of nodes, types and nothing that their operands allow, if that has fewer rows."""

    name = "hoist"

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes, rewriter = Notes(self.name), Rewriter(program)
        users = program.users()
        for op in map(rewriter.current, program.ops):
            value = _factored(rewriter, op, users, rows)
            if value is not None:
                rewriter.replace(op, value)
                notes.fired += 1
                continue
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


def _count(rewriter: Rewriter, op: Op, factor: Operand) -> Op | None:
    """The operator that counts the rows of each sum, if `factor` is it."""
    own = rewriter.define(factor)
    same = own is not None and own.kind == "count" and own.over == op.over and own.result.domain == op.result.domain
    return own if own is not None and same and own.by == op.by else None


def _factored(rewriter: Rewriter, op: Op, users: Mapping[str, list[Op]], rows: Statistics) -> Operand | None:
    """The sum of x_e c_p over edges of a pair p is (the sum of x_e) c_p; the same with a quotient.

    A node may have no edges, so its factor only if it is 1 over their number: sum / max(number, 1).
    """
    if op.kind not in ("sum", "mean") or op.over == op.result.domain:
        return None
    inner = rewriter.define(op.operands[0])
    if (
        inner is None
        or inner.kind not in ("mul", "div")
        or inner.over != op.over
        or len(users.get(inner.name, ())) != 1
    ):
        return None
    if inner.name in rewriter.source.outputs:
        return None
    orders = [inner.operands, inner.operands[::-1]] if inner.kind == "mul" else [inner.operands]
    for value, factor in orders:
        domain = rewriter.known[factor.name].domain
        own = full_end(op.over, domain, factor.end)
        to = op.result.domain
        choice = [c for c in ends(to, domain) if compose(op.over, to, op.by, domain, c) == own]
        end = next((c for c in choice if allowed(to, domain, c, rows)), None)
        if end is None or rewriter.known[value.name].shape != op.result.shape:
            continue
        rewriter.location = op.location
        if op.result.domain not in PAIRS:
            if inner.kind != "div" or _count(rewriter, op, factor) is None:
                continue
            factor = rewriter.emit("max", factor.name, rewriter.constant(1.0), over=op.result.domain)
        total = rewriter.emit(op.kind, value, over=op.over, domain=op.result.domain, by=op.by)
        return rewriter.emit(inner.kind, total, Operand(factor.name, end), over=op.result.domain, name=op.name)
    return None


def _targets(over: Domain) -> list[tuple[Domain, str]]:
    """Coarser domains with the ends that lead there, the coarsest first."""
    found: list[tuple[Domain, str]] = [(NONE, "")]
    for domain in (NODE_TYPE, EDGE_TYPE, NODE):
        if domain != over:
            choice = ends(over, domain)
            found += [(domain, end) for end in (choice if len(choice) < 2 else ENDS)]
    return found


def _hoisted(rewriter: Rewriter, op: Op, rows: Statistics, notes: Notes) -> tuple[Op, str] | None:
    if op.over not in (EDGE, *PAIRS, NODE, EDGE_TYPE) or op.kind in FIXED | _POLES | {"copy", "expand"}:
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
