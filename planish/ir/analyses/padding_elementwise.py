"""Padding through operators that make each number of the numbers at its own place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from planish.ir.analyses.padding_facts import LOWEST, Affine, Fact, Held, Known, Mixes, Size, Span, State

if TYPE_CHECKING:
    from planish.ir.analyses.padding import Flow

_NUMBERS: dict[str, Callable[..., Any]] = {
    "Add": lambda *v: sum(v),
    "Sum": lambda *v: sum(v),
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Neg": lambda a: -a,
    "Abs": abs,
    "And": lambda a, b: bool(a) and bool(b),
    "Or": lambda a, b: bool(a) or bool(b),
    "Xor": lambda a, b: bool(a) != bool(b),
    "Not": lambda a: not a,
    "Equal": lambda a, b: a == b,
    "Less": lambda a, b: a < b,
    "Greater": lambda a, b: a > b,
    "LessOrEqual": lambda a, b: a <= b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Where": lambda c, a, b: a if c else b,
    "Min": min,
    "Max": max,
    "Identity": lambda a: a,
    "Relu": lambda a: max(a, 0.0),
    "IsNaN": math.isnan,
}
_LOGIC = frozenset(
    ("And", "Or", "Xor", "Not", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "IsNaN", "IsInf")
)
#: Finite numbers in, finite numbers out.
_FINITE = frozenset(
    (
        *("Add", "Sum", "Sub", "Mul", "Neg", "Abs", "Where", "Min", "Max", "Identity", "Cast", "CastLike", "Clip"),
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Erf", "Tanh", "Sigmoid", "HardSigmoid"),
        *("HardSwish", "Swish", "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Sin", "Cos", "Atan", "Sign"),
        *("Floor", "Ceil", "Round", "Dropout", "QuickGelu", "FastGelu", "BiasGelu", "SwiGLU", "Mean"),
        *("QuantizeLinear", "DequantizeLinear"),
    )
)
_REST = frozenset(
    ("Div", "Pow", "Sqrt", "Exp", "Log", "Reciprocal", "Mod", "Tan", "Asin", "Acos", "Sinh", "Cosh", "Asinh", "Acosh")
) | frozenset(("Atanh", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift"))
NAMES = _FINITE | _LOGIC | _REST


def elementwise(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """Operands are broadcast; what is known of padding is calculated where all of it is known."""
    given = _operands(node, args)
    if any(a.rank is None for a in given):
        raise Mixes("the rank of an operand is not known")
    rank = max(a.rank or 0 for a in given)
    affine = _affine(node, given, rank)
    sizes: list[Size | None] = []
    spans: dict[int, Span] = {}
    for axis in range(rank):
        parts = [(a, axis - rank + (a.rank or 0)) for a in given]
        sizes.append(_broadcast([a.size(at) if at >= 0 else None for a, at in parts if at >= 0]))
        carried = [a.spans[at] for a, at in parts if at in a.spans]
        if not carried:
            continue
        if any(not span.like(carried[0]) for span in carried):
            raise Mixes("its operands carry the dimension in different ways")
        if any(at >= 0 and at not in a.spans and (a.size(at) is None or {*a.size(at)} != {1}) for a, at in parts):  # type: ignore[misc]
            raise Mixes("an operand has an axis of another size in the place of the dimension")
        spans[axis] = carried[0]
    for axis, span in list(spans.items()):
        facts = [_fact(a, axis - rank + (a.rank or 0)) for a in given]
        if node.op_type in ("Div", "Mod") and _whole(given[1]) and facts[1] in (*Fact, Known(0.0)):
            raise Mixes("may divide by zero in the padding")
        fact = _combine(node, facts, given)
        if node.op_type in _LOGIC and fact is Fact.ANY:
            fact = _compare(flow, node, given, rank, axis, spans)
        spans[axis] = replace(span, fact=fact)
    low = any((isinstance(s.fact, Known) and s.fact.value < -65504) or s.fact is Fact.LOW for s in spans.values())
    state = _state(node, given)
    if low and node.op_type == "Cast" and node.attributes.get_int("to", 1) == ir.DataType.FLOAT16:
        state = max(state, State.OPEN)
    below = given[0].below if node.op_type in ("Identity", "Cast") else None
    diagonal = _diagonal(node, given, rank, spans)
    return [Held(tuple(sizes), spans, state, affine, below, diagonal=diagonal)] + [None] * (len(node.outputs) - 1)


def _operands(node: ir.Node, args: Sequence[Held | None]) -> list[Held]:
    if node.op_type in ("Dropout", "CastLike"):
        if len(args) > 2 and args[2] is not None and args[2].constant != 0:
            raise Mixes("it drops at random")
        args = args[:1]
    channels = node.op_type in ("QuantizeLinear", "DequantizeLinear") and [a.table for a in args[1:] if a is not None]
    if channels and any(table is None or table.size > 1 for table in channels):
        raise Mixes("its scale is not one number")
    return [a for a in args if a is not None]


def _whole(arg: Held) -> bool:
    return "INT" in arg.dtype


def _broadcast(sizes: Sequence[Size | None]) -> Size | None:
    known = [n for n in sizes if n is not None and {*n} != {1}]
    if known:
        return known[0]
    return None if None in sizes else next(iter(sizes), None)


def _fact(arg: Held, axis: int) -> Fact | Known | None:
    """Of an operand beyond the real size; None: without this axis, it is the same at every position of it."""
    if arg.constant is not None:
        return Known(arg.constant)
    return arg.spans[axis].fact if axis in arg.spans else None


def _combine(node: ir.Node, facts: Sequence[Any], given: Sequence[Held]) -> Fact | Known:
    op = node.op_type
    if all(isinstance(f, Known) for f in facts):
        value = evaluate(node, [f.value for f in facts])
        if value is not None:
            return Known(value)
    if op in ("Identity", "Dropout") or (op == "Cast" and node.attributes.get_int("to", 1) in _FLOATS):
        return facts[0] if isinstance(facts[0], Fact) else Fact.ANY
    if op in ("And", "Or"):
        absorbing = Known(float(op == "Or"))
        if absorbing in facts:
            return absorbing
        return Fact.FREE if all(f in (None, Fact.FREE, Known(1.0)) for f in facts) else Fact.ANY
    if op == "Where":
        return _where(facts, given)
    if op in ("Add", "Sum"):
        quiet = all(a.state is not State.ANY for a in given)
        if quiet and any(f is Fact.LOW or (isinstance(f, Known) and f.value <= LOWEST) for f in facts):
            return Fact.LOW
        ranged = [f in (None, Fact.FREE) or a.state is State.FINITE for f, a in zip(facts, given, strict=True)]
        return Fact.FREE if all(ranged) and quiet else Fact.ANY
    if (
        op == "Mul"
        and Known(0.0) in facts
        and all(a.state is State.FINITE for f, a in zip(facts, given, strict=True) if f != Known(0.0))
    ):
        return Known(0.0)
    return Fact.ANY


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL)


def _where(facts: Sequence[Any], given: Sequence[Held]) -> Fact | Known:
    condition, yes, no = facts
    if isinstance(condition, Known):
        chosen = yes if condition.value else no
        return Fact.ANY if chosen is None else chosen  # type: ignore[no-any-return]
    if isinstance(yes, Known) and yes == no:
        return yes
    hides = isinstance(no, Known) and no.value <= LOWEST
    if hides and condition in (None, Fact.FREE) and given[1].state is State.FINITE:
        return Fact.FREE
    return Fact.ANY


def evaluate(node: ir.Node, values: Sequence[float]) -> float | None:
    """What an operator makes of numbers; None: not calculated here."""
    op = node.op_type
    if op == "Cast":
        to = ir.DataType(node.attributes.get_int("to", 1))
        if to == ir.DataType.BOOL:
            return float(values[0] != 0)
        if to.is_floating_point():
            return float(values[0])
        return float(int(values[0])) if math.isfinite(values[0]) else None
    if op == "Div":
        whole = values[1] and (values[0] / values[1]).is_integer() if math.isfinite(sum(values)) else False
        return values[0] / values[1] if whole else None
    if op == "Clip":
        return min(max(values[0], values[1]), values[2]) if len(values) == 3 else None
    if op not in _NUMBERS:
        return None
    value = float(_NUMBERS[op](*values))
    return None if math.isnan(value) else value


# --- functions of positions -----------------------------------------------------------------------------------------


def _affine(node: ir.Node, given: Sequence[Held], rank: int) -> Affine | None:
    shifted = []
    for a in given:
        if a.affine is None:
            return None
        moved = a.affine.moved({axis: axis + rank - (a.rank or 0) for axis in range(a.rank or 0)})
        assert moved is not None
        shifted.append(moved)
    if all(not a.steps for a in shifted):
        value = evaluate(node, [a.start for a in shifted])
        return None if value is None else Affine(value)
    op = node.op_type
    if op in ("Identity", "Cast") and (op == "Identity" or node.attributes.get_int("to", 1) != ir.DataType.BOOL):
        return shifted[0] if all(float(n).is_integer() for n in shifted[0].steps.values()) else None
    if op == "Neg":
        return shifted[0].times(-1)
    if op in ("Add", "Sub"):
        return shifted[0].plus(shifted[1], 1 if op == "Add" else -1)
    if op == "Mul":
        for one, other in (shifted, shifted[::-1]):
            if not other.steps:
                return one.times(other.start)
    if op in _LOGIC and len(shifted) == 2:
        difference = shifted[0].plus(shifted[1], -1)
        if not difference.steps:
            return Affine(float(_NUMBERS[op](difference.start, 0)))
    return None


def _compare(
    flow: Flow, node: ir.Node, given: Sequence[Held], rank: int, axis: int, spans: Mapping[int, Span]
) -> Fact | Known:
    """A comparison of positions, beyond the real size along `axis` and within it along others."""
    affines = [
        None if a.affine is None else a.affine.moved({k: k + rank - (a.rank or 0) for k in range(a.rank or 0)})
        for a in given
    ]
    if len(affines) != 2 or None in affines or not all(span.plain for span in spans.values()):
        return Fact.ANY
    difference = affines[0].plus(affines[1], -1)  # type: ignore[union-attr, arg-type]
    low = _least(difference, axis, spans, flow.least)
    high = -_least(difference.times(-1), axis, spans, flow.least)
    always: bool | None = None
    if node.op_type in ("LessOrEqual", "Greater"):
        always = True if high <= 0 else False if low > 0 else None
    elif node.op_type in ("Less", "GreaterOrEqual"):
        always = True if high < 0 else False if low >= 0 else None
    elif node.op_type == "Equal" and (low > 0 or high < 0):
        always = False
    if always is None:
        return Fact.ANY
    return Known(float(always != node.op_type.startswith("Greater")))


def _diagonal(node: ir.Node, given: Sequence[Held], rank: int, spans: Mapping[int, Span]) -> bool:
    """Whether each query sees its own position in a mask."""
    op = node.op_type
    last = (spans.get(rank - 2), spans.get(rank - 1))
    if last[0] is None or last[1] is None or not last[0].plain or not last[0].like(last[1]):
        return False
    if op in ("And", "Cast", "Identity"):
        return all(a.diagonal or a.constant == 1 for a in given)
    if op in ("Or", "Add"):
        return any(a.diagonal for a in given) and (op == "Or" or all(a.diagonal or not a.state for a in given))
    if op == "Where":
        return given[0].diagonal and given[1].state is State.FINITE and given[1].rank == 0
    moved = [a.affine and a.affine.moved({k: k + rank - (a.rank or 0) for k in range(a.rank or 0)}) for a in given]
    if len(moved) != 2 or moved[0] is None or moved[1] is None or op not in _LOGIC:
        return False
    difference = moved[0].plus(moved[1], -1)
    along = difference.steps.get(rank - 2, 0) + difference.steps.get(rank - 1, 0)
    here = not along and not difference.steps.keys() - {rank - 2, rank - 1}
    return here and bool(_NUMBERS[op](difference.start, 0))


def _least(difference: Affine, axis: int, spans: Mapping[int, Span], smallest: int) -> float:
    """A lower bound: the index along `axis` is the real size or more, along other spans less than that."""
    total, slope = difference.start, 0.0
    for at, step in difference.steps.items():
        if at == axis:
            if step < 0:
                return -math.inf
            total, slope = total + step * spans[at].plus, slope + step
        elif step < 0:
            if at not in spans:
                return -math.inf
            total, slope = total + step * (spans[at].plus - 1), slope + step
    return total + slope * smallest if slope >= 0 else -math.inf


def _state(node: ir.Node, given: Sequence[Held]) -> State:
    op = node.op_type
    states = [a.state for a in given]
    worst = max(states, default=State.FINITE)
    if op in _LOGIC:
        return State.FINITE
    if op == "Where":
        return max(states[1:])
    if op == "Div":
        divisor = given[1].constant
        return State.FINITE if worst is State.FINITE and divisor not in (None, 0) else State.ANY
    if op == "Pow":
        power = given[1].constant
        whole = power is not None and power >= 0 and power.is_integer()
        return State.FINITE if worst is State.FINITE and whole else State.ANY
    if op not in _FINITE or worst is State.ANY:
        return State.ANY
    if worst is State.OPEN and op not in ("Add", "Sum", "Cast", "Identity", "Dropout", "Min", "Max"):
        return State.ANY
    return worst
