"""What each operator is inside of a kernel, at one row: an expression where it is read, or a loop over features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from planish.ir.relational.intra import Statement
from planish.runtime.kernels import tir_math
from planish.runtime.kernels.loops import local, script
from planish.runtime.relational.values import (
    Computed,
    Lead,
    Stored,
    Value,
    horizontal,
    in_registers,
    integer,
    load,
    number,
    pieces,
    save,
    spread,
    sweep,
)


def _select(condition: Any, yes: Any, no: Any) -> Any:
    import tvm.tirx as tx

    return tx.Select(condition, yes, no)


def _unary(kind: str) -> Callable[..., Any]:
    import tvm.tirx as tx

    def like(x: Any, value: float) -> Any:
        lanes = str(x.ty.dtype).removeprefix("float32x")
        return number(value, int(lanes) if lanes.isdigit() else 1)

    rules: dict[str, Callable[..., Any]] = {
        "copy": lambda x: x,
        "neg": lambda x: like(x, 0.0) - x,
        "exp": tir_math.exp,
        "log": tx.log,
        "sqrt": tx.sqrt,
        "recip": lambda x: like(x, 1.0) / x,
        "abs": tx.abs,
        "relu": tir_math.relu,
        "tanh": tir_math.tanh,
        "sigmoid": tir_math.sigmoid,
        "erf": tir_math.erf,
        "step": lambda x: _select(x > like(x, 0.0), like(x, 1.0), like(x, 0.0)),
        "leaky_relu": lambda x, slope: _select(x > like(x, 0.0), x, x * like(x, slope)),
    }
    return rules[kind]


def _binary(kind: str) -> Callable[[Any, Any, int], Any]:
    import tvm.tirx as tx

    return {
        "add": lambda a, b, n: a + b,
        "sub": lambda a, b, n: a - b,
        "mul": lambda a, b, n: a * b,
        "div": lambda a, b, n: a / b,
        "max": lambda a, b, n: tx.max(a, b),
        "min": lambda a, b, n: tx.min(a, b),
        "greater": lambda a, b, n: _select(a > b, number(1, n), number(0, n)),
        "equal": lambda a, b, n: _select(tx.EQ(a, b), number(1, n), number(0, n)),
    }[kind]


_UNARIES = frozenset("copy neg exp log sqrt recip abs relu tanh sigmoid erf step leaky_relu".split())  # noqa: SIM905
_BINARIES = frozenset("add sub mul div max min greater equal".split())  # noqa: SIM905


def stored(value: Value, lanes: int) -> Stored:
    """The value in a buffer."""
    if isinstance(value, Stored):
        return value
    room = in_registers(value.shape)
    sweep(value.shape, lanes, lambda lead, offset, n: room.put(lead, offset, n, value.at(lead, offset, n)))
    return room


def _scalars(value: Value, size: int, lanes: int) -> Value:
    """A value that is broadcast to `size` numbers, loaded or computed once."""
    if value.size >= size or value.size > 16 or (value.shape and value.shape[-1] != 1):
        return value
    room = in_registers(value.shape)
    sweep(value.shape, lanes, lambda lead, offset, n: room.put(lead, offset, n, value.at(lead, offset, n)))
    return room


def apply(statement: Statement, operands: Sequence[Value], lanes: int) -> Value:
    """The result of an operator that is no reduction over rows."""
    kind, shape = statement.kind, statement.result.shape
    size = math.prod(shape)
    if kind in _UNARIES:
        options = {"slope": statement.attr("slope")} if kind == "leaky_relu" else {}
        unary = _unary(kind)
        (x,) = operands
        return Computed(shape, lambda lead, offset, n: unary(x.at(lead, offset, n), **options))
    if kind in _BINARIES:
        binary = _binary(kind)
        a, b = (_scalars(o, size, lanes) for o in operands)
        if kind == "div" and isinstance(b, Stored) and b is not operands[1]:
            # One division for many numbers.
            inverse = in_registers(b.shape)
            sweep(b.shape, lanes, lambda lead, at, n: inverse.put(lead, at, n, number(1, n) / b.at(lead, at, n)))
            binary, b = _binary("mul"), inverse
        return Computed(
            shape,
            lambda lead, offset, n: binary(a.fetch(shape, lead, offset, n), b.fetch(shape, lead, offset, n), n),
        )
    if kind == "constant":
        value = float(statement.attr("value"))
        return Computed(shape, lambda lead, offset, n: number(value, n))
    rule = {"dot": _dot, "linear": _linear, "outer": _outer, "fsum": _fsum}.get(kind)
    return rule(statement, operands, lanes) if rule else _view(statement, operands, lanes)


def _dot(statement: Statement, operands: Sequence[Value], lanes: int) -> Value:
    shape = statement.result.shape
    width = operands[0].shape[-1]
    wide = (*shape, width)
    # An operand that is used for several rows of the other is computed once.
    a, b = (o if o.size == math.prod(wide) or isinstance(o, Stored) else stored(o, lanes) for o in operands)
    result = in_registers(shape)

    def element(lead: Lead, offset: Any, n: int) -> None:
        assert n == 1
        sums = [(local(w), w) for w in dict.fromkeys(w for _, w in pieces(width, lanes))]
        by_lanes = {w: buffer for buffer, w in sums}
        for w, buffer in by_lanes.items():
            save(buffer, 0, number(0, w), w)
        inner = (*lead, offset) if shape else ()

        def add(_: Lead, at: Any, w: int) -> None:
            product = a.fetch(wide, inner, at, w) * b.fetch(wide, inner, at, w)
            save(by_lanes[w], 0, load(by_lanes[w], 0, w) + product, w)

        sweep((width,), lanes, add)
        result.put(lead, offset, 1, horizontal([(buffer, w) for w, buffer in by_lanes.items()]))

    sweep(shape, 1, element)
    return result


def _linear(statement: Statement, operands: Sequence[Value], lanes: int) -> Value:
    """A product with few columns, or of a few rows: no tiles."""
    T = script()
    x, w = stored(operands[0], lanes), operands[1]
    shape, depth, columns = statement.result.shape, operands[0].shape[-1], statement.result.shape[-1]
    heads = len(w.shape) == 3
    assert isinstance(w, Stored)
    if columns == 1 and not heads:
        flat = w.reshaped((depth,))
        dot = Statement("dot", _renamed(statement, shape[:-1]))
        return stored(_dot(dot, (x, flat), lanes), lanes).reshaped(shape)
    result = in_registers(shape)

    def line(lead: Lead) -> None:
        sweep((columns,), lanes, lambda _, at, n: result.put(lead, at, n, number(0, n)))
        with T.serial(integer(depth)) as k:
            factor = local()
            save(factor, 0, x.at(lead, k, 1), 1)

            def add(_: Lead, at: Any, n: int) -> None:
                weight = w.at((lead[-1], k) if heads else (k,), at, n)
                result.put(lead, at, n, result.at(lead, at, n) + spread(factor[0], n) * weight)

            sweep((columns,), lanes, add)

    _each(shape[:-1], line)
    return result


def _each(leading: Sequence[int], body: Callable[[Lead], None]) -> None:
    """A loop over leading indices."""
    if not leading:
        body(())
    else:
        sweep(tuple(leading), 1, lambda lead, offset, _: body((*lead, offset)))


def _renamed(statement: Statement, shape: tuple[int, ...]) -> Any:
    from dataclasses import replace

    return replace(statement.result, shape=shape)


def _outer(statement: Statement, operands: Sequence[Value], lanes: int) -> Value:
    """Within one row; over its leading axes."""
    x, y = (stored(o, lanes) for o in operands)
    heads = bool(statement.attr("heads"))
    leading = x.shape[: -2 if heads else -1]

    def rule(lead: Lead, offset: Any, n: int) -> Any:
        total: Any = None
        tail = (lead[0],) if heads else ()
        for index in _indices(leading):
            term = spread(x.at((*index, *tail), lead[-1], 1), n) * y.at((*index, *tail), offset, n)
            total = term if total is None else total + term
        return total

    return Computed(statement.result.shape, rule)


def _indices(shape: Sequence[int]) -> list[tuple[int, ...]]:
    import itertools

    return list(itertools.product(*(range(size) for size in shape)))


def _fsum(statement: Statement, operands: Sequence[Value], lanes: int) -> Value:
    x = stored(operands[0], lanes)
    axes, shape = set(statement.attr("axes")), x.shape
    result = in_registers(statement.result.shape)
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    sweep(result.shape, lanes, lambda lead, offset, n: result.put(lead, offset, n, number(0, n)))

    def add(lead: Lead, offset: Any, n: int) -> None:
        index = (*lead, offset)
        if kept and kept[-1] == len(shape) - 1:
            to = tuple(index[axis] for axis in kept)
            result.put(to[:-1], to[-1], n, result.at(to[:-1], to[-1], n) + x.at(lead, offset, n))
            return
        to = tuple(lead[axis] for axis in kept)
        part = local(n)
        save(part, 0, x.at(lead, offset, n), n)
        leading, last = (to[:-1], to[-1]) if to else ((), 0)
        result.put(leading, last, 1, result.at(leading, last, 1) + horizontal([(part, n)]))

    sweep(shape, lanes, add)
    return result


def _view(statement: Statement, operands: Sequence[Value], lanes: int) -> Value:
    kind, shape = statement.kind, statement.result.shape
    x = operands[0]
    if kind == "reshape":
        return stored(x, lanes).reshaped(shape)
    if kind == "expand":
        return Computed(shape, lambda lead, offset, n: x.fetch(shape, lead, offset, n))
    if kind == "slice":
        return _slice(statement, x)
    if kind == "concat":
        return _concat(statement, operands, lanes)
    assert kind == "transpose", f"no rule for operator '{kind}'"
    perm = statement.attr("perm")
    if perm[-1] == len(perm) - 1:
        back = [perm.index(axis) for axis in range(len(perm) - 1)]
        return Computed(shape, lambda lead, offset, n: x.at(tuple(lead[axis] for axis in back), offset, n))
    source, result = stored(x, lanes), in_registers(shape)

    def move(lead: Lead, offset: Any, _: int) -> None:
        index = (*lead, offset)
        origin = tuple(index[perm.index(axis)] for axis in range(len(perm)))
        result.put(lead, offset, 1, source.at(origin[:-1], origin[-1], 1))

    sweep(shape, 1, move)
    return result


def _slice(statement: Statement, x: Value) -> Value:
    axis, start = statement.attr("axis"), statement.attr("start")
    last = axis == len(x.shape) - 1

    def rule(lead: Lead, offset: Any, n: int) -> Any:
        if last:
            return x.at(lead, offset + start, n)
        return x.at(tuple(i + start if a == axis else i for a, i in enumerate(lead)), offset, n)

    return Computed(statement.result.shape, rule)


def _concat(statement: Statement, operands: Sequence[Value], lanes: int) -> Value:
    axis, result, start = statement.attr("axis"), in_registers(statement.result.shape), 0
    for x in operands:

        def move(lead: Lead, offset: Any, n: int, x: Value = x, start: int = start) -> None:
            index = [*lead, offset]
            index[axis] = index[axis] + start
            result.put(tuple(index[:-1]), index[-1], n, x.at(lead, offset, n))

        sweep(x.shape, lanes, move)
        start += x.shape[axis]
    return result
