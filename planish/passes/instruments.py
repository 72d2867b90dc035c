"""Instruments: what watches passes. Passes stay pure; timing, printing, verifying and limiting are done here."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TextIO, TypeVar

from planish.ir.errors import PlanishError, VerifyError
from planish.ir.hashing import structural_hash
from planish.ir.program import Program
from planish.passes.base import Pass, PassResult

T = TypeVar("T")


class Instrument:
    """Watches the passes of a manager; derive from it and override what is needed."""

    def should_run(self, p: Pass, program: Program) -> bool:
        """False skips the pass; asked before :meth:`before`."""
        return True

    def before(self, p: Pass, program: Program) -> None:
        """Called right before the pass."""

    def after(self, p: Pass, program: Program, result: PassResult, seconds: float) -> None:
        """Called right after the pass; what it raises counts as a failure of the pass."""

    def failed(self, p: Pass, program: Program, error: Exception) -> None:
        """Called when the pass, or an instrument after it, raised."""


class Verify(Instrument):
    """Verifies the program before and after every pass.

    Args:
        full: also onnx's checker and strict inference; False for the cheap part only.
        changes: only what a pass left that changed something: for programs that nobody else touches in between.
    """

    def __init__(self, full: bool = False, changes: bool = False) -> None:
        self.full, self.changes = full, changes

    def before(self, p: Pass, program: Program) -> None:
        if self.changes:
            return
        from planish.ir.verify import verify

        try:
            verify(program, full=self.full)
        except VerifyError as error:
            raise VerifyError(f"the program is invalid before pass '{p}': {error}") from error

    def after(self, p: Pass, program: Program, result: PassResult, seconds: float) -> None:
        if self.changes and not result.modified:
            return
        from planish.ir.verify import verify

        try:
            verify(program, full=self.full)
        except VerifyError as error:
            raise VerifyError(f"it left an invalid program: {error}") from error


class HashCheck(Instrument):
    """Compares structural hashes around every pass, so that ``modified`` can not lie.

    Weights are compared by identity, not by content, so it costs some microseconds a node whatever the weights.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Pass, str]] = []  # a stack: managers nest

    def before(self, p: Pass, program: Program) -> None:
        self._before.append((p, structural_hash(program, contents=False)))

    def after(self, p: Pass, program: Program, result: PassResult, seconds: float) -> None:
        changed = structural_hash(program, contents=False) != _pop(self._before, p)
        if changed and not result.modified:
            raise PlanishError("it changed the program and says that it did not (modified=False)")
        if result.fired and not result.modified:
            raise PlanishError(f"it fired {result.fired} times and says that it changed nothing (modified=False)")


class Time(Instrument):
    """Wall time of every pass, in ``rows`` as (pass, seconds, modified)."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, bool]] = []

    def after(self, p: Pass, program: Program, result: PassResult, seconds: float) -> None:
        self.rows.append((str(p), seconds, result.modified))

    def __str__(self) -> str:
        total = sum(seconds for _, seconds, _ in self.rows)
        lines = [
            f"{seconds * 1e3:9.1f} ms  {name}{'' if changed else '  (no change)'}"
            for name, seconds, changed in self.rows
        ]
        return "\n".join([*lines, f"{total * 1e3:9.1f} ms  in all"])


class Print(Instrument):
    """Prints the program before or after the passes of these names; ``"*"`` stands for every pass that changed it."""

    def __init__(self, after: Collection[str] = (), before: Collection[str] = (), file: TextIO | None = None) -> None:
        self.names_after, self.names_before = set(after), set(before)
        self.file = file

    def before(self, p: Pass, program: Program) -> None:
        if p.name in self.names_before or "*" in self.names_before:
            self._print(f"before {p}", program)

    def after(self, p: Pass, program: Program, result: PassResult, seconds: float) -> None:
        if p.name in self.names_after or ("*" in self.names_after and result.modified):
            self._print(f"after {p}", program)

    def _print(self, title: str, program: Program) -> None:
        print(f"# {title}\n{program_text(program)}", file=self.file or sys.stdout, flush=True)


class Dump(Instrument):
    """Writes the program into a folder as text: ``000_input.txt``, then ``003_fuse-gelu.txt`` after the third pass.

    A pass that changed nothing has a number and no file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number = 0

    def before(self, p: Pass, program: Program) -> None:
        if self.number == 0:
            self._write("input", program)
        self.number += 1

    def after(self, p: Pass, program: Program, result: PassResult, seconds: float) -> None:
        if result.modified:
            self._write(p.name, program)

    def _write(self, name: str, program: Program) -> None:
        (self.folder / f"{self.number:03d}_{name}.txt").write_text(program_text(program), encoding="utf-8")


class Journal(Instrument):
    """Appends one JSON line per pass to a file, flushed at once, so that a crash loses nothing."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = Path(path), clock
        self._nodes: list[tuple[Pass, int]] = []

    def before(self, p: Pass, program: Program) -> None:
        self._nodes.append((p, program.node_count()))

    def after(self, p: Pass, program: Program, result: PassResult, seconds: float) -> None:
        self._append(
            p,
            modified=result.modified,
            fired=result.fired,
            declined=len(result.declined),
            nodes_before=_pop(self._nodes, p),
            nodes_after=program.node_count(),
            seconds=round(seconds, 6),
        )

    def failed(self, p: Pass, program: Program, error: Exception) -> None:
        self._append(p, error=f"{type(error).__name__}: {error}")

    def _append(self, p: Pass, **entry: object) -> None:
        line = json.dumps({"pass": str(p), "time": self.clock(), **entry})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()


class Limit(Instrument):
    """Lets only the first `passes` passes run; ``skipped`` names the others. What bisection by hand needs."""

    def __init__(self, passes: int) -> None:
        self.left = passes
        self.skipped: list[str] = []

    def should_run(self, p: Pass, program: Program) -> bool:
        if self.left > 0:
            self.left -= 1
            return True
        self.skipped.append(str(p))
        return False


def _pop(stack: list[tuple[Pass, T]], p: Pass) -> T:
    """Takes the entry of `p`, and those above it of passes that failed."""
    while True:
        owner, item = stack.pop()
        if owner is p:
            return item


def program_text(program: Program) -> str:
    """Every entry of a program as the short text of `planish.ir.printer`."""
    from planish.ir.printer import print_model

    if len(program.entries) == 1:
        return print_model(program.main)
    return "\n".join(f"# entry {name}\n{print_model(model)}" for name, model in program.entries.items())
