"""What each operator is inside of a generated kernel, at one row and for a group of lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from planish.ir.relational.intra import Statement
from planish.runtime.cuda.relational.values import (
    SMALL,
    Index,
    Lazy,
    Memory,
    Same,
    Shape,
    Spread,
    Value,
    broadcast,
    combine,
    literal,
    strides,
    vector,
)

if TYPE_CHECKING:
    from planish.runtime.cuda.relational.group import Group

_UNARY = {
    "copy": "{x}",
    "neg": "-({x})",
    "exp": "expf({x})",
    "log": "logf({x})",
    "sqrt": "sqrtf({x})",
    "recip": "1.0f / ({x})",
    "abs": "fabsf({x})",
    "relu": "relu({x})",
    "tanh": "tanhf({x})",
    "sigmoid": "1.0f / (1.0f + expf(-({x})))",
    "erf": "erff({x})",
    "step": "(({x}) > 0.0f ? 1.0f : 0.0f)",
    "leaky_relu": "leaky_relu({x}, {slope})",
}
_BINARY = {
    "add": "{a} + {b}",
    "sub": "{a} - {b}",
    "mul": "{a} * {b}",
    "div": "{a} / {b}",
    "max": "Most::of({a}, {b})",
    "min": "Least::of({a}, {b})",
    "greater": "({a} > {b} ? 1.0f : 0.0f)",
    "equal": "({a} == {b} ? 1.0f : 0.0f)",
}


def apply(g: Group, statement: Statement, operands: Sequence[Value]) -> Value:
    """The result of an operator that is no reduction over rows."""
    kind, shape = statement.kind, statement.result.shape
    if kind in _UNARY:
        slope = literal(float(statement.attr("slope", 0.0)))
        return g.elementwise(shape, operands, lambda x: _UNARY[kind].format(x=x, slope=slope))
    if kind in _BINARY:
        return _binary(g, kind, shape, operands)
    if kind == "constant":
        value = literal(float(statement.attr("value")))
        return g.elementwise(shape, (), lambda: value) if math.prod(shape) <= SMALL else Lazy(shape, lambda _: value)
    rule: Callable[[Group, Statement, Sequence[Value]], Value] = {
        "dot": _dot,
        "linear": _linear,
        "outer": _outer,
        "fsum": _fsum,
        "reshape": lambda g, s, o: replace(o[0], shape=s.result.shape),
        "expand": lambda g, s, o: g.elementwise(s.result.shape, o, lambda x: x),
        "slice": _slice,
        "transpose": _transpose,
        "concat": _concat,
    }[kind]
    return rule(g, statement, operands)


def _binary(g: Group, kind: str, shape: Shape, operands: Sequence[Value]) -> Value:
    a, b = operands
    if kind == "div" and b.size < math.prod(shape) and b.size <= SMALL:
        # One division for many numbers.
        b = g.elementwise(b.shape, (b,), lambda x: f"1.0f / ({x})")
        kind = "mul"
    return g.elementwise(shape, (a, b), lambda x, y: _BINARY[kind].format(a=x, b=y))


def _sums(g: Group, shape: Shape, wide: Shape, operands: Sequence[Value], to: Callable[[Index], Index]) -> Value:
    """Sums of the products of operands, broadcast to `wide`, into a few numbers: each lane its part, then together."""
    sums = g.code.name("sums")
    size = math.prod(shape)
    g.code.add(f"float {sums}[{size}] = {{}};")
    spread = g.spread_type(math.prod(wide))
    terms = [g.own(o, wide) for o in operands]
    with g.code.block(f"EACH({spread})"):
        product = " * ".join(terms)
        if size == 1:
            g.code.add(f"{sums}[0] += {product};")
        else:
            g.code.add(f"add_to({sums}, {to('i')}, {product});")
    for c in range(size):
        g.code.add(f"{sums}[{c}] = join<Plus, G>({sums}[{c}], mask);")
    return Same(shape, sums)


def _serial(
    g: Group, shape: Shape, depth: int, operands: Sequence[Value], at: Callable[[Index, Index], Sequence[Index]]
) -> Value:
    """For each number of the result the sum over t of products; `at` says which numbers of the operands."""
    places = [g.addressable(o) for o in operands]

    def element(i: Index) -> str:
        total = g.code.name("total")
        g.code.add(f"float {total} = 0.0f;")
        with g.code.block(f"for (int t = 0; t < {depth}; ++t)"):
            read = [g.at(place, index) for place, index in zip(places, at(i, "t"), strict=True)]
            g.code.add(f"{total} += {' * '.join(read)};")
        return total

    return g.each(shape, element)


def _dot(g: Group, statement: Statement, operands: Sequence[Value]) -> Value:
    shape, depth = statement.result.shape, operands[0].shape[-1]
    wide = (*shape, depth)
    if math.prod(shape) <= SMALL < math.prod(wide):
        return _sums(g, shape, wide, operands, lambda i: f"({i}) / {depth}")

    def at(i: Index, t: Index) -> list[Index]:
        index = i * depth + t if isinstance(i, int) and isinstance(t, int) else f"(({i}) * {depth} + {t})"
        return [broadcast(index, wide, o.shape) for o in operands]

    return _serial(g, shape, depth, operands, at)


def _linear(g: Group, statement: Statement, operands: Sequence[Value]) -> Value:
    x, w = operands
    shape, depth, columns = statement.result.shape, x.shape[-1], statement.result.shape[-1]
    heads = w.shape[0] if len(w.shape) == 3 else 1
    if columns == 1:
        flat = replace(w, shape=(*w.shape[:-2], depth))
        as_dot = replace(statement, kind="dot", result=replace(statement.result, shape=shape[:-1]), attrs=())
        return replace(_dot(g, as_dot, (x, flat)), shape=shape)
    if math.prod(shape) <= SMALL < x.size:
        sums = g.code.name("sums")
        g.code.add(f"float {sums}[{math.prod(shape)}] = {{}};")
        own, matrix = g.own(x, x.shape), g.addressable(w)
        with g.code.block(f"EACH({g.spread_type(x.size)})"):
            row = f"i / {depth}"
            for c in range(columns):
                head = f"({row}) % {heads} * {depth * columns} + " if heads > 1 else ""
                product = f"{own} * {g.at(matrix, f'{head}i % {depth} * {columns} + {c}')}"
                if math.prod(shape) == columns:
                    g.code.add(f"{sums}[{c}] += {product};")
                else:
                    g.code.add(f"add_to({sums}, ({row}) * {columns} + {c}, {product});")
        for c in range(math.prod(shape)):
            g.code.add(f"{sums}[{c}] = join<Plus, G>({sums}[{c}], mask);")
        return Same(shape, sums)

    def at(i: Index, t: Index) -> list[Index]:
        row = f"({i}) / {columns}"
        head = f"({row}) % {heads} * {depth * columns} + " if heads > 1 else ""
        return [f"({row}) * {depth} + {t}", f"{head}{t} * {columns} + ({i}) % {columns}"]

    return _serial(g, shape, depth, operands, at)


def _outer(g: Group, statement: Statement, operands: Sequence[Value]) -> Value:
    """Within one row, over its leading axes."""
    x = operands[0]
    shape, (a, b) = statement.result.shape, statement.result.shape[-2:]
    heads = shape[0] if statement.attr("heads") else 1
    leading = x.size // (heads * a)

    def at(i: Index, t: Index) -> list[Index]:
        head = f"({i}) / {a * b}" if heads > 1 else "0"
        row = f"({i}) / {b} % {a}"
        return [f"({t} * {heads} + {head}) * {a} + {row}", f"({t} * {heads} + {head}) * {b} + ({i}) % {b}"]

    return _serial(g, shape, leading, operands, at)


def _fsum(g: Group, statement: Statement, operands: Sequence[Value]) -> Value:
    x, axes, shape = operands[0], set(statement.attr("axes")), statement.result.shape
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    own, result = strides(x.shape), strides(shape)
    if math.prod(shape) <= SMALL < x.size:
        steps = [0] * len(x.shape)
        for axis, step in zip(kept, result, strict=True):
            steps[axis] = step
        return _sums(g, shape, x.shape, (x,), lambda i: combine(i, x.shape, steps))
    gone = sorted(axes)
    inner = tuple(x.shape[axis] for axis in gone)

    def at(i: Index, t: Index) -> list[Index]:
        outside = combine(i, shape, [own[axis] for axis in kept])
        return [f"{outside} + {combine(t, inner, [own[axis] for axis in gone])}"]

    return _serial(g, shape, math.prod(inner), (x,), at)


def _slice(g: Group, statement: Statement, operands: Sequence[Value]) -> Value:
    x, axis, shape = g.addressable(operands[0]), statement.attr("axis"), statement.result.shape
    steps = strides(operands[0].shape)
    offset = statement.attr("start") * steps[axis]
    if isinstance(x, Memory) and all(n == 1 for n in shape[:axis]):  # consecutive numbers
        wide = vector(math.prod(shape))
        if offset % wide == 0 and x.aligned % wide == 0:
            return Memory(shape, f"({x.pointer} + {offset})", x.constant, wide)
    return g.settled(Lazy(shape, lambda i: g.at(x, combine(i, shape, steps, offset))))


def _transpose(g: Group, statement: Statement, operands: Sequence[Value]) -> Value:
    x, perm, shape = g.addressable(operands[0]), statement.attr("perm"), statement.result.shape
    own = strides(operands[0].shape)
    return g.settled(Lazy(shape, lambda i: g.at(x, combine(i, shape, [own[axis] for axis in perm]))))


def _concat(g: Group, statement: Statement, operands: Sequence[Value]) -> Value:
    axis, shape = statement.attr("axis"), statement.result.shape
    parts = [g.addressable(o) for o in operands]
    along = strides(shape)[axis]

    def rule(i: Index) -> str:
        found, start = "", 0
        pieces: list[tuple[int, str]] = []
        for part in parts:
            steps = strides(part.shape)
            index = combine(i, shape, steps, -start * steps[axis])
            start += part.shape[axis]
            pieces.append((start, index if isinstance(index, str) else str(index)))
        position: Index = i // along % shape[axis] if isinstance(i, int) else f"({i}) / {along} % {shape[axis]}"
        if isinstance(position, int):
            number = next(n for n, (stop, _) in enumerate(pieces) if position < stop)
            return g.at(parts[number], int(pieces[number][1]))
        for part, (stop, index) in reversed(list(zip(parts, pieces, strict=True))):
            read = g.at(part, index)
            found = read if not found else f"({position} < {stop} ? {read} : {found})"
        return found

    return g.settled(Lazy(shape, rule))


__all__ = ["Same", "Spread", "apply"]
