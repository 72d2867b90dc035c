"""Pipelines of passes on relational programs, as strings: ``"canonicalize,reorder,compact{max_ratio=0.8},dce"``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planish.ir.ledger import Declined
from planish.ir.relational.inter import Program
from planish.ir.relational.statistics import NOMINAL, Statistics
from planish.ir.relational.text import format_op
from planish.ir.relational.verify import verify
from planish.passes import pipeline
from planish.passes.relational.aggregate_first import AggregateFirst
from planish.passes.relational.base import RelationalPass
from planish.passes.relational.canonicalize import Canonicalize
from planish.passes.relational.compact_materialization import CompactMaterialization
from planish.passes.relational.eliminate_common_subexpressions import EliminateCommonSubexpressions
from planish.passes.relational.eliminate_dead_code import EliminateDeadCode
from planish.passes.relational.hoist_invariants import HoistInvariants
from planish.passes.relational.outer_by_pair import OuterByPair
from planish.passes.relational.reorder_linear import ReorderLinear

PASSES: dict[str, type[RelationalPass]] = {
    cls.name: cls
    for cls in (
        AggregateFirst,
        Canonicalize,
        CompactMaterialization,
        EliminateCommonSubexpressions,
        EliminateDeadCode,
        HoistInvariants,
        OuterByPair,
        ReorderLinear,
    )
}
#: What a layer goes through before it becomes kernels.
DEFAULT = "canonicalize,cse,hoist,aggregate-first,reorder,outer-by-pair,compact,canonicalize,cse,dce"


class _Lookup:
    """What the parser of pipeline strings asks."""

    @staticmethod
    def names() -> list[str]:
        return sorted(PASSES)

    @staticmethod
    def get(name: str) -> type[RelationalPass]:
        return PASSES[name]


@dataclass(frozen=True)
class Step:
    """What one pass did.

    Attributes:
        name: of the pass, with its options.
        fired: number of places changed.
        declined: places left alone, each with its reason.
        edits: lines of the text form that it removed or changed, and added.
        ops: number of operators afterwards.
    """

    name: str
    fired: int
    declined: tuple[Declined, ...]
    edits: int
    ops: int


@dataclass(frozen=True)
class Optimized:
    """A program after a pipeline, and what each pass did."""

    program: Program
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            lines.append(f"{step.name}: {step.fired} fired, {step.edits} edits, {step.ops} operators")
            lines += [f"  declined {d.node}: {d.reason}" for d in step.declined]
        return "\n".join(lines)


def parse(text: str) -> list[RelationalPass]:
    """Reads a pipeline string.

    Raises:
        InputError: with a caret under the place that is wrong.
    """
    found: list[Any] = list(pipeline.parse_pipeline(text, _Lookup))
    return found


def run_passes(
    program: Program, rows: Statistics = NOMINAL, passes: str | Sequence[RelationalPass] = DEFAULT
) -> Optimized:
    """Runs passes over a verified program, and verifies it after each.

    Args:
        program: a layer, forward or backward.
        rows: statistics of the graph that it is compiled for.
        passes: a pipeline string, or passes.
    """
    steps = []
    for each in parse(passes) if isinstance(passes, str) else passes:
        outcome = each.apply(program, rows)
        verify(outcome.program)
        edits = count_edits(program, outcome.program)
        steps.append(Step(str(each), outcome.fired, outcome.declined, edits, len(outcome.program.ops)))
        program = outcome.program
    return Optimized(program, tuple(steps))


def count_edits(before: Program, after: Program) -> int:
    """How many lines of the text form were removed, added, or changed."""
    old, new = ([format_op(op) for op in program.ops] for program in (before, after))
    return sum(
        max(i2 - i1, j2 - j1)
        for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if tag != "equal"
    )
