"""Repeats a pipeline until it changes nothing: ``repeat{passes='fold-constants,remove-no-ops',rounds=4}``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.ir.errors import InputError
from planish.ir.program import Program
from planish.passes.base import ExactPass, Pass, PassContext, PassResult
from planish.passes.manager import PassManager
from planish.passes.pipeline import parse_pipeline
from planish.passes.registry import register


@register
@dataclass(frozen=True)
class Repeat(ExactPass):
    """Runs exact passes in order, again and again, until a round changes nothing.

    Attributes:
        passes: a pipeline string of exact passes.
        rounds: the budget; a pipeline that still changes something after it is an error that names the passes.
    """

    name: ClassVar[str] = "repeat"

    passes: str
    rounds: int = 8

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"rounds is {self.rounds}; it must be at least 1.")
        for item in self.inner():
            if item.kind != "exact":
                raise InputError(f"it repeats exact passes only, and '{item.name}' is {item.kind}.")

    def inner(self) -> list[Pass]:
        return parse_pipeline(self.passes)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        return PassManager(tuple(self.inner()), rounds=self.rounds).apply(program, ctx)
