"""What is measured of an approximate pass is the program as the exact passes behind it leave it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from planish.ir.budget import Budget
from planish.ir.errors import PlanishError
from planish.ir.ledger import Ratio
from planish.ir.program import Program
from planish.passes.base import ExactPass, Pass, PassContext, PassResult
from planish.passes.finishing import FinishingBench
from planish.passes.gates import Gates
from tests.passes.test_gates import Approximate, Exact, FakeBench, mark, program

pytestmark = pytest.mark.no_verify  # the passes below only mark a program; nothing runs it


def apply(p: Pass, candidate: Program) -> PassResult:
    return p.apply(candidate, PassContext())


class Lowered(FakeBench):
    """A half that is not lowered gives other numbers, and is no faster."""

    def run(self, program: Program) -> list[dict[str, Any]]:
        marks = program.main.metadata_props
        self.errors["half"] = 0.001 if "lowered" in marks else 5.0
        return super().run(program)

    def seconds(self, program: Program) -> float:
        self.times["half"] = 0.5 if "lowered" in program.main.metadata_props else 1.0
        return super().seconds(program)


PASSES: list[Pass] = [Exact("clean"), Approximate("half"), Exact("lowered")]


def verdicts(bench: Any, passes: list[Pass] = PASSES) -> tuple[list[str], dict[str, str]]:
    best, ledger = Gates(bench, Budget(), apply).optimize(program(), passes)
    return list(best.main.metadata_props), {e.name: e.verdict for e in ledger.entries}


def test_an_approximate_pass_is_measured_as_it_will_run() -> None:
    marks, plain = verdicts(Lowered())
    assert marks == ["clean", "lowered"] and "error 5.0e+00" in plain[str(PASSES[1])]
    marks, finished = verdicts(FinishingBench(Lowered(), apply))
    assert marks == ["clean", "half", "lowered"] and finished[str(PASSES[1])] == "kept"


def test_what_is_wrong_once_it_is_lowered_is_taken_back() -> None:
    bench = FakeBench(errors={"half": 0.5}, times={"half": 0.5})
    marks, found = verdicts(FinishingBench(bench, apply))
    assert marks == ["clean", "lowered"] and "error 5.0e-01" in found[str(PASSES[1])]


def test_programs_are_finished_once_and_let_go() -> None:
    applied: list[str] = []

    def counted(p: Pass, candidate: Program) -> PassResult:
        applied.append(str(p))
        return apply(p, candidate)

    inner = FakeBench()
    bench, given = FinishingBench(inner, counted), [program() for _ in range(3)]
    bench.run(given[0])
    assert not applied  # nothing is behind
    bench.follow(PASSES[1:])
    for item in (given[0], given[0], given[1], given[0]):
        bench.run(item)
    assert applied == [str(PASSES[2])] * 2 and not inner.forgotten
    bench.run(given[2])  # beyond the two that are kept
    assert len(applied) == 3 and inner.forgotten == 1
    bench.follow([PASSES[2]])
    assert inner.forgotten == 1  # the same passes
    bench.follow([])
    assert inner.forgotten == 3 and not given[0].main.metadata_props


@dataclass(frozen=True)
class Breaks(ExactPass):
    """Fails behind `half`, as it would by itself."""

    name: ClassVar[str] = "breaks"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        if "half" in program.main.metadata_props:
            raise PlanishError("pass 'breaks' raised ValueError: planted")
        return mark(program, "lowered")


def test_a_pass_behind_that_fails_is_a_program_that_does_not_run() -> None:
    marks, found = verdicts(FinishingBench(FakeBench(times={"half": 0.5}), apply), [Approximate("half"), Breaks()])
    assert marks == ["lowered"] and "planted" in found[str(Approximate("half"))]


def test_options_of_a_measurement_pass_through() -> None:
    class Entries(FakeBench):
        def speedup(self, baseline: Program, candidate: Program, **options: Any) -> Ratio:
            self.options = options
            return Ratio(2.0, 1.9, 2.1, 5)

    inner = Entries()
    FinishingBench(inner, apply).speedup(program(), program(), seconds=1.0, threshold=1.0, entry="decode")
    assert inner.options == {"seconds": 1.0, "threshold": 1.0, "entry": "decode"}
