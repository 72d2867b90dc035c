"""The pass manager: runs passes in order, checks what they require, and holds them to what they say they did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar

from planish.ir.errors import InputError, PlanishError
from planish.ir.hashing import structural_hash
from planish.ir.program import Program
from planish.ir.properties import find_property, implies
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.instruments import HashCheck, Instrument

#: Instruments of the managers that are running now, outermost first; a nested manager's passes are watched too.
_active: ContextVar[tuple[Instrument, ...]] = ContextVar("planish_instruments", default=())


class PassError(PlanishError):
    """A pass raised, or broke its contract. `pass_name` is the culprit, `done` the passes before it."""

    def __init__(self, p: Pass, done: Sequence[str], error: Exception) -> None:
        what = str(error) if isinstance(error, PlanishError) else f"{type(error).__name__}: {error}"
        after = f" (after: {', '.join(done)})" if done else ""
        super().__init__(f"pass '{p}' failed: {what}{after}")
        self.pass_name, self.done = p.name, tuple(done)
        self.exit_code = getattr(error, "exit_code", 1)


def check_levels(passes: Sequence[Pass]) -> None:
    """Refuses a pipeline with a pass on the FX graph behind one on the ONNX graph.

    Raises:
        InputError: names the two passes.
    """
    lowered: Pass | None = None
    for p in passes:
        if p.level == "onnx":
            lowered = lowered or p
        elif p.level != "fx":
            raise InputError(f"pass '{p.name}' is of level '{p.level}'; levels are 'fx' and 'onnx'.")
        elif lowered is not None:
            raise InputError(
                f"pass '{p.name}' works on the FX graph and stands behind '{lowered.name}', which works on the ONNX "
                f"graph; put '{p.name}' first."
            )


def split_levels(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """The passes for the FX graph and those for the ONNX program.

    Raises:
        InputError: they do not chain.
    """
    check_levels(passes)
    return [p for p in passes if p.level == "fx"], [p for p in passes if p.level == "onnx"]


@dataclass(frozen=True)
class PassManager(Pass):
    """Runs passes in order; is a pass itself, so managers nest.

    Attributes:
        passes: what to run.
        instruments: watch every pass, also those of managers inside.
        rounds: 1 runs the passes once. More: repeats until a round changes nothing, and fails if the last of
            `rounds` rounds still does.
        checked: compare structural hashes around every pass, so that ``modified`` can not lie. Weights count by
            identity in this, so it is cheap enough (some microseconds a node) to be on everywhere.

    Raises (from `apply` and `check`):
        InputError: levels that do not chain, or a property that a pass requires, that the program lacks and that
            no earlier pass ensures; raised before any pass runs.
        PassError: a pass raised or broke its contract; names it and the passes before it.
    """

    name: ClassVar[str] = "pipeline"

    passes: Sequence[Pass]
    instruments: Sequence[Instrument] = ()
    rounds: int = 1
    checked: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        object.__setattr__(self, "instruments", tuple(self.instruments))

    @property
    def kind(self) -> str:
        return "exact" if all(p.kind == "exact" for p in self.passes) else "approximate"

    def __str__(self) -> str:
        return ",".join(str(p) for p in self.passes)

    def check(self, program: Program) -> None:
        """Checks levels and properties without running anything."""
        check_levels(self.passes)
        ensured: list[str] = []
        for p in self.passes:
            for name in p.requires:
                wanted = find_property(name)
                if any(implies(e, name) for e in ensured) or wanted.establish is not None:
                    continue
                problem = wanted.problem(program)
                if problem:
                    raise InputError(f"pass '{p.name}' requires '{name}', and {problem}.{_who_ensures(name)}")
            ensured += p.ensures

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Runs the passes on `program`, in place."""
        self.check(program)
        fx = next((p for p in self.passes if p.level == "fx"), None)
        if fx is not None:
            raise InputError(f"pass '{fx.name}' works on the FX graph; the torch frontend runs it while capturing.")
        outer = _active.get()
        watched = any(isinstance(i, HashCheck) for i in (*outer, *self.instruments))
        new = [*([HashCheck()] if self.checked and not watched else []), *self.instruments]
        instruments = (*outer, *(i for i in new if not any(i is o for o in outer)))
        token = _active.set(instruments)
        try:
            return self._rounds(program, ctx, instruments)
        finally:
            _active.reset(token)

    def _rounds(self, program: Program, ctx: PassContext, instruments: Sequence[Instrument]) -> PassResult:
        total = PassResult(False)
        done: list[str] = []
        changing: list[Pass] = []
        for _ in range(self.rounds):
            changing, total.declined = [], []
            for p in self.passes:
                result = self._run(p, program, ctx, instruments, done)
                total.fired += result.fired
                total.declined += result.declined
                total.notes += [note for note in result.notes if note not in total.notes]
                if result.modified:
                    changing.append(p)
            total.modified = total.modified or bool(changing)
            if not changing:
                return total
        if self.rounds > 1:
            names = ", ".join(dict.fromkeys(p.name for p in changing))
            raise PlanishError(f"the pipeline still changes the program after {self.rounds} rounds; by: {names}.")
        return total

    def _run(
        self, p: Pass, program: Program, ctx: PassContext, instruments: Sequence[Instrument], done: list[str]
    ) -> PassResult:
        if not all(i.should_run(p, program) for i in instruments):
            return PassResult(False)
        _establish(p, program)
        # Only analyses that are cached need a hash of the weights to be told apart.
        known = structural_hash(program) if len(ctx.analyses) else None
        for i in instruments:
            i.before(p, program)
        started = time.perf_counter()
        try:
            result = p.apply(program, ctx)
            seconds = time.perf_counter() - started
            if not isinstance(result, PassResult):
                raise PlanishError(f"it returned {type(result).__name__}, not a PassResult")
            for i in instruments:
                i.after(p, program, result, seconds)
        except Exception as error:
            for i in instruments:
                i.failed(p, program, error)
            if isinstance(error, PassError) and isinstance(p, PassManager):
                raise
            raise PassError(p, done, error) from error
        if known is not None and result.modified:
            ctx.analyses.invalidate(known, structural_hash(program), p.preserves)
        done.append(str(p))
        return result


def run_pass(
    p: Pass | Sequence[Pass], program: Program, ctx: PassContext | None = None, instruments: Sequence[Instrument] = ()
) -> PassResult:
    """Runs one pass (or several) through a manager."""
    passes = [p] if isinstance(p, Pass) else p
    return PassManager(passes, instruments).apply(program, ctx or PassContext(program.target))


def _establish(p: Pass, program: Program) -> None:
    for name in p.requires:
        wanted = find_property(name)
        if wanted.establish is not None and wanted.problem(program):
            wanted.establish(program)


def _who_ensures(name: str) -> str:
    from planish.passes import registry

    able = [n for n, cls in registry.known().items() if any(implies(e, name) for e in cls.ensures)]
    return f" Put '{sorted(able)[0]}' before it." if able else ""


__all__ = ["PassError", "PassManager", "check_levels", "run_pass", "split_levels"]
