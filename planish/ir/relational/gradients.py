"""The derivative of each operator, written in operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from planish.ir.relational.builder import Builder
from planish.ir.relational.domains import NODE, Domain, compose, node_of
from planish.ir.relational.inter import Op, Operand


@dataclass(frozen=True)
class Reduced:
    """A gradient that already has the rows of the operand, not those of the loop."""

    value: Operand


class Tape(Builder):
    """A builder with what derivatives need often."""

    def node_types(self) -> int:
        """How many node types there are, as far as the program says."""
        joins = [len(op.operands) for op in self.ops if op.kind == "join"]
        return int(max(joins + [op.attr("index") + 1 for op in self.ops if op.kind == "pick"]))

    def shape(self, operand: Operand) -> tuple[int, ...]:
        return self.known[operand.name].shape

    def scaled(self, value: Operand, factor: float, over: Domain) -> Operand:
        return self.emit("mul", value, self.constant(factor), over=over)

    def like(self, value: Operand, shape: tuple[int, ...], over: Domain) -> Operand:
        """A gradient summed down to the shape that was broadcast."""
        given = self.shape(value)
        lead = len(given) - len(shape)
        axes = [i for i, size in enumerate(given) if i < lead or (size != 1 and shape[i - lead] == 1)]
        if axes:
            value = self.emit("fsum", value, over=over, axes=tuple(axes))
        return self.reshaped(value, shape, over)

    def reshaped(self, value: Operand, shape: tuple[int, ...], over: Domain) -> Operand:
        return value if self.shape(value) == shape else self.emit("reshape", value, over=over, shape=shape)

    def wide(self, value: Operand, shape: tuple[int, ...], over: Domain) -> Operand:
        return value if self.shape(value) == shape else self.emit("expand", value, over=over, shape=shape)

    def product(self, x: Operand, weight: Operand, over: Domain, transpose: bool) -> Operand:
        options: dict[str, Any] = {"transpose": True} if transpose else {}
        return self.emit("linear", x, weight, over=over, **options)

    def through(self, op: Op, value: Operand) -> Operand:
        """What the result's rows read, as the rows of the loop of a reduction read it."""
        own = self.known[value.name].domain
        return Operand(value.name, compose(op.over, op.result.domain, op.by, own, value.end))

    def result(self, op: Op) -> Operand:
        """The result of `op`, as the rows of its loop read it."""
        return self.through(op, Operand(op.name))


Rule = Callable[[Tape, Op, int, Operand], "Operand | Reduced | None"]


def _unary(derivative: Callable[[Tape, Op, Operand, Operand], Operand]) -> Rule:
    """From what the derivative is: a function of x and the result y."""

    def rule(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
        slope = derivative(tape, op, op.operands[0], Operand(op.name))
        return tape.emit("mul", g, slope, over=op.over)

    return rule


def _square_less(tape: Tape, op: Op, x: Operand, y: Operand) -> Operand:
    return tape.emit("sub", tape.constant(1.0), tape.emit("mul", y, y, over=op.over), over=op.over)


def _sigmoid(tape: Tape, op: Op, x: Operand, y: Operand) -> Operand:
    return tape.emit("mul", y, tape.emit("sub", tape.constant(1.0), y, over=op.over), over=op.over)


def _leaky(tape: Tape, op: Op, x: Operand, y: Operand) -> Operand:
    slope = float(op.attr("slope"))
    positive = tape.scaled(tape.emit("step", x, over=op.over), 1.0 - slope, op.over)
    return tape.emit("add", positive, tape.constant(slope), over=op.over)


def _erf(tape: Tape, op: Op, x: Operand, y: Operand) -> Operand:
    square = tape.emit("neg", tape.emit("mul", x, x, over=op.over), over=op.over)
    return tape.scaled(tape.emit("exp", square, over=op.over), 2.0 / math.sqrt(math.pi), op.over)


def _sign(tape: Tape, op: Op, x: Operand, y: Operand) -> Operand:
    negative = tape.emit("step", tape.emit("neg", x, over=op.over), over=op.over)
    return tape.emit("sub", tape.emit("step", x, over=op.over), negative, over=op.over)


def _recip(tape: Tape, op: Op, x: Operand, y: Operand) -> Operand:
    return tape.emit("neg", tape.emit("mul", y, y, over=op.over), over=op.over)


def _copy(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return g


def _neg(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return tape.emit("neg", g, over=op.over)


def _log(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return tape.emit("div", g, op.operands[0], over=op.over)


def _sqrt(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return tape.emit("div", tape.scaled(g, 0.5, op.over), Operand(op.name), over=op.over)


def _fit(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return tape.like(g, tape.shape(op.operands[i]), op.over)


def _add(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return _fit(tape, op, i, g)


def _sub(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return _fit(tape, op, i, g) if i == 0 else _neg(tape, op, i, _fit(tape, op, i, g))


def _mul(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return _fit(tape, op, i, tape.emit("mul", g, op.operands[1 - i], over=op.over))


def _div(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    part = tape.emit("div", g, op.operands[1], over=op.over)
    if i == 1:
        part = _neg(tape, op, i, tape.emit("mul", part, Operand(op.name), over=op.over))
    return _fit(tape, op, i, part)


def _extreme(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    """max and min of two: the chosen one gets the gradient; equal ones get half of it each."""
    own, other = op.operands[i], op.operands[1 - i]
    first, second = (own, other) if op.kind == "max" else (other, own)
    more = tape.emit("greater", first, second, over=op.over)
    equal = tape.scaled(tape.emit("equal", own, other, over=op.over), 0.5, op.over)
    share = tape.emit("add", more, equal, over=op.over)
    return _fit(tape, op, i, tape.emit("mul", g, share, over=op.over))


def _linear(tape: Tape, op: Op, i: int, g: Operand) -> Operand | Reduced:
    x, weight = op.operands
    turned = bool(op.attr("transpose"))
    if i == 0:
        return tape.product(g, weight, op.over, transpose=not turned)
    heads: dict[str, Any] = {"heads": True} if len(tape.shape(weight)) == 3 else {}
    domain = tape.known[weight.name].domain
    both = (g, x) if turned else (x, g)
    return Reduced(tape.emit("outer", *both, over=op.over, domain=domain, by=weight.end, **heads))


def _dot(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    column = tape.reshaped(g, (*tape.shape(g), 1), op.over)
    return _fit(tape, op, i, tape.emit("mul", column, op.operands[1 - i], over=op.over))


def _outer(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return tape.product(op.operands[1 - i], tape.through(op, g), op.over, transpose=i == 0)


def _sum(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return tape.through(op, g)


def _mean(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    domain = op.result.domain
    count = tape.emit("count", over=op.over, domain=domain, by=op.by)
    count = tape.emit("max", count, tape.constant(1.0), over=domain)
    return tape.through(op, tape.emit("div", g, count, over=domain))


def _extreme_rows(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    """Every row that has the largest value gets an even share."""
    domain, (x,) = op.result.domain, op.operands
    chosen = tape.emit("equal", x, tape.result(op), over=op.over)
    ties = tape.emit("sum", chosen, over=op.over, domain=domain, by=op.by)
    ties = tape.emit("max", ties, tape.constant(1.0), over=domain)
    share = tape.emit("div", g, ties, over=domain)
    return tape.emit("mul", chosen, tape.through(op, share), over=op.over)


def _edge_softmax(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    y = Operand(op.name)
    product = tape.emit("mul", g, y, over=op.over)
    total = tape.emit("sum", product, over=op.over, domain=NODE, by=op.by)
    rest = tape.emit("mul", y, Operand(total.name, op.by), over=op.over)
    return tape.emit("sub", product, rest, over=op.over)


def _fsum(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    shape = tape.shape(op.operands[0])
    kept = tuple(1 if axis in op.attr("axes") else size for axis, size in enumerate(shape))
    return tape.wide(tape.reshaped(g, kept, op.over), shape, op.over)


def _reshape(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    return tape.reshaped(g, tape.shape(op.operands[0]), op.over)


def _transpose(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    perm = op.attr("perm")
    return tape.emit("transpose", g, over=op.over, perm=tuple(perm.index(axis) for axis in range(len(perm))))


def _slice(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    shape, axis = tape.shape(op.operands[0]), op.attr("axis")
    sizes = (op.attr("start"), shape[axis] - op.attr("stop"))
    before, after = ([tape.constant(0.0, (*shape[:axis], size, *shape[axis + 1 :]))] if size else [] for size in sizes)
    if not before and not after:
        return g
    return tape.emit("concat", *before, g, *after, over=op.over, axis=axis)


def _concat(tape: Tape, op: Op, i: int, g: Operand) -> Operand:
    axis = op.attr("axis")
    sizes = [tape.shape(o)[axis] for o in op.operands]
    start = sum(sizes[:i])
    return tape.emit("slice", g, over=op.over, axis=axis, start=start, stop=start + sizes[i])


def _join(tape: Tape, op: Op, i: int, g: Operand) -> Reduced:
    return Reduced(tape.emit("pick", tape.emit("copy", g, over=NODE) if g.end else g, index=i))


def _pick(tape: Tape, op: Op, i: int, g: Operand) -> Reduced:
    own, zero = op.attr("index"), tape.constant(0.0)
    shape = tape.shape(op.operands[0])
    whole = tape.emit("copy", g, over=op.result.domain)
    parts = [
        whole if k == own else tape.emit("expand", zero, over=node_of(k), shape=shape) for k in range(tape.node_types())
    ]
    return Reduced(tape.emit("join", *parts))


def _none(tape: Tape, op: Op, i: int, g: Operand) -> None:
    return None


RULES: dict[str, Rule] = {
    "copy": _copy,
    "neg": _neg,
    "exp": _unary(lambda tape, op, x, y: y),
    "log": _log,
    "sqrt": _sqrt,
    "recip": _unary(_recip),
    "abs": _unary(_sign),
    "relu": _unary(lambda tape, op, x, y: tape.emit("step", x, over=op.over)),
    "leaky_relu": _unary(_leaky),
    "tanh": _unary(_square_less),
    "sigmoid": _unary(_sigmoid),
    "erf": _unary(_erf),
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "max": _extreme,
    "min": _extreme,
    "linear": _linear,
    "dot": _dot,
    "outer": _outer,
    "sum": _sum,
    "mean": _mean,
    "max_rows": _extreme_rows,
    "min_rows": _extreme_rows,
    "edge_softmax": _edge_softmax,
    "fsum": _fsum,
    "expand": _fit,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "concat": _concat,
    "join": _join,
    "pick": _pick,
    "step": _none,
    "greater": _none,
    "equal": _none,
    "constant": _none,
    "count": _none,
}
