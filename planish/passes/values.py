"""What the matcher asks of single values: are they a constant, who reads them, how to name them in a message."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from planish.ir.graphs import constant_tensor
from planish.passes.pattern import ConstPattern, OutPattern

# How far a constant found in the graph may be from the number in the pattern, by its dtype.
_RELATIVE = {
    ir.DataType.DOUBLE: 1e-6,  # exporters store float32 constants in float64 graphs
    ir.DataType.FLOAT: 1e-5,
    ir.DataType.FLOAT16: 2e-3,
    ir.DataType.BFLOAT16: 8e-3,
}
_SMALLEST = 1e-8  # a pattern's zero


def users(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that consume a value; one may come twice.

    Unlike ``value.consumers()`` it makes no copy of all uses, which a caller that stops early would pay for.
    """
    last: ir.Node | None = None
    for use in value._uses:
        if use.node is not last:
            last = use.node
            yield last


def constant_problem(pattern: ConstPattern, item: Any) -> Callable[[], str] | None:
    """None if the value is the constant; else what to say about it. `item` may carry the operands beside it."""
    value, beside = item if isinstance(item, tuple) else (item, ())
    tensor = constant_tensor(value)
    if tensor is None:
        return lambda: f"{describe(value)} is not a constant; expected {pattern.value}"
    wanted = pattern.value if isinstance(pattern.value, list) else [pattern.value]
    dims = tuple(tensor.shape)
    if isinstance(pattern.value, list):
        if dims != (len(wanted),):
            return lambda: f"{describe(value)} has shape {list(dims)}; expected [{len(wanted)}]"
    elif dims not in ((), (1,)):
        return lambda: f"{describe(value)} has shape {list(dims)}; expected the number {pattern.value}"
    elif dims == (1,) and any(
        v is not value and v is not None and v.shape is not None and not len(v.shape) for v in beside
    ):
        return lambda: f"{describe(value)} has shape [1] beside a scalar, and gives the result its rank"
    if tensor.dtype == ir.DataType.STRING:
        return lambda: f"{describe(value)} holds strings; expected {pattern.value}"
    found = tensor.numpy().reshape(-1)
    rel_tol = pattern.rel_tol if pattern.rel_tol is not None else _RELATIVE.get(tensor.dtype, 0.0)
    floating = tensor.dtype in _RELATIVE or pattern.rel_tol is not None
    for number, expected in zip(found.tolist(), wanted, strict=True):
        # Beside a small number an absolute tolerance would accept 0 for 1e-12, so only a zero has one.
        absolute = _SMALLEST if floating and expected == 0 else 0.0
        if not math.isclose(number, expected, rel_tol=rel_tol, abs_tol=absolute):
            return lambda: (
                f"{describe(value)} is {found.tolist()[0] if len(wanted) == 1 else found.tolist()}; "
                f"expected {pattern.value}"
            )
    return None


def describe(item: Any) -> str:
    if isinstance(item, tuple):
        item = item[0]
    if isinstance(item, ir.Node):
        return f"{item.op_type} '{item.name}'"
    if isinstance(item, ir.Value):
        return f"value '{item.name}'"
    return "absent" if item is None else str(item)


def describe_patterns(patterns: Any) -> str:
    return ", ".join("nothing" if p is None else str(p.node) if isinstance(p, OutPattern) else str(p) for p in patterns)


def describe_values(values: Any) -> str:
    def one(value: ir.Value | None) -> str:
        if value is None:
            return "nothing"
        node = value.producer()
        if node is not None:
            return f"{node.op_type} '{value.name}'"
        return f"constant '{value.name}'" if value.const_value is not None else f"input '{value.name}'"

    return ", ".join(one(v) for v in values)
