"""What is applied to values in the relational language. Shapes are trailing shapes, without rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, SRC_PAIR, ends
from planish.ir.relational.dsl import ACCUMULATIONS
from planish.ir.relational.dsl_rows import Accumulation, Row, Weight
from planish.ir.relational.dsl_values import Value, fault, here
from planish.ir.relational.inter import Operand


def _layer(*given: Any) -> Any:
    for value in given:
        if isinstance(value, Accumulation):
            raise value.unfinished()
        if isinstance(value, Weight):
            raise value.unindexed()
        if isinstance(value, Value):
            return value.layer
    raise fault("one operand at least must be a value of a layer")


def linear(x: Value, weight: Value, bias: Value | None = None, transpose: bool = False) -> Value:
    """``x W + b``: x (*, i) and W (i, o) give (*, o); x (*, h, i) and W (h, i, o), a matrix for each head, (*, h, o).

    Args:
        x: features.
        weight: for instance ``W[e.type]``: a typed linear.
        bias: broadcasts to the result.
        transpose: W is (o, i) or (h, o, i).
    """
    options = {"transpose": True} if transpose else {}
    result: Value = _layer(x, weight).apply("linear", x, weight, **options)
    return result if bias is None else result + bias


def dot(a: Value, b: Value) -> Value:
    """The inner product over the last axis, with broadcasting of the others: (h, f) and (h, f) give (h)."""
    return _layer(a, b).apply("dot", a, b)  # type: ignore[no-any-return]


def _unary(kind: str, text: str) -> Callable[[Value], Value]:
    def function(x: Value) -> Value:
        return _layer(x).apply(kind, x)  # type: ignore[no-any-return]

    function.__name__ = function.__qualname__ = kind
    function.__doc__ = f"{text}, elementwise."
    return function


exp = _unary("exp", "e to the power of x")
log = _unary("log", "The natural logarithm")
sqrt = _unary("sqrt", "The square root")
absolute = _unary("abs", "The absolute value")
relu = _unary("relu", "max(x, 0)")
tanh = _unary("tanh", "The hyperbolic tangent")
sigmoid = _unary("sigmoid", "1 / (1 + exp(-x))")
step = _unary("step", "1 where x > 0, else 0")
erf = _unary("erf", "The error function")


def leaky_relu(x: Value, slope: float = 0.2) -> Value:
    """x where it is positive, else ``slope * x``. The default is that of graph attention networks."""
    return _layer(x).apply("leaky_relu", x, slope=float(slope))  # type: ignore[no-any-return]


def gelu(x: Value) -> Value:
    """``x/2 (1 + erf(x / sqrt 2))``."""
    return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))


def silu(x: Value) -> Value:
    """``x sigmoid(x)``."""
    return x * sigmoid(x)


def elu(x: Value, alpha: float = 1.0) -> Value:
    """x where it is positive, else ``alpha (exp(x) - 1)``."""
    return relu(x) + alpha * (exp(minimum(x, 0.0)) - 1.0)


def maximum(a: Any, b: Any) -> Value:
    """The larger of two, elementwise."""
    return _layer(a, b).apply("max", a, b)  # type: ignore[no-any-return]


def minimum(a: Any, b: Any) -> Value:
    """The smaller of two, elementwise."""
    return _layer(a, b).apply("min", a, b)  # type: ignore[no-any-return]


def concat(*values: Value, axis: int = -1) -> Value:
    """Values side by side along a trailing axis."""
    return _layer(*values).apply("concat", *values, axis=axis)  # type: ignore[no-any-return]


def part(x: Value, start: int, stop: int, axis: int = -1) -> Value:
    """Elements `start` to `stop` of a trailing axis."""
    return _layer(x).apply("slice", x, axis=axis, start=start, stop=stop)  # type: ignore[no-any-return]


def expand(x: Value, *shape: int) -> Value:
    """Broadcast to a trailing shape."""
    return _layer(x).apply("expand", x, shape=shape)  # type: ignore[no-any-return]


def edge_softmax(x: Value, by: str = "dst") -> Value:
    """The softmax of a value of edges over all edges into the same node (``by="src"``: out of it), elementwise."""
    layer = _layer(x)
    if x.over != EDGE:
        raise fault(f"edge_softmax is for values of edges; '{x.name}' is one of a loop over {x.over}")
    return layer.apply("edge_softmax", x, by=by)  # type: ignore[no-any-return]


def accumulate(row: Row, name: str, value: Any, how: str = "sum") -> None:
    """Accumulates a value of edges into ``row.name``, inside of a loop over the edges of `row`.

    ``n.h += e.m`` is ``accumulate(n, "h", e.m)``. Without edges the result is 0.

    Args:
        row: the variable of the loop around that over edges.
        name: the attribute that is accumulated.
        value: of edges.
        how: ``"sum"``, ``"mean"``, ``"max"`` or ``"min"``.
    """
    if how not in ACCUMULATIONS:
        raise fault(f"accumulate knows {', '.join(ACCUMULATIONS)}, not '{how}'")
    found = row.layer.get(row, name)
    (found if isinstance(found, Accumulation) else Accumulation(row, name)).add(how, value)


def count(row: Row, group: str = "dst") -> Value:
    """How many edges share with this one: a constant of the graph.

    Args:
        row: an edge (in a loop over edges), a node, or a pair.
        group: for an edge: ``"dst"`` or ``"src"``, its node; ``"dst_pair"`` or ``"src_pair"``, its node and its type;
            ``"type"``. For a node ``"dst"`` counts the edges into it and ``"src"`` those out of it.
    """
    groups = {"dst": NODE, "src": NODE, "dst_pair": DST_PAIR, "src_pair": SRC_PAIR, "type": EDGE_TYPE}
    domain = groups.get(group)
    by = group if domain == NODE else ""
    if domain is None or (row.domain != EDGE and domain != row.domain):
        raise fault(f"rows of {row.domain} are not counted by '{group}'; groups: {', '.join(groups)}")
    layer = row.layer
    made = layer.builder.emit("count", over=EDGE, domain=domain, by=by, name=f"count_{group}", location=here())
    choice = ends(row.loop, domain)
    end = by if row.domain == EDGE and by in choice else row.read(domain)
    return Value(layer, Operand(made.name, end), row.loop)
