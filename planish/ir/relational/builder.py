"""Builds relational programs operator by operator: shapes are inferred, names made unique, everything checked at once.

`dsl` is the face for people who write layers; this is for frontends and passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planish.ir.errors import InputError
from planish.ir.relational.domains import (
    DST_PAIR,
    EDGE,
    EDGE_TYPE,
    NODE,
    NODE_TYPE,
    NONE,
    SRC_PAIR,
    Domain,
    node_of,
    reaches,
)
from planish.ir.relational.inter import Location, Op, Operand, Program, Variable
from planish.ir.relational.ops import Mismatch, infer
from planish.ir.relational.verify import check_op, error_at, verify

Given = Operand | str


class Builder:
    """A program under construction.

    >>> b = Builder("gcn")
    >>> x, w = b.input("x", NODE, 8), b.weight("W", EDGE_TYPE, 8, 4)
    >>> m = b.emit("linear", src(x), w, over=EDGE)
    >>> y = b.emit("sum", m, over=EDGE, domain=NODE, by="dst")
    >>> program = b.build(y)
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[Variable] = []
        self.weights: list[Variable] = []
        self.ops: list[Op] = []
        self.known: dict[str, Variable] = {}
        #: The position that operators get which are emitted without one.
        self.location: Location | None = None

    @classmethod
    def of(cls, program: Program) -> Builder:
        """One that goes on where `program` ends."""
        self = cls(program.name)
        self.inputs, self.weights, self.ops = list(program.inputs), list(program.weights), list(program.ops)
        self.known = program.variables()
        return self

    def input(self, name: str, domain: Domain, *shape: int) -> Operand:
        """Declares data."""
        return self._declare(self.inputs, name, domain, shape)

    def weight(self, name: str, domain: Domain, *shape: int) -> Operand:
        """Declares a trained weight; gradients are made for it."""
        return self._declare(self.weights, name, domain, shape)

    def _declare(self, where: list[Variable], name: str, domain: Domain, shape: tuple[int, ...]) -> Operand:
        if name in self.known:
            raise InputError(f"'{name}' is declared twice in '{self.name}'.")
        variable = Variable(name, domain, tuple(shape))
        where.append(variable)
        self.known[name] = variable
        return Operand(name)

    def unique(self, name: str) -> str:
        """`name`, or that with a number if it is taken."""
        if name not in self.known:
            return name
        number = 1
        while f"{name}_{number}" in self.known:
            number += 1
        return f"{name}_{number}"

    def variable(self, operand: Given) -> Variable:
        name = operand if isinstance(operand, str) else operand.name
        return self.known[name]

    def emit(
        self,
        kind: str,
        *operands: Given,
        over: Domain | None = None,
        domain: Domain | None = None,
        by: str = "",
        name: str | None = None,
        location: Location | None = None,
        **attrs: Any,
    ) -> Operand:
        """Adds an operator.

        Args:
            kind: which.
            operands: names, or `Operand` with an end: ``src("x")``.
            over: the domain of the loop; by default the coarsest that reads all operands (never pairs by itself).
            domain: that of the result of a reduction; by default that of the loop.
            by: the end of a reduction.
            name: of the result, made unique; by default from the kind.
            location: where the user wrote it.
            attrs: options; axes may be negative.

        Raises:
            InputError: operands do not fit.
        """
        location = location or self.location
        read = tuple(Operand(o) if isinstance(o, str) else o for o in operands)
        name = self.unique(name or kind)
        for operand in read:
            if operand.name not in self.known:
                raise error_at(location, f"'{name}' reads '{operand.name}', which is not defined")
        given = [self.known[o.name] for o in read]
        if over is None:
            over = self._loop(kind, read, given, name, location, attrs)
        shapes = [v.shape for v in given]
        try:
            attrs = _positive(kind, attrs, len(shapes[0]) if shapes else 0)
            shape = infer(kind, shapes, attrs)
        except Mismatch as error:
            raise error_at(location, f"'{name}': {error}") from error
        result = Variable(name, over if domain is None else domain, shape)
        op = Op(kind, result, read, tuple(sorted(attrs.items())), over, by, location)
        check_op(op, given)
        self.ops.append(op)
        self.known[name] = result
        return Operand(name)

    def constant(self, value: float, shape: Sequence[int] = ()) -> Operand:
        return self.emit("constant", over=NONE, value=float(value), shape=tuple(shape))

    def build(self, *outputs: Given) -> Program:
        """The program, verified."""
        names = tuple(o if isinstance(o, str) else o.name for o in outputs)
        program = Program(self.name, tuple(self.inputs), tuple(self.weights), tuple(self.ops), names)
        verify(program)
        return program

    def _loop(
        self,
        kind: str,
        read: Sequence[Operand],
        given: Sequence[Variable],
        name: str,
        location: Location | None,
        attrs: dict[str, Any],
    ) -> Domain:
        if kind == "join":
            return NODE
        if kind == "pick":
            return node_of(int(attrs.get("index", 0)))
        domains = [v.domain for v in given]
        pairs = [d for d in (SRC_PAIR, DST_PAIR) if d in domains]
        parts = [d for d in domains if d.index is not None]
        for over in (NONE, NODE_TYPE, EDGE_TYPE, *parts, NODE, *pairs, EDGE):
            if all(reaches(over, d, o.end) for d, o in zip(domains, read, strict=True)):
                return over
        raise error_at(location, f"'{name}': no loop reads " + " and ".join(f"'{o}'" for o in read))


def _positive(kind: str, attrs: dict[str, Any], rank: int) -> dict[str, Any]:
    """Axes counted from the front, lists as tuples."""
    result: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in attrs.items()}
    if "axes" in result:
        result["axes"] = tuple(sorted(_axis(kind, a, rank) for a in result["axes"]))
    if "axis" in result:
        result["axis"] = _axis(kind, result["axis"], rank)
    return result


def _axis(kind: str, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Mismatch(f"{kind}: axis {axis} of a value with {rank} trailing axes")
    return axis % rank


def src(value: Given) -> Operand:
    """`value` at the source of an edge."""
    return Operand(value if isinstance(value, str) else value.name, "src")


def dst(value: Given) -> Operand:
    """`value` at the destination of an edge."""
    return Operand(value if isinstance(value, str) else value.name, "dst")
