"""Leaves out what no output of a relational program depends on."""

from __future__ import annotations

from dataclasses import dataclass

from planish.ir.relational.inter import Program
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.base import Notes, Outcome, RelationalPass


@dataclass(frozen=True)
class EliminateDeadCode(RelationalPass):
    """Removes operators whose results are not needed. Arguments stay: they are what callers give."""

    name = "dce"

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes, needed = Notes(self.name), set(program.outputs)
        kept = []
        for op in reversed(program.ops):
            if op.name in needed:
                kept.append(op)
                needed |= set(op.reads)
        notes.fired = len(program.ops) - len(kept)
        return notes.outcome(program.with_ops(kept[::-1]))
