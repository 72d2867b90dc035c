"""The contract of a pass on relational programs, and what rewrites them.

Programs are immutable: a pass returns another one. As all passes it is a frozen dataclass whose fields are its options
and prints as ``name{option=value}``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from planish.ir.ledger import Declined
from planish.ir.relational.builder import Builder
from planish.ir.relational.domains import Domain, compose
from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.statistics import Statistics


@dataclass(frozen=True)
class Outcome:
    """What a pass did.

    Attributes:
        program: afterwards.
        fired: number of places changed.
        declined: places left alone, each with its reason.
    """

    program: Program
    fired: int = 0
    declined: tuple[Declined, ...] = ()


@dataclass(frozen=True)
class RelationalPass(ABC):
    """Base of passes on relational programs; all are exact up to rounding.

    Class attributes:
        name: kebab-case.
    """

    name: ClassVar[str]

    @abstractmethod
    def apply(self, program: Program, rows: Statistics) -> Outcome:
        """The rewritten program; `rows` are the statistics of the graph that it will run on."""

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        options = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return self.name + (f"{{{options}}}" if options else "")


@dataclass
class Notes:
    """Collects what a pass did and declined."""

    name: str
    fired: int = 0
    declined: list[Declined] = field(default_factory=list)

    def decline(self, where: str, reason: str) -> None:
        self.declined.append(Declined(self.name, where, reason))

    def outcome(self, program: Program) -> Outcome:
        return Outcome(program, self.fired, tuple(self.declined))


class Rewriter(Builder):
    """Writes a program anew, operator by operator; results can be replaced by other values.

    Attributes:
        source: the program that is rewritten.
        definitions: operators written so far, by name.
        replaced: old name → what it is read as now, in a loop over the old value's rows.
    """

    def __init__(self, source: Program) -> None:
        super().__init__(source.name)
        self.source = source
        self.old = source.variables()
        self.inputs, self.weights = list(source.inputs), list(source.weights)
        self.known = {v.name: v for v in source.arguments}
        self.definitions: dict[str, Op] = {}
        self.replaced: dict[str, Operand] = {}

    def unique(self, name: str) -> str:
        if name not in self.known and name not in self.old:
            return name
        number = 1
        while f"{name}_{number}" in self.known or f"{name}_{number}" in self.old:
            number += 1
        return f"{name}_{number}"

    def emit(self, *args: Any, **options: Any) -> Operand:
        made = super().emit(*args, **options)
        self.definitions[made.name] = self.ops[-1]
        return made

    def read(self, operand: Operand, over: Domain) -> Operand:
        """An operand of the source, as a loop over `over` reads it now."""
        now = self.replaced.get(operand.name)
        if now is None:
            return operand
        old, new = self.old[operand.name].domain, self.known[now.name].domain
        if old == new:
            return Operand(now.name, operand.end)
        return Operand(now.name, compose(over, old, operand.end, new, now.end))

    def current(self, op: Op) -> Op:
        """An operator of the source with its operands as they are now."""
        return replace(op, operands=tuple(self.read(o, op.over) for o in op.operands))

    def keep(self, op: Op) -> None:
        """Writes an operator (with current operands) as it is."""
        self.ops.append(op)
        self.known[op.name] = op.result
        self.definitions[op.name] = op

    def replace(self, op: Op, value: Operand) -> None:
        """From now on `value`, as read in a loop over the rows of the result of `op`, stands for that result."""
        self.replaced[op.name] = value

    def define(self, name: str | Operand) -> Op | None:
        """The operator that defines a value of the new program; None for arguments."""
        return self.definitions.get(name if isinstance(name, str) else name.name)

    def finish(self) -> Program:
        """The new program; outputs keep their names, and what stands for a value takes its name over."""
        names: dict[str, str] = {}
        for name in self.source.outputs:
            now = self.replaced.get(name)
            own = now is not None and self.known[now.name].domain == self.old[name].domain
            if now is not None and not (own and self._renamed(names, now, name, ())):
                self.ops.append(Op("copy", self.old[name], (now,)))
        for name, now in self.replaced.items():
            if name not in self.source.outputs:
                self._renamed(names, now, name, self.old)
        ops = [_named(op, names).renamed(names) for op in self.ops]
        return replace(self.source, ops=tuple(_live(ops, self.source.outputs)))

    def _renamed(self, names: dict[str, str], now: Operand, name: str, taken: Container[str]) -> bool:
        """Renames the new value `now` to `name`, unless it is an argument or has a name to keep."""
        free = now.name in self.definitions and now.name not in names and now.name not in taken
        if free and now.name not in self.source.outputs:
            names[now.name] = name
            return True
        return False


def _named(op: Op, names: dict[str, str]) -> Op:
    return replace(op, result=replace(op.result, name=names[op.name])) if op.name in names else op


def _live(ops: Iterable[Op], outputs: Iterable[str]) -> list[Op]:
    needed, found = set(outputs), list[Op]()
    for op in reversed(list(ops)):
        if op.name in needed:
            found.append(op)
            needed |= set(op.reads)
    return found[::-1]
