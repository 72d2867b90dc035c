"""The contract of a pass.

A pass takes a valid program and leaves a valid program; in between it need not be. It is a frozen dataclass
whose fields are its options, so that it prints as ``name{option=value}`` and parses back. Passes are pure:
timing, printing, verifying and measuring belong to instruments and gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from planish.ir.analyses import AnalysisCache
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.ir.target import Target


class Decline(Exception):
    """Raised inside a pass at a place where it could act and must not; the reason is kept and shown."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class PassResult:
    """What a pass did.

    Attributes:
        modified: the program differs from what it was; in checked mode the manager compares hashes.
        fired: number of places changed.
        declined: places left alone, each with its reason.
        notes: what else the report should say of it.
    """

    modified: bool
    fired: int = 0
    declined: list[Declined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class PassContext:
    """What a pass may ask for besides its program.

    Attributes:
        target: what is compiled for.
        analyses: results of analyses by program.
        run: ``run(program, entry)`` gives the outputs by name for each calibration batch of an entry; None where
            there is nothing to run with. Inputs of a batch that the entry does not have are left out.
    """

    target: Target = field(default_factory=Target)
    analyses: AnalysisCache = field(default_factory=AnalysisCache)
    run: Callable[[Program, str], list[dict[str, Any]]] | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes; derive from :class:`ExactPass` or :class:`ApproximatePass`, never from this.

    Class attributes:
        name: kebab-case, a verb first; unique in the registry.
        level: ``"onnx"`` for passes on a Program, ``"fx"`` for passes on a torch ``ExportedProgram``.
        requires: properties that must hold before (see `planish.ir.properties`).
        ensures: properties that hold afterwards.
        preserves: names of analyses that stay valid although the graph changed.
    """

    name: ClassVar[str]
    level: ClassVar[str] = "onnx"
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()
    preserves: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Rewrites `program` in place and says what happened."""

    @property
    def kind(self) -> str:
        return "exact" if isinstance(self, ExactPass) else "approximate"

    def __str__(self) -> str:
        """The pass as a pipeline string: its name, and the options that differ from their defaults."""
        changed = [f for f in fields(self) if f.init and getattr(self, f.name) != f.default]
        options = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return self.name + (f"{{{options}}}" if options else "")


@dataclass(frozen=True)
class ExactPass(Pass):
    """A pass whose result equals its input up to the rounding of floating point; held to the dtype's tolerance."""


@dataclass(frozen=True)
class ApproximatePass(Pass):
    """A pass that trades accuracy for speed; runs only when asked for, and is gated by itself.

    Class attributes:
        gives_up: one sentence: what the result may lose.
        saves: what it gains besides time: it then stays too where it is not measurably slower, or no slower than a
            `min_gain` below 1 allows, and its notes say how much it saves.
        order: where the pass goes among approximate ones that are given without a pipeline: layers and heads first
            (10), then tokens (30), what attention sees (50), and the formats of numbers (60).
        lowered: whether it goes behind the passes that lower operators to the target, and not in front of them.
        tuned_within_error: while the pass is tuned, the gain of a variant that exceeds the error budget is 0.
        selects: whether comparing numbers decides what the program does, as which tokens merge: rounding may decide
            otherwise, so that exact passes behind it may change outputs, though not their distance to the original.
    """

    gives_up: ClassVar[str]
    saves: ClassVar[str] = ""
    order: ClassVar[int] = 50
    lowered: ClassVar[bool] = False
    tuned_within_error: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def entry_names(self, program: Program) -> list[str]:
        """The entries that the pass is to make faster; in others it may only follow."""
        return list(program.entries)

    def tune(self, program: Program, gain: Callable[[ApproximatePass, float], float]) -> tuple[ApproximatePass, str]:
        """The variant of this pass to gate on `program`, and what the report should say of the choice.

        By default nothing is measured or changed.

        Args:
            gain: ``gain(variant, asked)`` measures the speed-up of a variant on the target, as closely as it takes to
                tell it from `asked`.
        """
        return self, ""
