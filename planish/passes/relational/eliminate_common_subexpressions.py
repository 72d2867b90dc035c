"""Computes once what a relational program computes twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.ops import full_end
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.base import Notes, Outcome, RelationalPass, Rewriter

_COMMUTATIVE = frozenset(("add", "mul", "max", "min", "equal"))


@dataclass(frozen=True)
class EliminateCommonSubexpressions(RelationalPass):
    """Replaces an operator by an earlier one of the same kind, operands and options; sums and products in any order."""

    name = "cse"

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes, rewriter = Notes(self.name), Rewriter(program)
        found: dict[Any, str] = {}
        for op in map(rewriter.current, program.ops):
            first = found.setdefault(_key(rewriter, op), op.name)
            if first == op.name or {first, op.name} <= set(program.outputs):
                rewriter.keep(op)
            else:
                rewriter.replace(op, Operand(first))
                notes.fired += 1
        return notes.outcome(rewriter.finish())


def _key(rewriter: Rewriter, op: Op) -> Any:
    domains = [rewriter.known[o.name].domain for o in op.operands]
    operands = [(o.name, full_end(op.over, d, o.end)) for o, d in zip(op.operands, domains, strict=True)]
    if op.kind in _COMMUTATIVE:
        operands.sort()
    by = full_end(op.over, op.result.domain, op.by) if op.over != op.result.domain else op.by
    return op.kind, tuple(operands), repr(op.attrs), op.over, op.result.domain, by
