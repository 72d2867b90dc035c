"""A group of exact passes on one base program: built without the passes that failed, and bisected for the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from planish.ir.errors import InputError, PlanishError
from planish.ir.ledger import ErrorStats, LedgerEntry, Ratio
from planish.ir.program import Program
from planish.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Failure:
    """Why a pass was rolled back, with what was measured of it."""

    verdict: str
    error: ErrorStats | None = None
    speedup: Ratio | None = None
    reproducer: str | None = None


@dataclass
class Candidate:
    """A group applied to its base, and one ledger entry per pass."""

    program: Program
    entries: list[LedgerEntry]

    @property
    def changed(self) -> bool:
        """Some pass changed the program."""
        return any(e.kept and e.verdict != NOTHING for e in self.entries)


NOTHING = "nothing to do"


@dataclass
class PassGroup:
    """Passes are pure and deterministic, so the state after any prefix is rebuilt from `base` when it is needed
    instead of being kept: memory stays at one candidate, and the usual run, without a failure, pays nothing.

    Attributes:
        apply: applies a pass in place; raises PlanishError if it raised or left an invalid program.
        reproduce: writes a reproducer folder from (program before, pass, error text); returns its path.
        progress: called with the pass before it runs.
    """

    base: Program
    passes: list[Pass]
    apply: Callable[[Pass, Program], PassResult]
    reproduce: Callable[[Program, Pass, str], Path | None]
    progress: Callable[[Pass], None] = lambda p: None
    failed: dict[int, Failure] = field(default_factory=dict)

    def build(self, upto: int | None = None) -> Candidate:
        """Applies the passes that have not failed, in order, to a copy of the base; the first `upto` of them."""
        program, entries = self.base.clone(), []
        # The program as it is, for the case that the next pass fails: copied again only once a pass changed it.
        before: Program | None = self.base
        for index, p in enumerate(self.passes[:upto]):
            entry = LedgerEntry(str(p), p.kind, nodes_before=program.node_count())
            entries.append(entry)
            if index not in self.failed:
                self.progress(p)
                before = before or program.clone()
                program, changed = self._apply(index, p, program, before, entry)
                before = None if changed else before
            if index in self.failed:
                failure = self.failed[index]
                entry.kept, entry.verdict, entry.fired = False, failure.verdict, 0
                entry.error_original, entry.speedup = failure.error, failure.speedup
                entry.reproducer = failure.reproducer
            entry.nodes_after = program.node_count()
        return Candidate(program, entries)

    def _apply(
        self, index: int, p: Pass, program: Program, before: Program, entry: LedgerEntry
    ) -> tuple[Program, bool]:
        """Applies one pass; returns the program, a copy of `before` if it failed, and whether it was changed."""
        started = time.monotonic()
        try:
            result = self.apply(p, program)
        except PlanishError as error:
            if p.kind == "approximate" and isinstance(error.__cause__, InputError):
                raise error.__cause__ from error  # an option that does not fit the model
            self._fail(index, before, f"rolled back: {error}")
            return before.clone(), False
        entry.fired, entry.declined, entry.notes = result.fired, result.declined, result.notes
        entry.verdict = "kept" if result.modified else NOTHING
        entry.seconds = time.monotonic() - started
        return program, result.modified

    def fail(self, index: int, reason: str, error: ErrorStats | None = None, speedup: Ratio | None = None) -> None:
        """Leaves pass `index` out from now on, and writes its reproducer if its numbers are wrong."""
        if error is not None:
            self._fail(index, self.build(index).program, f"rolled back: {reason}", error)
        else:
            self.failed[index] = Failure(f"rolled back: {reason}", speedup=speedup)

    def _fail(self, index: int, before: Program, verdict: str, error: ErrorStats | None = None) -> None:
        folder = self.reproduce(before, self.passes[index], verdict)
        self.failed[index] = Failure(verdict, error, None, str(folder) if folder else None)

    def fail_all(self, reason: str) -> None:
        for index in range(len(self.passes)):
            self.failed.setdefault(index, Failure(f"rolled back: {reason}"))

    def first_bad(self, bad: Callable[[Program], bool]) -> int:
        """Index of the pass after which `bad` first holds, by bisection over prefixes; `bad` holds at the end.

        Only passes that change something are asked about; there must be one.
        """
        live = [i for i, entry in enumerate(self.build().entries) if entry.kept and entry.verdict != NOTHING]
        low, high = 0, len(live)
        while high - low > 1:
            middle = (low + high) // 2
            if bad(self.build(live[middle - 1] + 1).program):
                high = middle
            else:
                low = middle
        return live[high - 1]
