"""remove-no-ops: nodes that return their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, constant_tensor, dims_of
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.determinism import is_inference_dropout
from planish.passes.canonicalize.editing import Editor, Rule, apply_rules
from planish.passes.canonicalize.facts import Facts, same_dims, same_item
from planish.passes.registry import register

_INT32_MAX = 2**31 - 1


@register
@dataclass(frozen=True)
class RemoveNoOps(ExactPass):
    """Removes nodes that are proved, from types, shapes and constants, to return their input unchanged.

    ``x + 0.0`` counts as one: it differs from x in the sign of a zero only.
    """

    name: ClassVar[str] = "remove-no-ops"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        facts = Facts()
        finders: dict[str, Callable[[ir.Node], ir.Value | None]] = {**_FINDERS, "Expand": lambda n: _expand(n, facts)}
        rules = {op: _remover(find) for op, find in finders.items()}
        return apply_rules(program, self.name, rules, facts.visit)


def _remover(find: Callable[[ir.Node], ir.Value | None]) -> Rule:
    def rule(node: ir.Node, editor: Editor) -> bool:
        source = find(node)
        if source is None:
            return False
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            raise Decline("its second output is used")
        editor.replace(node.outputs[0], source)
        editor.remove(node)
        return True

    return rule


def _first(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _only(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _dropout(node: ir.Node) -> ir.Value | None:
    if not is_inference_dropout(node):
        raise Decline("training_mode is on or not constant")
    return node.inputs[0]


def _cast(node: ir.Node) -> ir.Value | None:
    value = node.inputs[0]
    same = value is not None and value.dtype is not None and value.dtype == node.attributes.get_int("to", 0)
    return value if same else None


def _cast_like(node: ir.Node) -> ir.Value | None:
    a, b = node.inputs
    return a if a is not None and b is not None and a.dtype is not None and a.dtype == b.dtype else None


def _same_shape(node: ir.Node) -> ir.Value | None:
    """Reshape, Squeeze, Flatten: data keeps its order, so an equal shape is an equal tensor."""
    source, result = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    if source is None or result is None or len(source) != len(result):
        return None
    if same_dims(source, result):
        return node.inputs[0]
    differing = [(a, b) for a, b in zip(source, result, strict=True) if not same_item(a, b)]
    rest = [a for a, b in zip(source, result, strict=True) if same_item(a, b)]
    if len(differing) == 1 and all(isinstance(d, int) and d > 0 for d in rest):
        return node.inputs[0]  # the number of elements fixes the last size
    if any(isinstance(a, int) and isinstance(b, int) for a, b in differing):
        return None  # it does change the shape
    raise Decline(f"from {source} to {result}: not proved equal")


def _transpose(node: ir.Node) -> ir.Value | None:
    dims = dims_of(node.inputs[0])
    perm = node.attributes.get_ints("perm", None)
    if perm is None:
        return node.inputs[0] if dims is not None and len(dims) < 2 else None
    return node.inputs[0] if list(perm) == list(range(len(perm))) else None


def _expand(node: ir.Node, facts: Facts) -> ir.Value | None:
    source = dims_of(node.inputs[0])
    if source is None:
        return None
    target = facts.vector(node.inputs[1])
    if target is not None and not target.scalar and len(target.items) <= len(source):
        kept = source[len(source) - len(target.items) :]
        if all(t == 1 or same_item(s, t) for s, t in zip(kept, target.items, strict=True)):
            return node.inputs[0]
    if same_dims(source, dims_of(node.outputs[0])):
        return node.inputs[0]
    if target is None:
        raise Decline("the shape it expands to is not known")
    return None


def _pad(node: ir.Node) -> ir.Value | None:
    pads = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    return node.inputs[0] if pads is not None and not pads.any() else None


def _tile(node: ir.Node) -> ir.Value | None:
    repeats = constant_array(node.inputs[1]) if len(node.inputs) == 2 else None
    return node.inputs[0] if repeats is not None and (repeats == 1).all() else None


def _slice(node: ir.Node) -> ir.Value | None:
    if len(node.inputs) < 3:
        return None  # bounds are attributes (opset below 10)
    dims = dims_of(node.inputs[0])
    starts, ends = constant_array(node.inputs[1]), constant_array(node.inputs[2])
    axes = constant_array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = constant_array(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else np.ones(1)
    if starts is None or ends is None or steps is None or starts.any() or (steps != 1).any():
        return None
    if len(node.inputs) > 3 and node.inputs[3] is not None and axes is None:
        return None
    listed = [int(a) for a in axes] if axes is not None else list(range(len(ends)))
    for axis, end in zip(listed, ends, strict=True):
        size = dims[axis] if dims is not None else None
        if end < _INT32_MAX and not (isinstance(size, int) and end >= size):
            return None
    return node.inputs[0]


def _neutral(element: float, *, commutes: bool) -> Callable[[ir.Node], ir.Value | None]:
    """The finder for a binary operator with the neutral element `element` on the right, or on either side."""

    def find(node: ir.Node) -> ir.Value | None:
        for kept, other in ((0, 1), (1, 0)) if commutes else ((0, 1),):
            constant = constant_array(node.inputs[other])
            if constant is not None and constant.size and (constant == element).all():
                return _unless_broadcast(node, kept, constant.shape)
        return None

    return find


def _unless_broadcast(node: ir.Node, kept: int, shape: tuple[int, ...]) -> ir.Value | None:
    """Input `kept`, if an operand of `shape` does not make the result larger."""
    value = node.inputs[kept]
    dims = dims_of(value)
    if dims is None and shape == ():
        return value
    if dims is not None and len(shape) <= len(dims):
        tail = dims[len(dims) - len(shape) :]
        if all(s == 1 or same_item(d, s) for d, s in zip(tail, shape, strict=True)):
            return value
    if same_dims(dims, dims_of(node.outputs[0])):
        return value
    raise Decline(f"an operand of shape {list(shape)} may broadcast the result")


def _where(node: ir.Node) -> ir.Value | None:
    condition = constant_array(node.inputs[0])
    if condition is None or not condition.size or condition.all() != condition.any():
        return None
    chosen = 1 if condition.all() else 2
    if not same_dims(dims_of(node.inputs[chosen]), dims_of(node.outputs[0])):
        raise Decline("the operand that is chosen may be broadcast")
    return node.inputs[chosen]


def _reduce(node: ir.Node) -> ir.Value | None:
    """A reduction over no axes at all."""
    if not node.attributes.get_int("noop_with_empty_axes", 0):
        return None
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return node.inputs[0]
    tensor = constant_tensor(node.inputs[1])
    return node.inputs[0] if tensor is not None and tensor.size == 0 else None


_FINDERS: dict[str, Callable[[ir.Node], ir.Value | None]] = {
    "Identity": _first,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Reshape": _same_shape,
    "Flatten": _same_shape,
    "Squeeze": _same_shape,
    "Transpose": _transpose,
    "Pad": _pad,
    "Tile": _tile,
    "Slice": _slice,
    "Concat": _only,
    "Sum": _only,
    "Mean": _only,
    "Max": _only,
    "Min": _only,
    "Add": _neutral(0, commutes=True),
    "Sub": _neutral(0, commutes=False),
    "Mul": _neutral(1, commutes=True),
    "Div": _neutral(1, commutes=False),
    "Pow": _neutral(1, commutes=False),
    "And": _neutral(True, commutes=True),
    "Or": _neutral(False, commutes=True),
    "Xor": _neutral(False, commutes=True),
    "Where": _where,
    "ReduceSum": _reduce,
    "ReduceMax": _reduce,
    "ReduceMin": _reduce,
    "ReduceMean": _reduce,
    "ReduceProd": _reduce,
}
