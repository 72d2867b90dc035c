"""The two gates: a measured error and a measured gain, for every pass, on the user's own target.

Exact passes are gated as a group, and bisected when the group fails; approximate passes are gated one by one,
and their composition again at the end against one budget. This module decides; it does not know how a program
is compiled or timed: the driver hands it a :class:`Bench`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from planish.ir.analyses.liveness import liveness
from planish.ir.budget import Budget
from planish.ir.causal_lm import cache_layer
from planish.ir.compare import compare_outputs, inner_tolerance, tolerance, worst_of
from planish.ir.errors import PlanishError
from planish.ir.ledger import EntryMeasure, ErrorStats, Ledger, LedgerEntry, Ratio
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Pass, PassResult
from planish.passes.finishing import Bench, FinishingBench
from planish.passes.group import NOTHING, Candidate, Failure, PassGroup
from planish.passes.journal import Decision, DecisionJournal

#: Relative L2 that approximate passes may cost together when the user gives no budget.
DEFAULT_APPROXIMATE_ERROR = 1e-2
#: Wall seconds for all measuring of one run when the user gives no limit.
DEFAULT_SECONDS = 12.0
#: A program counts as slower from here on: two sessions of one and the same graph differ by up to a percent.
SLOWER = 0.99
#: And by this much at least: a program of microseconds differs by one between sessions.
NOTICEABLE_MS = 0.002

#: Share of the time left that one measurement may take while a pass is being tuned.
_TUNING = 0.15

_UNRUNNABLE = ErrorStats(float("inf"), float("inf"), -1.0)


@dataclass(frozen=True)
class Trial:
    """A candidate's outputs, how far they are from what came before, and `broken`: why it does not run.

    `cost` is what is held to the limit: for exact passes relative L2 against the program before them, for
    approximate ones the user's metric, or relative L2, against the original.
    """

    cost: float
    previous: ErrorStats
    original: ErrorStats
    outputs: list[dict[str, Any]]
    broken: str = ""
    by_entry: dict[str, ErrorStats] = field(default_factory=dict)

    def exceeds(self, limit: float) -> bool:
        return not self.cost <= limit  # written so that a NaN exceeds every limit


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an optimization. `best` is the last program that passed its gates."""

    def __init__(self, best: Program, ledger: Ledger) -> None:
        super().__init__("interrupted")
        self.best, self.ledger = best, ledger


@dataclass
class Gates:
    """One gated run; call :meth:`optimize` once.

    Attributes:
        bench: runs and times programs.
        budget: the user's limits.
        apply: applies one pass in place; raises PlanishError if the pass raised or left an invalid program.
        journal: decisions of this run, and of an interrupted one that it continues.
        reproduce: writes a reproducer folder from (program before, pass, error text); returns its path.
        progress: called with what is being done.
    """

    bench: Bench
    budget: Budget
    apply: Callable[[Pass, Program], PassResult]
    journal: DecisionJournal = field(default_factory=DecisionJournal)
    reproduce: Callable[[Program, Pass, str], Path | None] = lambda program, p, error: None
    progress: Callable[[str], None] = lambda what: None

    def optimize(self, program: Program, passes: Sequence[Pass]) -> tuple[Program, Ledger]:
        """Returns the optimized program and the ledger; `program` itself is not changed.

        Raises:
            Interrupted: Ctrl-C; carries the best program so far.
        """
        self.original, self.best, self.ledger = program, program, Ledger()
        self.checkpoints: list[tuple[Program, int]] = []  # (program before an approximate pass, ledger length)
        self.parts = program.calibration.parts if program.calibration is not None else []
        self.selects, self.best_error = False, 0.0  # whether rounding decides what it does; its error to the original
        self.ratios: dict[Ratio, dict[str, Ratio]] = {}  # what was measured → the same by entry
        seconds = DEFAULT_SECONDS if self.budget.seconds is None else self.budget.seconds
        try:
            self._reference()
            self.deadline = time.monotonic() + seconds
            left = list(passes)
            for kind, group in groupby(passes, key=lambda p: p.kind):
                if kind == "exact":
                    together = list(group)
                    self._gate(PassGroup(self.best, together, self.apply, self.reproduce, self._announce), kind)
                    del left[: len(together)]
                    continue
                for p in group:
                    del left[0]
                    self._follow(left)
                    variant = self._tuned(p)
                    self._gate(PassGroup(self.best, [variant], self.apply, self.reproduce, self._announce), kind)
                self._follow([])
            self._composition()
        except KeyboardInterrupt:
            self.ledger.notes.append("interrupted: the best program so far was kept")
            raise Interrupted(self.best, self.ledger) from None
        return self.best, self.ledger

    def _follow(self, passes: Sequence[Pass]) -> None:
        """Says what is still to come, to a bench that measures programs as they will run."""
        if isinstance(self.bench, FinishingBench):
            self.bench.follow(passes)

    # --- error ---------------------------------------------------------------------------------------------

    def _reference(self) -> None:
        """Runs the original twice: what differs between the runs is random and can not be held to anything."""
        self.progress("running the original")
        self.expected = self.bench.run(self.original)
        again = self.bench.run(self.original)
        self.best_outputs = self.expected
        self.tolerance = max(map(tolerance, self.expected), default=0.0)
        self.random = {
            name
            for one, two in zip(self.expected, again, strict=True)
            for name in one
            if compare_outputs({name: one[name]}, two).relative_l2 > self.tolerance
        }
        self.ledger.tolerance = self.tolerance
        if self.random:
            names = ", ".join(sorted(self.random))
            self.ledger.notes.append(f"error not measured for outputs that differ from run to run: {names}")

    def _limit(self, kind: str) -> float:
        """The largest error allowed: exact passes keep to the dtype's tolerance whatever the user's budget is."""
        asked = self.budget.error
        if kind == "approximate":
            return DEFAULT_APPROXIMATE_ERROR if asked is None else asked
        rounding = max(self.tolerance, inner_tolerance(self.best))
        if self.budget.metric is not None:
            return rounding
        return rounding if asked is None else min(rounding, asked)

    def _error(self, expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> ErrorStats:
        stats = worst_of(self._errors(expected, got))
        if self.budget.metric is None:
            return stats
        value = float(self.budget.metric(list(expected), list(got)))
        return ErrorStats(stats.relative_l2, stats.max_abs, stats.cosine, value, stats.output)

    def _errors(self, expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> list[ErrorStats]:
        """Error of each batch. Caches of layers that are gone are no outputs any more; others may not be comparable."""
        found = []
        for want, have in zip(expected, got, strict=True):
            caches = {name for name in want if cache_layer(name) is not None}
            gone = {name for name in caches if name not in have or _differs(have[name], want[name])}
            fixed = {k: v for k, v in want.items() if k not in self.random and k not in gone}
            found.append(compare_outputs(fixed, have))
        return found

    def _by_entry(self, got: list[dict[str, Any]]) -> dict[str, ErrorStats]:
        """Error of each entry against the original, for programs of several."""
        if len(self.parts) < 2:
            return {}
        owners = [part.entry for part in self.parts for _ in part.batches]
        errors = list(zip(owners, self._errors(self.expected, got), strict=True))
        return {part.entry: worst_of([e for owner, e in errors if owner == part.entry]) for part in self.parts}

    def _try(self, program: Program, kind: str) -> Trial:
        """Error of a candidate: exact passes answer to the program before them, approximate ones to the original."""
        try:
            outputs = self.bench.run(program)
        except PlanishError as error:
            return Trial(float("inf"), _UNRUNNABLE, _UNRUNNABLE, [], f"does not run: {error}")
        original = self._error(self.expected, outputs)
        previous = original if self.best_outputs is self.expected else self._error(self.best_outputs, outputs)
        cost = previous.relative_l2 if kind == "exact" else original.cost
        if kind == "exact" and self.selects:
            # Rounding decides what is selected: such a program may differ from the one before it, and is as near to
            # the original.
            cost = min(cost, max(original.relative_l2 - self.best_error, 0.0))
        return Trial(cost, previous, original, outputs, by_entry=self._by_entry(outputs))

    # --- one group -----------------------------------------------------------------------------------------

    def _gate(self, group: PassGroup, kind: str) -> None:
        """Applies a group and takes passes back, one at a time, until what is left passes both gates."""
        started = time.monotonic()
        key = self.journal.key(group.base, ",".join(map(str, group.passes)), self.budget)
        known = self.journal.find(key)
        if known is not None:
            group.failed.update({index: Failure(verdict) for index, verdict in known.failed.items()})
            candidate, ratio = group.build(), known.speedup
            trial = self._try(candidate.program, kind) if candidate.changed else None
            if trial is not None and trial.exceeds(self._limit(kind)):
                candidate, trial, ratio = self._settle(group, kind)  # another machine, or another runtime
        else:
            candidate, trial, ratio = self._settle(group, kind)
            self.journal.record(key, Decision({i: f.verdict for i, f in group.failed.items()}, ratio))
        if kind == "approximate" and candidate.changed:
            self.checkpoints.append((group.base, len(self.ledger.entries)))
        self._enter(group, candidate, kind, trial, ratio, time.monotonic() - started)
        self.best = candidate.program if candidate.changed else group.base
        if trial is not None:
            self.best_outputs, self.best_error = trial.outputs, trial.original.relative_l2
            self.selects |= kind == "approximate" and any(getattr(p, "selects", False) for p in group.passes)

    def _settle(self, group: PassGroup, kind: str) -> tuple[Candidate, Trial | None, Ratio | None]:
        limit = self._limit(kind)
        while True:  # each round ends it or takes a pass back, so there are at most as many rounds as passes
            candidate = group.build()
            if not candidate.changed:
                return candidate, None, None
            self.progress("measuring error")
            trial = self._try(candidate.program, kind)
            if trial.exceeds(limit):
                self._take_back_wrong(group, trial, kind, limit)
                continue
            self.progress("measuring gain")
            ratio = self._measure(group.base, candidate.program)
            if _slower(ratio):  # where a session's memory came to lie can cost this much: only a second one counts
                self.bench.forget(candidate.program)
                ratio = max(ratio, self._measure(group.base, candidate.program), key=lambda r: r.median)
            reason = self._no_gain(ratio, kind, getattr(group.passes[0], "saves", ""))
            if not reason:
                return candidate, trial, ratio
            self._take_back_slow(group, kind, ratio, reason)

    def _take_back_wrong(self, group: PassGroup, trial: Trial, kind: str, limit: float) -> None:
        guilty = group.first_bad(lambda program: self._try(program, kind).exceeds(limit))
        error = trial.previous if kind == "exact" else trial.original
        at = f" at output '{error.output}'" if error.output else ""
        group.fail(guilty, trial.broken or f"error {trial.cost:.1e} > {limit:.1e}{at}", error=error)

    # --- gain ----------------------------------------------------------------------------------------------

    def _tuned(self, p: Pass) -> Pass:
        """The variant of an approximate pass that it chooses by measuring."""
        if not isinstance(p, ApproximatePass):
            return p

        def gain(variant: ApproximatePass, asked: float) -> float:
            candidate = PassGroup(self.best, [variant], self.apply, self.reproduce, self._announce).build()
            if not candidate.changed:
                return 1.0
            if p.tuned_within_error and self._try(candidate.program, p.kind).exceeds(self._limit(p.kind)):
                return 0.0
            try:
                ratio = self._measure(self.best, candidate.program, _TUNING, asked, variant.entry_names(self.best))
            except PlanishError:  # it does not run
                return 0.0
            finally:
                self.bench.forget(candidate.program)
            return ratio.median

        variant, note = p.tune(self.best, gain)
        self.ledger.notes += [note] if note else []
        return variant

    def _measure(
        self,
        baseline: Program,
        candidate: Program,
        share: float = 0.5,
        threshold: float | None = None,
        entries: Sequence[str] | None = None,
    ) -> Ratio:
        """The speed-up, measured within a share of the time that is left, until it is told from `threshold`.

        Of several entries (those named, else all) the slowest counts if it became slower, else the fastest.
        """
        seconds = max(0.2, (self.deadline - time.monotonic()) * share)
        threshold = threshold or self.budget.min_gain or 1.0
        if len(self.parts) < 2:
            return self.bench.speedup(baseline, candidate, seconds=seconds, threshold=threshold)
        asked = [part.entry for part in self.parts if entries is None or part.entry in entries]
        seconds /= len(asked)
        found = {
            entry: self.bench.speedup(baseline, candidate, seconds=seconds, threshold=threshold, entry=entry)
            for entry in asked
        }
        slowest, fastest = (pick(found.values(), key=lambda r: r.median) for pick in (min, max))
        ratio = slowest if _slower(slowest) else fastest
        self.ratios[ratio] = found
        return ratio

    def _no_gain(self, ratio: Ratio, kind: str, saves: str = "") -> str:
        """Why a measured ratio is not enough, or an empty string.

        An exact pass costs nothing but time, so it stays unless it is measurably slower; an approximate one
        must be measurably faster. One that saves something else may cost what a `min_gain` below 1 says.
        """
        asked = self.budget.min_gain
        if saves and asked is not None and asked < 1 and ratio.median >= asked:
            return ""
        if _slower(ratio):
            entry = next((f" in {name}" for name, one in self.ratios.get(ratio, {}).items() if one is ratio), "")
            more = f"; a min_gain below 1 says what saving {saves} may cost" if saves else ""
            return f"slower{entry}, {ratio}{more}"
        if asked is not None and ratio.median < asked:
            return f"gain {ratio} is under the {asked:g}x asked for"
        must_gain = (kind == "approximate" and not saves) or (asked is not None and asked >= 1)
        if must_gain and not ratio.faster:
            return f"no measurable gain, {ratio}"
        return ""

    def _take_back_slow(self, group: PassGroup, kind: str, ratio: Ratio, reason: str) -> None:
        if kind == "approximate" or not _slower(ratio) or time.monotonic() > self.deadline:
            group.fail_all(reason)
            return
        guilty = group.first_bad(lambda program: _slower(self._measure(group.base, program)))
        group.fail(guilty, reason, speedup=ratio)

    # --- the ledger ----------------------------------------------------------------------------------------

    def _announce(self, p: Pass) -> None:
        self.progress(str(p))

    def _enter(
        self,
        group: PassGroup,
        candidate: Candidate,
        kind: str,
        trial: Trial | None,
        ratio: Ratio | None,
        seconds: float,
    ) -> None:
        self.ledger.entries += candidate.entries
        if kind == "approximate":
            entry = candidate.entries[0]
            entry.seconds = seconds
        else:
            counts = group.base.node_count(), candidate.program.node_count()
            entry = LedgerEntry("exact passes", "composition", *counts, seconds=seconds)
            entry.fired = sum(e.fired for e in candidate.entries if e.kept)
            entry.verdict = "kept" if candidate.changed else NOTHING
            entry.kept = candidate.changed
            self.ledger.entries.append(entry)
        if trial is not None:
            entry.error_previous, entry.error_original, entry.speedup = trial.previous, trial.original, ratio
            entry.by_entry = self._measured(trial, ratio)
            sizes = self.original.sizes()
            entry.peak_memory_before = liveness(group.base, dims=sizes).peak_bytes
            entry.peak_memory_after = liveness(candidate.program, dims=sizes).peak_bytes

    def _measured(self, trial: Trial, ratio: Ratio | None) -> dict[str, EntryMeasure]:
        ratios = self.ratios.get(ratio, {}) if ratio is not None else {}
        return {name: EntryMeasure(error, ratios.get(name)) for name, error in trial.by_entry.items()}

    def _composition(self) -> None:
        """Holds all passes together to the one budget; takes approximate ones back, the last first, until they fit."""
        if not self.checkpoints:
            return
        limit = self._limit("approximate")
        self.progress("measuring all passes together")
        trial = self._try(self.best, "approximate")
        while trial.exceeds(limit) and self.checkpoints:
            self.best, length = self.checkpoints.pop()
            for entry in self.ledger.entries[length:]:
                entry.kept = False
                entry.verdict = f"rolled back: all passes together cost {trial.cost:.1e} > {limit:.1e}"
            trial = self._try(self.best, "approximate")
        counts = self.original.node_count(), self.best.node_count()
        total = LedgerEntry("all passes", "composition", *counts)
        total.error_original = total.error_previous = trial.original
        total.speedup = self._measure(self.original, self.best) if self.best is not self.original else None
        total.by_entry = self._measured(trial, total.speedup)
        self.ledger.entries.append(total)


def _differs(one: Any, other: Any) -> bool:
    """Caches of fewer heads, of fewer tokens, or in fewer bits."""
    return np.shape(one) != np.shape(other) or np.asarray(one).dtype != np.asarray(other).dtype


def _slower(ratio: Ratio) -> bool:
    lost = (ratio.candidate_ms or 0.0) - (ratio.baseline_ms or 0.0)
    known = ratio.baseline_ms is not None and ratio.candidate_ms is not None
    return ratio.slower and ratio.median < SLOWER and not (known and lost < NOTICEABLE_MS)
