"""Elementwise operators: broadcasting, and one expression over TIR for each operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.runtime.relax.operand import Lazy, Operand, stored
from planish.runtime.relax.translator import Translator, attribute, emits

#: (translator, node, expressions) → the expression of the result.
Expression = Callable[[Translator, ir.Node, Sequence[Any]], Any]
#: Operators that become one loop at most.
LONGEST = 16
_COMPARE = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_LOGIC = ("And", "Or", "Xor", "Not", "IsNaN", "IsInf")


def broadcast(t: Translator, operands: Sequence[Operand]) -> tuple[list[Any], list[Operand]]:
    """The sizes of a broadcast, and the operands with the sizes that this asks of them.

    Sizes that can not be proved equal are taken for equal, and a run checks that they are.
    """
    rank = max(o.rank for o in operands)
    dims: list[Any] = []
    for axis in range(rank):
        found: Any = 1
        for operand in operands:
            at = axis - rank + operand.rank
            size = t.plain(operand.dims[at]) if at >= 0 else 1
            if isinstance(size, int) and size == 1:
                continue
            # A number is more certain than an expression, a symbol more than a longer one.
            if (isinstance(found, int) and found == 1) or (
                not isinstance(found, int) and isinstance(size, int | t.tir.Var)
            ):
                found = size
        dims.append(found)
    fitted = []
    for operand in operands:
        own = dims[rank - operand.rank :]
        wanted = [size if _is_one(t, size) else d for size, d in zip(operand.dims, own, strict=True)]
        fitted.append(t.match(operand, wanted))
    return dims, fitted


def _is_one(t: Translator, size: Any) -> bool:
    size = t.plain(size)
    return isinstance(size, int) and size == 1


def _order(operands: Sequence[Operand], rank: int) -> tuple[int, ...] | None:
    """The order of storage that the result takes over from its operands."""
    orders = {o.order for o in operands if o.rank == rank and o.order is not None}
    return orders.pop() if len(orders) == 1 else None


def elementwise(t: Translator, name: str, operands: Sequence[Operand], body: Callable[..., Any], dtype: str) -> Operand:
    """The operands broadcast, and `body` of their elements."""
    dims, operands = broadcast(t, operands)
    rank = len(dims)
    order = _order(operands, rank)
    own = order or tuple(range(rank))
    variables: list[Any] = []
    readers: list[Callable[[Any, Any], Any]] = []
    for operand in operands:
        number = operand.scalar()
        if number is not None:
            readers.append(_number(t, number, operand.dtype))
            continue
        # Operands of full rank are read in the order of the result; the others are small.
        var = t.arranged(operand, order) if operand.rank == rank else t.tensor(operand)
        if isinstance(var, Lazy) and (var.length > LONGEST or not _whole(t, operand, dims)):
            var = t.stored(operand) if operand.order == order else t.force(var)
        axes = own if operand.rank == rank else tuple(range(operand.rank))
        readers.append(_reader(t, len(variables), operand, own, axes))
        variables.append(var)

    def element(indices: Sequence[Any], *tensors: Any) -> Any:
        return body(*[read(indices, tensors) for read in readers])

    var = t.compute(name, variables, element, stored(dims, order), dtype)
    return Operand(dtype, dims, var, order=order)


def _whole(t: Translator, operand: Operand, dims: Sequence[Any]) -> bool:
    """Whether no element of an operand is read twice."""
    return all(t.equal(a, b) for a, b in zip(operand.dims, dims, strict=True))


def _number(t: Translator, number: Any, dtype: str) -> Callable[[Any, Any], Any]:
    if dtype == "bool":
        return lambda indices, tensors: t.tir.const(bool(number), "bool")
    value = t.tir.const(number.item(), dtype)
    return lambda indices, tensors: value


def _reader(
    t: Translator, position: int, operand: Operand, own: Sequence[int], axes: Sequence[int]
) -> Callable[[Any, Any], Any]:
    """Reads an operand at the indices of the result, which are in the order `own`; `axes` is the operand's order."""
    rank, zero = len(own), t.tir.IntImm("int64", 0)
    ones = [_is_one(t, d) for d in operand.dims]
    shift = rank - operand.rank
    places = [list(own).index(axis + shift) for axis in axes]

    def read(indices: Any, tensors: Any) -> Any:
        at = [zero if ones[axis] else indices[place] for axis, place in zip(axes, places, strict=True)]
        return tensors[position](*at)

    return read


def kind(expression: Any) -> str:
    """The dtype of an expression."""
    return str(expression.ty.dtype)


def _dtype_of(node: ir.Node, operands: Sequence[Operand]) -> str:
    if node.op_type in _COMPARE or node.op_type in _LOGIC:
        return "bool"
    return operands[-1].dtype if node.op_type == "Where" else operands[0].dtype


def _float_only(f: Callable[[Translator, Any], Any]) -> Expression:
    def expression(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
        if kind(x[0]) not in (*t.device.floats, "float64"):
            t.refuse(node, f"its input is {kind(x[0])}; it takes {' and '.join(t.device.floats)}")
        return f(t, x[0])

    return expression


def _math(name: str) -> Expression:
    """A function that the device has."""

    def expression(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
        if kind(x[0]) not in t.device.floats:
            t.refuse(node, f"its input is {kind(x[0])}; it takes {' and '.join(t.device.floats)}")
        return t.device.math(name, x[0])

    return expression


def _divide(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
    if "int" in kind(x[0]):
        return t.tir.truncdiv(x[0], x[1])
    return x[0] / x[1]


def _power(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
    base, exponent = x
    if isinstance(exponent, t.tir.FloatImm | t.tir.IntImm):
        number = float(exponent.value)
        if number in (1.0, 2.0, 3.0, 4.0):
            return reduce(lambda a, b: a * b, [base] * int(number))
        if number == 0.5:
            return t.tir.sqrt(base)
    return t.tir.pow(base, exponent.astype(kind(base)))


def _gelu(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
    return _math("gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu")(t, node, x)


def _clip(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
    # Missing bounds are left out of the operands, so which is which is read off the node.
    result, bounds = x[0], iter(x[1:])
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        result = t.tir.max(result, next(bounds))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = t.tir.min(result, next(bounds))
    return result


def _leaky(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
    alpha = t.tir.const(float(attribute(node, "alpha", 0.01)), kind(x[0]))
    return t.tir.Select(x[0] < t.tir.const(0, kind(x[0])), x[0] * alpha, x[0])


def _swiglu(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
    return _math("silu")(t, node, x) * x[1]


def _mod(t: Translator, node: ir.Node, x: Sequence[Any]) -> Any:
    if "int" not in kind(x[0]):
        t.refuse(node, f"its input is {kind(x[0])}; it takes integers")
    return (t.tir.truncmod if attribute(node, "fmod", 0) else t.tir.floormod)(x[0], x[1])


def _zero(t: Translator, x: Any) -> Any:
    return t.tir.const(0, kind(x))


#: Operator → its expression. `t` is the translator, `n` the node, `x` the elements.
EXPRESSIONS: dict[str, Expression] = {
    "Abs": lambda t, n, x: t.tir.abs(x[0]),
    "Add": lambda t, n, x: x[0] + x[1],
    "And": lambda t, n, x: t.tir.all(x[0], x[1]),
    "Ceil": _float_only(lambda t, x: t.tir.ceil(x)),
    "Clip": _clip,
    "Cos": _float_only(lambda t, x: t.tir.cos(x)),
    "Div": _divide,
    "Equal": lambda t, n, x: x[0].equal(x[1]),
    "Erf": _math("erf"),
    "Exp": _math("exp"),
    "Floor": _float_only(lambda t, x: t.tir.floor(x)),
    "Gelu": _gelu,
    "Greater": lambda t, n, x: x[0] > x[1],
    "GreaterOrEqual": lambda t, n, x: x[0] >= x[1],
    "HardSigmoid": lambda t, n, x: t.tir.max(
        t.tir.min(
            x[0] * t.tir.const(float(attribute(n, "alpha", 0.2)), kind(x[0]))
            + t.tir.const(float(attribute(n, "beta", 0.5)), kind(x[0])),
            t.tir.const(1.0, kind(x[0])),
        ),
        t.tir.const(0.0, kind(x[0])),
    ),
    "IsNaN": lambda t, n, x: t.tir.isnan(x[0]),
    "LeakyRelu": _leaky,
    "Less": lambda t, n, x: x[0] < x[1],
    "LessOrEqual": lambda t, n, x: x[0] <= x[1],
    "Log": _float_only(lambda t, x: t.tir.log(x)),
    "Max": lambda t, n, x: reduce(t.tir.max, x),
    "Min": lambda t, n, x: reduce(t.tir.min, x),
    "Mod": _mod,
    "Mul": lambda t, n, x: x[0] * x[1],
    "Neg": lambda t, n, x: -x[0],
    "Not": lambda t, n, x: t.tir.Not(x[0]),
    "Or": lambda t, n, x: t.tir.any(x[0], x[1]),
    "Pow": _power,
    "Reciprocal": _float_only(lambda t, x: t.tir.const(1.0, kind(x)) / x),
    "Relu": lambda t, n, x: t.tir.max(x[0], _zero(t, x[0])),
    "Sigmoid": _math("sigmoid"),
    "Sin": _float_only(lambda t, x: t.tir.sin(x)),
    "Sqrt": _float_only(lambda t, x: t.tir.sqrt(x)),
    "Sub": lambda t, n, x: x[0] - x[1],
    "Sum": lambda t, n, x: reduce(lambda a, b: a + b, x),
    "Tanh": _math("tanh"),
    "Where": lambda t, n, x: t.tir.Select(x[0], x[1], x[2]),
    "Xor": lambda t, n, x: t.tir.Not(x[0].astype("int8").equal(x[1].astype("int8"))),
}


@emits(*EXPRESSIONS)
def _elementwise(t: Translator, node: ir.Node) -> Operand:
    operands = [o for o in t.inputs(node) if o is not None]
    known = _on_sizes(t, node, operands)
    if known is not None:
        return known
    if len(operands) > 1 and all(o.array is not None for o in operands):
        operands = [*operands[:-1], Operand(operands[-1].dtype, operands[-1].dims, t.tensor(operands[-1]))]
    expression = EXPRESSIONS[node.op_type]
    return elementwise(
        t, node.op_type.lower(), operands, lambda *x: expression(t, node, _wide(t, x)), _dtype_of(node, operands)
    )


def _wide(t: Translator, x: Sequence[Any]) -> list[Any]:
    """The elements, halves as float32 where a device takes them: what is computed of them is rounded once."""
    halves = [dtype for dtype in t.device.floats if dtype != "float32"]
    return [item.astype("float32") if kind(item) in halves else item for item in x]


@emits("SwiGLU", domain="planish")
def _gated(t: Translator, node: ir.Node) -> Operand:
    operands = [o for o in t.inputs(node) if o is not None]
    return elementwise(t, "swiglu", operands, lambda *x: _swiglu(t, node, _wide(t, x)), operands[0].dtype)


@emits("Cast")
def _cast(t: Translator, node: ir.Node) -> Operand:
    (x,) = t.inputs(node)
    assert x is not None
    target = ir.DataType(int(attribute(node, "to")))
    dtype = "bool" if target == ir.DataType.BOOL else str(target.numpy())
    if x.sizes is not None and dtype in ("int32", "int64"):
        return Operand.of_sizes(x.sizes, "int64")
    if x.array is not None:
        return Operand.constant(x.array.astype(dtype))
    if dtype not in ("bool", *t.device.floats, "float64", "int8", "int16", "int32", "int64", "uint8"):
        t.refuse(node, f"it casts to {dtype}")
    if dtype == "bool":
        return elementwise(
            t, "cast", [x], lambda v: t.tir.NE(v, t.tir.const(0, x.dtype)) if x.dtype != "bool" else v, dtype
        )
    return elementwise(t, "cast", [x], lambda v: v.astype(dtype), dtype)


@emits("Identity", "Dropout")
def _identity(t: Translator, node: ir.Node) -> Operand:
    x = t.inputs(node)[0]
    assert x is not None
    return x


def _on_sizes(t: Translator, node: ir.Node, operands: Sequence[Operand]) -> Operand | None:
    """The result where all operands are numbers that follow from sizes."""
    elements = [o.elements() for o in operands]
    if not any(o.sizes is not None for o in operands) or any(e is None for e in elements):
        return None
    function = _SIZES.get(node.op_type)
    if function is None:
        return None
    result = np.frompyfunc(lambda *x: function(t, x), len(elements), 1)(*elements)
    result = np.asarray(result, object)
    if any(item is None for item in result.flat):
        return None
    dtype = "bool" if node.op_type in _COMPARE else "int64"
    return Operand.of_sizes(result, dtype)


def _choose(t: Translator, x: Sequence[Any]) -> Any:
    condition = x[0]
    return (x[1] if condition else x[2]) if isinstance(condition, int | bool) else None


def _same_sizes(t: Translator, x: Sequence[Any]) -> Any:
    if t.equal(x[0], x[1]):
        return 1
    # A size is never negative, so it is no -1.
    if any(isinstance(item, int) and item < 0 for item in x) or all(isinstance(item, int) for item in x):
        return 0
    return None


_SIZES: dict[str, Callable[[Translator, Sequence[Any]], Any]] = {
    "Add": lambda t, x: t.plain(x[0] + x[1]),
    "Sub": lambda t, x: t.plain(x[0] - x[1]),
    "Mul": lambda t, x: t.plain(x[0] * x[1]),
    "Div": lambda t, x: t.plain(t.tir.floordiv(t.dim(x[0]), t.dim(x[1]))),
    "Max": lambda t, x: t.plain(reduce(lambda a, b: t.tir.max(t.dim(a), t.dim(b)), x)),
    "Min": lambda t, x: t.plain(reduce(lambda a, b: t.tir.min(t.dim(a), t.dim(b)), x)),
    "Neg": lambda t, x: t.plain(0 - t.dim(x[0])),
    "Equal": _same_sizes,
    "Where": _choose,
}
