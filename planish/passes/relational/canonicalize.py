"""Brings relational programs into one form, in which other passes find what they look for.

- Copies, neutral factors and addends, reshapes of reshapes and to the same shape vanish; constants are computed.
- Means become sums over counts, divisions by constants products, sums of products inner products.
- An inner product, or a product with a weight, of concatenated values becomes the sum over the parts: what depends on
  the source of an edge is then apart from what depends on its destination.
- Broadcasting that the reader does anyway is left to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from planish.ir.relational.domains import EDGE, NONE
from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.ops import BINARY, UNARY, broadcast
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.base import Notes, Outcome, RelationalPass, Rewriter

_ROUNDS = 20
Rule = Callable[[Rewriter, Op], Operand | None]


@dataclass(frozen=True)
class Canonicalize(RelationalPass):
    """Simplifies until nothing changes."""

    name = "canonicalize"

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes = Notes(self.name)
        for _ in range(_ROUNDS):
            before = notes.fired
            program = _round(program, notes)
            if notes.fired == before:
                return notes.outcome(program)
        raise AssertionError(f"canonicalize does not come to an end on '{program.name}'")


def _round(program: Program, notes: Notes) -> Program:
    rewriter = Rewriter(program)
    for op in map(rewriter.current, program.ops):
        rewriter.location = op.location
        value = None
        for rule in RULES.get(op.kind, ()):
            value = rule(rewriter, op)
            if value is not None:
                break
        if value is None:
            rewriter.keep(op)
        else:
            rewriter.replace(op, value)
            notes.fired += 1
    return rewriter.finish()


def _shape(rewriter: Rewriter, operand: Operand) -> tuple[int, ...]:
    return rewriter.known[operand.name].shape


def _number(rewriter: Rewriter, operand: Operand) -> float | None:
    """The number that fills a constant."""
    op = rewriter.define(operand)
    return float(op.attr("value")) if op is not None and op.kind == "constant" else None


def _copy(rewriter: Rewriter, op: Op) -> Operand | None:
    """A copy is what it copies, but for an output that must be a value of its own."""
    source = op.operands[0]
    if op.name in rewriter.source.outputs:
        own = rewriter.define(source)
        same = rewriter.known[source.name].domain == op.over
        if own is None or not same or source.name in rewriter.source.outputs:
            return None
        if any(now.name == source.name for now in rewriter.replaced.values()):
            return None
    return source


def _neutral(rewriter: Rewriter, op: Op) -> Operand | None:
    """x + 0, x - 0, x * 1, x / 1."""
    a, b = op.operands
    neutral = 0.0 if op.kind in ("add", "sub") else 1.0
    pairs = [(a, b), (b, a)] if op.kind in ("add", "mul") else [(a, b)]
    for value, other in pairs:
        if _number(rewriter, other) == neutral and _shape(rewriter, value) == op.result.shape:
            return value
    return None


def _folded(rewriter: Rewriter, op: Op) -> Operand | None:
    """Operators of constants."""
    from planish.ir.relational.interpret import elementwise

    numbers = [_number(rewriter, o) for o in op.operands]
    if any(number is None for number in numbers):
        return None
    value = elementwise(op, [number for number in numbers if number is not None])
    if not math.isfinite(value):
        return None
    return rewriter.constant(value, op.result.shape)


def _chain(rewriter: Rewriter, op: Op) -> Operand | None:
    """(x * c) * d is x * (c d)."""
    for value, other in (op.operands, op.operands[::-1]):
        number, inner = _number(rewriter, other), rewriter.define(value)
        if number is None or inner is None or inner.kind != "mul" or inner.over != op.over or value.end:
            continue
        if _shape(rewriter, other) != ():
            continue
        for x, factor in (inner.operands, inner.operands[::-1]):
            known = _number(rewriter, factor)
            if known is not None and _shape(rewriter, x) == op.result.shape:
                return rewriter.emit("mul", x, rewriter.constant(known * number), over=op.over, name=op.name)
    return None


def _division(rewriter: Rewriter, op: Op) -> Operand | None:
    """x / c is x * (1 / c)."""
    a, b = op.operands
    number = _number(rewriter, b)
    if not number:
        return None
    factor = rewriter.constant(1.0 / number, _shape(rewriter, b))
    return rewriter.emit("mul", a, factor, over=op.over, name=op.name)


def _double(rewriter: Rewriter, op: Op) -> Operand | None:
    """-(-x)."""
    inner = rewriter.define(op.operands[0])
    return inner.operands[0] if inner is not None and inner.kind == "neg" and inner.over == op.over else None


def _reshape(rewriter: Rewriter, op: Op) -> Operand | None:
    (x,) = op.operands
    if _shape(rewriter, x) == op.result.shape:
        return x
    inner = rewriter.define(x)
    if inner is None or inner.kind != "reshape" or inner.over != op.over:
        return None
    return rewriter.emit("reshape", inner.operands[0], over=op.over, shape=op.result.shape, name=op.name)


def _same_shape(rewriter: Rewriter, op: Op) -> Operand | None:
    """expand and slice to the same shape."""
    return op.operands[0] if _shape(rewriter, op.operands[0]) == op.result.shape else None


def _fsum(rewriter: Rewriter, op: Op) -> Operand | None:
    """A sum over axes of size 1 is a reshape; one over the last axis of a product is an inner product."""
    (x,), axes = op.operands, op.attr("axes")
    shape = _shape(rewriter, x)
    if all(shape[axis] == 1 for axis in axes):
        return rewriter.emit("reshape", x, over=op.over, shape=op.result.shape, name=op.name)
    inner = rewriter.define(x)
    if axes != (len(shape) - 1,) or inner is None or inner.kind != "mul" or inner.over != op.over:
        return None
    if any(_shape(rewriter, o)[-1:] != shape[-1:] for o in inner.operands):
        return None
    return rewriter.emit("dot", *inner.operands, over=op.over, name=op.name)


def _mean(rewriter: Rewriter, op: Op) -> Operand:
    """The sum, divided by how many there are."""
    domain = op.result.domain
    total = rewriter.emit("sum", op.operands[0], over=op.over, domain=domain, by=op.by)
    count = rewriter.emit("count", over=op.over, domain=domain, by=op.by)
    count = rewriter.emit("max", count, rewriter.constant(1.0), over=domain)
    return rewriter.emit("div", total, count, over=domain, name=op.name)


def _unexpanded(rewriter: Rewriter, op: Op) -> Operand | None:
    """An operand that was broadcast to what the operator broadcasts it to."""
    for i, operand in enumerate(op.operands):
        inner = rewriter.define(operand)
        if inner is None or inner.kind != "expand" or inner.over != op.over or operand.end:
            continue
        operands = [*op.operands[:i], inner.operands[0], *op.operands[i + 1 :]]
        if broadcast(op.kind, *(_shape(rewriter, o) for o in operands)) == op.result.shape:
            return rewriter.emit(op.kind, *operands, over=op.over, name=op.name)
    return None


def _parts(rewriter: Rewriter, operand: Operand, op: Op) -> list[tuple[Operand, int, int]] | None:
    """(value, start, stop) of what is concatenated along the last axis in a value of edges."""
    inner = rewriter.define(operand)
    if inner is None or inner.kind != "concat" or inner.over != op.over or op.over != EDGE or operand.end:
        return None
    if inner.attr("axis") != len(inner.result.shape) - 1:
        return None
    found, start = [], 0
    for part in inner.operands:
        stop = start + _shape(rewriter, part)[-1]
        found.append((part, start, stop))
        start = stop
    return found


def _cut(rewriter: Rewriter, value: Operand, axis: int, start: int, stop: int) -> Operand:
    """A slice of a value, made where the value is, and read as the value is."""
    own = rewriter.known[value.name]
    cut = rewriter.emit("slice", value.name, over=own.domain, axis=axis, start=start, stop=stop)
    return Operand(cut.name, value.end)


def _total(rewriter: Rewriter, terms: list[Operand], op: Op) -> Operand:
    total = terms[0]
    for i, term in enumerate(terms[1:], 2):
        name = op.name if i == len(terms) else None
        total = rewriter.emit("add", total, term, over=op.over, name=name)
    return total


def _dot(rewriter: Rewriter, op: Op) -> Operand | None:
    """<[a; b], v> is <a, v'> + <b, v''>."""
    for value, other in (op.operands, op.operands[::-1]):
        parts = _parts(rewriter, value, op)
        if parts is None or rewriter.known[other.name].domain == EDGE:
            continue
        terms = [
            rewriter.emit("dot", part, _cut(rewriter, other, -1, start, stop), over=op.over)
            for part, start, stop in parts
        ]
        return _total(rewriter, terms, op)
    return None


def _linear(rewriter: Rewriter, op: Op) -> Operand | None:
    """[a; b] W is a W' + b W''."""
    x, weight = op.operands
    parts = _parts(rewriter, x, op)
    if parts is None:
        return None
    axis, options = (-1, {"transpose": True}) if op.attr("transpose") else (-2, {})
    terms = [
        rewriter.emit("linear", part, _cut(rewriter, weight, axis, start, stop), over=op.over, **options)
        for part, start, stop in parts
    ]
    return _total(rewriter, terms, op)


def _slice(rewriter: Rewriter, op: Op) -> Operand | None:
    """A slice of concatenated values that is one of them."""
    same = _same_shape(rewriter, op)
    if same is not None:
        return same
    inner = rewriter.define(op.operands[0])
    if inner is None or inner.kind != "concat" or inner.over != op.over or inner.attr("axis") != op.attr("axis"):
        return None
    start = 0
    for part in inner.operands:
        stop = start + _shape(rewriter, part)[op.attr("axis")]
        if (start, stop) == (op.attr("start"), op.attr("stop")) and rewriter.known[part.name].domain != NONE:
            return part
        start = stop
    return None


RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(UNARY | {"leaky_relu"}, (_folded,)),
    **dict.fromkeys(BINARY, (_folded, _unexpanded)),
    "copy": (_copy,),
    "neg": (_folded, _double),
    "add": (_folded, _neutral, _unexpanded),
    "sub": (_folded, _neutral, _unexpanded),
    "mul": (_folded, _neutral, _chain, _unexpanded),
    "div": (_folded, _neutral, _division, _unexpanded),
    "reshape": (_reshape,),
    "expand": (_same_shape,),
    "slice": (_slice,),
    "fsum": (_fsum,),
    "mean": (_mean,),
    "dot": (_dot,),
    "linear": (_linear,),
}
