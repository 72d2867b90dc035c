"""Passes made of rewrite rules: a pattern, a check, and a replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.driver import apply_rules
from planish.passes.rule import Match, Rule

__all__ = ["Decline", "DialectRewritePass", "Match", "RewriteMixin", "RewritePass", "Rule"]


class RewriteMixin:
    """What makes a pass a set of rules; mix it into ExactPass (that is RewritePass) or ApproximatePass.

    Either define ``pattern``, ``check`` and ``rewrite`` (one rule), or ``rules`` (several, tried in order at each
    node). See docs/pass-author-guide.md.

    Class attributes:
        min_opset: opset that the model must import at least; also ensured for every operator that is built.
        remove_nodes: False keeps matched nodes that something else uses; True declines such places.
        anchors: operators so telling that a place where one matched and little else is told as a near miss.
    """

    name: ClassVar[str]
    min_opset: ClassVar[int] = 1
    remove_nodes: ClassVar[bool] = True
    anchors: ClassVar[tuple[str, ...]] = ()

    def pattern(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Builds what to look for, from operators and variables."""
        raise NotImplementedError(f"pass '{self.name}' defines neither pattern nor rules.")

    def check(self, match: Match) -> None:
        """Raises ``Decline("reason")`` where the rule must not act."""

    def rewrite(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Builds the replacement; returns one value per output of the pattern."""
        raise NotImplementedError(f"pass '{self.name}' defines neither rewrite nor rules.")

    def rules(self) -> Sequence[Rule]:
        """The rules of this pass; one, unless overridden."""
        return (Rule(self.name, self.pattern, self.rewrite, self.check, self.min_opset, self.remove_nodes),)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Applies the rules until none fires."""
        return apply_rules(self.name, self.rules(), program, ctx)


@dataclass(frozen=True)
class RewritePass(RewriteMixin, ExactPass):
    """An exact pass made of rewrite rules."""

    # Subclasses write these with the variables of their pattern as parameters.
    pattern: ClassVar[Any] = RewriteMixin.pattern
    rewrite: ClassVar[Any] = RewriteMixin.rewrite


@dataclass(frozen=True)
class DialectRewritePass(RewritePass):
    """An exact pass that writes operators of the dialect; their functions come along, so that any runtime takes it."""

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        result = super().apply(program, ctx)
        if result.modified:
            for model in program.entries.values():
                import_functions(model)
        return result
