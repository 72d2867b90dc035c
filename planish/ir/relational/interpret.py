"""The reference interpreter of relational programs: NumPy in float64, one operator after the other.

Slow and plain on purpose: it is what generated kernels and passes are checked against. Rows are gathered before an
operator is applied, so memory grows with edges times features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from planish.ir.errors import InputError
from planish.ir.relational.domains import NONE, Domain
from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Op, Program, Variable

#: A float64 array, or int64 where it holds rows.
Array = Any

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


_UNARY: dict[str, Callable[[Array], Array]] = {
    "copy": lambda x: x,
    "neg": np.negative,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "recip": lambda x: 1 / x,
    "abs": np.abs,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "erf": lambda x: _erf(x) if x.size else x,
    "step": lambda x: (x > 0).astype(np.float64),
}
_BINARY: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "greater": lambda a, b: (a > b).astype(np.float64),
    "equal": lambda a, b: (a == b).astype(np.float64),
}


def interpret(program: Program, graph: Graph, values: Mapping[str, Any]) -> dict[str, Array]:
    """Runs a program.

    Args:
        program: verified.
        graph: its tables.
        values: an array [rows, *shape] (float; without the row axis for the domain ``none``) for every argument.

    Returns:
        The outputs by name, float64.

    Raises:
        InputError: an argument is missing or has another shape.
    """
    everything = interpret_all(program, graph, values)
    return {name: everything[name] for name in program.outputs}


def interpret_all(program: Program, graph: Graph, values: Mapping[str, Any]) -> dict[str, Array]:
    """The same, with every value in between."""
    known: dict[str, Array] = {}
    for variable in program.arguments:
        if variable.name not in values:
            raise InputError(f"'{program.name}' needs a value for '{variable}'.")
        array = np.asarray(values[variable.name], np.float64)
        wanted = full_shape(variable, graph)
        if array.shape != wanted:
            raise InputError(
                f"'{variable.name}' has shape {array.shape}; this graph and '{variable}' ask for {wanted}."
            )
        known[variable.name] = array
    domains = {name: v.domain for name, v in program.variables().items()}
    for op in program.ops:
        known[op.name] = _run(op, graph, known, domains)
    return known


def full_shape(variable: Variable, graph: Graph) -> tuple[int, ...]:
    """The shape of the array of a value, rows included."""
    return variable.shape if variable.domain == NONE else (graph.rows(variable.domain), *variable.shape)


def _run(op: Op, graph: Graph, known: Mapping[str, Array], domains: Mapping[str, Domain]) -> Array:
    if op.kind == "join":
        return np.concatenate([known[name] for name in op.reads])
    if op.kind == "pick":
        begin = graph.node_offsets[op.attr("index")]
        return known[op.reads[0]][begin : begin + graph.rows(op.result.domain)]

    def rows(position: int) -> Array:
        """Operand `position`, with a row for each row of the loop."""
        operand = op.operands[position]
        array, domain = known[operand.name], domains[operand.name]
        if domain == NONE:
            array = array[None]
        return array[graph.map(op.over, domain, operand.end)]

    arguments = [rows(i) for i in range(len(op.operands))]
    result = _reduce(op, graph, arguments) if op.over != op.result.domain or op.kind in _GROUPED else None
    if result is None:
        result = _rowwise(op, graph.rows(op.over), arguments)
    return result[0] if op.result.domain == NONE else result


#: Reductions also where the loop's domain is that of the result: each row is then a group of its own.
_GROUPED = frozenset(("sum", "mean", "max_rows", "min_rows", "count", "outer", "edge_softmax"))


def _reduce(op: Op, graph: Graph, arguments: list[Array]) -> Array:
    if op.kind == "edge_softmax":
        target = graph.src if op.by == "src" else graph.dst
        return _softmax(arguments[0], target, graph.num_nodes)
    target, count = graph.map(op.over, op.result.domain, op.by), graph.rows(op.result.domain)
    sizes = np.bincount(target, minlength=count).astype(np.float64)
    if op.kind == "count":
        return sizes
    if op.kind == "outer":
        return _sums(_outer(arguments[0], arguments[1], bool(op.attr("heads"))), target, count)
    (x,) = arguments
    per_row = sizes.reshape(-1, *(1,) * (x.ndim - 1))
    if op.kind == "sum":
        return _sums(x, target, count)
    if op.kind == "mean":
        return _sums(x, target, count) / np.maximum(per_row, 1)
    most = op.kind == "max_rows"
    result = np.full((count, *x.shape[1:]), -np.inf if most else np.inf)
    (np.maximum if most else np.minimum).at(result, target, x)
    return np.where(per_row > 0, result, 0.0)


def _outer(x: Array, y: Array, heads: bool) -> Array:
    lead = x.shape[1 : -2 if heads else -1]
    x, y = (a.reshape(len(a), math.prod(lead), *a.shape[1 + len(lead) :]) for a in (x, y))
    return np.einsum("rlhi,rlho->rhio" if heads else "rli,rlo->rio", x, y)


def _sums(x: Array, target: Array, count: int) -> Array:
    result = np.zeros((count, *x.shape[1:]))
    np.add.at(result, target, x)
    return result


def _softmax(x: Array, target: Array, count: int) -> Array:
    most = np.full((count, *x.shape[1:]), -np.inf)
    np.maximum.at(most, target, x)
    weight = np.exp(x - most[target])
    return weight / _sums(weight, target, count)[target]


def _rowwise(op: Op, count: int, arguments: list[Array]) -> Array:
    kind = op.kind
    if kind == "leaky_relu":
        return np.where(arguments[0] > 0, arguments[0], arguments[0] * op.attr("slope"))
    if kind in _UNARY:
        return _UNARY[kind](arguments[0])
    if kind in _BINARY:
        return _BINARY[kind](*_aligned(arguments))
    if kind == "dot":
        a, b = _aligned(arguments)
        return (a * b).sum(-1)
    if kind == "constant":
        return np.full((count, *op.attr("shape")), float(op.attr("value")))
    if kind == "linear":
        return _linear(arguments[0], arguments[1], bool(op.attr("transpose")))
    return _view(op, count, arguments)


def elementwise(op: Op, numbers: Sequence[float]) -> float:
    """An elementwise operator of numbers."""
    with np.errstate(all="ignore"):
        return float(_rowwise(op, 1, [np.array([number]) for number in numbers])[0])


def _aligned(arguments: list[Array]) -> list[Array]:
    """Trailing shapes broadcast from the right, with the row axis kept in front."""
    rank = max(a.ndim for a in arguments)
    return [a.reshape(a.shape[0], *(1,) * (rank - a.ndim), *a.shape[1:]) for a in arguments]


def _linear(x: Array, w: Array, transpose: bool) -> Array:
    if transpose:
        w = np.swapaxes(w, -1, -2)
    return np.einsum("r...hi,rhio->r...ho" if w.ndim == 4 else "r...i,rio->r...o", x, w)


def _view(op: Op, count: int, arguments: list[Array]) -> Array:
    x = arguments[0]
    if op.kind == "fsum":
        return x.sum(tuple(axis + 1 if axis >= 0 else axis for axis in op.attr("axes")))
    if op.kind == "expand":
        shape = op.attr("shape")
        return np.broadcast_to(x.reshape(count, *(1,) * (len(shape) + 1 - x.ndim), *x.shape[1:]), (count, *shape))
    if op.kind == "reshape":
        return x.reshape(count, *op.attr("shape"))
    if op.kind == "transpose":
        return x.transpose(0, *(p + 1 for p in op.attr("perm")))
    axis = op.attr("axis")
    axis = axis + 1 if axis >= 0 else axis
    if op.kind == "slice":
        return np.take(x, np.arange(op.attr("start"), op.attr("stop")), axis)
    if op.kind == "concat":
        return np.concatenate(arguments, axis)
    raise AssertionError(f"no rule for operator '{op.kind}'")
