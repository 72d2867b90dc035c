"""A bench that measures programs as they will run: behind the exact passes that are still to come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from planish.ir.ledger import Ratio
from planish.ir.program import Program
from planish.passes.base import Pass, PassResult

#: Finished programs that are kept: a baseline and a candidate, as a bench keeps them compiled.
KEPT = 2


class Bench(Protocol):
    """What the gates need of a runtime, on the calibration inputs."""

    def run(self, program: Program) -> list[dict[str, Any]]:
        """Outputs by name for each calibration batch."""

    def speedup(
        self, baseline: Program, candidate: Program, *, seconds: float, threshold: float, entry: str | None = None
    ) -> Ratio:
        """Time of `baseline` over time of `candidate`, interleaved; stops early once it clears `threshold`.

        For programs of which several entries are calibrated, `entry` says which.
        """

    def forget(self, program: Program) -> None:
        """Frees what was prepared to run `program`; the next run prepares it anew."""


class FinishingBench:
    """Runs and times copies of programs to which the passes behind have been applied.

    An approximate pass in front of the passes that lower operators to a GPU says little of what it gains, or of what it
    costs, while its operators are not those that will run: float16 before attention is lowered is another attention.

    Args:
        bench: for the finished programs.
        apply: applies one pass in place; raises PlanishError if it raised or left an invalid program.
    """

    def __init__(self, bench: Bench, apply: Callable[[Pass, Program], PassResult]) -> None:
        self.bench, self.apply = bench, apply
        self._behind: list[Pass] = []
        # By identity, with the program itself so that an identity is not used twice.
        self._made: OrderedDict[int, tuple[Program, Program]] = OrderedDict()

    def follow(self, passes: Sequence[Pass]) -> None:
        """Says what is still to come of the pipeline: of it the exact passes are applied to what is measured."""
        behind = [p for p in passes if p.kind == "exact"]
        if behind != self._behind:
            for program, _ in list(self._made.values()):
                self.forget(program)
            self._behind = behind

    def run(self, program: Program) -> list[dict[str, Any]]:
        """Outputs by name for each calibration batch."""
        return self.bench.run(self._finished(program))

    def speedup(self, baseline: Program, candidate: Program, **options: Any) -> Ratio:
        """Time of `baseline` over time of `candidate`, both finished."""
        return self.bench.speedup(self._finished(baseline), self._finished(candidate), **options)

    def forget(self, program: Program) -> None:
        """Frees what was prepared to run `program`."""
        _, finished = self._made.pop(id(program), (program, program))
        self.bench.forget(finished)

    def _finished(self, program: Program) -> Program:
        if not self._behind:
            return program
        if id(program) not in self._made:
            while len(self._made) >= KEPT:
                self.forget(next(iter(self._made.values()))[0])
            finished = program.clone()
            for p in self._behind:
                self.apply(p, finished)
            self._made[id(program)] = (program, finished)
        self._made.move_to_end(id(program))
        return self._made[id(program)][1]
