"""Operators that compute the same in any order of their axes, and how each is written in another one.

`perm` says what an operand was: ``old = Transpose(new, perm)``, so axis a of the old order is axis ``perm[a]`` of
the new one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, constant_tensor, dims_of
from planish.passes.canonicalize.editing import Editor

_UNARY = frozenset(
    (
        *("Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
        *("HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round"),
        *("Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
    )
)
_BROADCAST = frozenset(
    (
        *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min"),
        *("Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor"),
    )
)
_ONE_AXIS = frozenset(("Concat", "LogSoftmax", "Softmax", "Split"))
_REDUCE = frozenset(f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod"))
REDUCE = _REDUCE | {"ReduceSum", "ReduceSumSquare"}
_ALL = _UNARY | _BROADCAST | _ONE_AXIS | REDUCE | {"LayerNormalization", "Pad", "Slice"}

Perm = tuple[int, ...]


def rank_of(value: ir.Value | None) -> int | None:
    dims = dims_of(value)
    return None if dims is None else len(dims)


def inverse(perm: Sequence[int]) -> Perm:
    """The permutation that undoes `perm`."""
    return tuple(int(k) for k in np.argsort(perm))


def composed(first: Sequence[int], second: Sequence[int]) -> Perm:
    """``Transpose(Transpose(x, first), second)`` as one."""
    return tuple(first[k] for k in second)


def is_trivial(perm: Sequence[int], dims: Sequence[int | str | None] | None) -> bool:
    """Whether a Transpose moves axes of size 1 only, and so no data."""
    if dims is None:
        return list(perm) == sorted(perm)
    moved = [axis for axis in perm if dims[axis] != 1]
    return moved == sorted(moved)


def operands(node: ir.Node, perm: Perm) -> list[int] | None:
    """Positions of the operands that must be in the new order too; None: the node can not be moved to it."""
    rank = len(perm)
    if node.domain or node.op_type not in _ALL or rank_of(node.outputs[0]) != rank:
        return None
    if node.op_type in _BROADCAST:
        return _broadcast(node, rank)
    if rank_of(node.inputs[0]) != rank:
        return None
    if node.op_type == "Concat":
        constant = any(constant_tensor(v) is not None for v in node.inputs)
        return None if constant else list(range(len(node.inputs)))
    if node.op_type == "LayerNormalization":
        last = node.attributes.get_int("axis", -1) in (-1, rank - 1) and perm[-1] == rank - 1
        return [0] if last and len(node.outputs) == 1 else None
    if node.op_type in REDUCE:
        return [0] if node.attributes.get_int("keepdims", 1) and _axes(node) is not None else None
    if node.op_type == "Slice":
        return [0] if _slice_axes(node) is not None else None
    if node.op_type == "Pad":
        return [0] if _pads(node, rank) is not None else None
    return [0]


def _broadcast(node: ir.Node, rank: int) -> list[int] | None:
    found = []
    for index, value in enumerate(node.inputs):
        own = rank_of(value)
        tensor = constant_tensor(value)
        if own is None or own > rank:
            return None
        if tensor is not None:
            continue
        if own == rank:
            found.append(index)
        elif own:
            return None
    return found or None


def absorbs(node: ir.Node, perm: Perm) -> bool:
    """Whether a reduction that drops its axes can read the new order, since the axes that stay keep theirs."""
    if node.domain or node.op_type not in REDUCE or node.attributes.get_int("keepdims", 1) != 0:
        return False
    axes = _axes(node)
    if axes is None or rank_of(node.inputs[0]) != len(perm):
        return False
    stay = [perm[a] for a in range(len(perm)) if a not in {x % len(perm) for x in axes}]
    return stay == sorted(stay)


def rewrite(node: ir.Node, perm: Perm, editor: Editor) -> None:
    """Puts constants and attributes of a node into the new order; its other operands are the caller's."""
    rank = len(perm)
    assert node.graph is not None
    if node.op_type in _BROADCAST:
        for index, value in enumerate(node.inputs):
            tensor = constant_tensor(value)
            if tensor is not None and value is not None and tensor.size > 1:
                array = tensor.numpy()
                wide = array.reshape((1,) * (rank - array.ndim) + array.shape)
                moved = np.ascontiguousarray(np.transpose(wide, inverse(perm)))
                node.replace_input_with(index, editor.constant(node.graph, moved, f"{value.name}_moved"))
    elif node.op_type in _ONE_AXIS:
        given = node.attributes.get("axis")
        axis = given.as_int() if given is not None else 0 if node.op_type == "Split" else -1
        node.attributes["axis"] = ir.AttrInt64("axis", perm[axis % rank])
    elif node.op_type in REDUCE:
        _set_axes(node, 1, [perm[a % rank] for a in _axes(node) or ()], editor)
    elif node.op_type == "Slice":
        _set_axes(node, 3, [perm[a % rank] for a in _slice_axes(node) or ()], editor)
    elif node.op_type == "Pad":
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            axes = constant_array(node.inputs[3])
            assert axes is not None
            _set_axes(node, 3, [perm[int(a) % rank] for a in axes], editor)
        else:
            pads = _pads(node, rank)
            assert pads is not None
            back = inverse(perm)
            moved = np.array([*(pads[k] for k in back), *(pads[rank + k] for k in back)], np.int64)
            node.replace_input_with(1, editor.constant(node.graph, moved, f"{node.name}_pads"))


def _set_axes(node: ir.Node, index: int, axes: list[int], editor: Editor) -> None:
    if "axes" in node.attributes:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        return
    assert node.graph is not None
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, editor.constant(node.graph, np.array(axes, np.int64), f"{node.name}_axes"))


def _axes(node: ir.Node) -> list[int] | None:
    """The axes of a reduction if they are known and named."""
    if "axes" in node.attributes:
        return list(node.attributes.get_ints("axes", ()))
    array = constant_array(node.inputs[1], 64) if len(node.inputs) > 1 else None
    return None if array is None or not array.size else [int(a) for a in array]


def _slice_axes(node: ir.Node) -> list[int] | None:
    if len(node.inputs) < 3:
        return None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        array = constant_array(node.inputs[3], 64)
        return None if array is None else [int(a) for a in array]
    starts = dims_of(node.inputs[1])
    return list(range(starts[0])) if starts is not None and len(starts) == 1 and isinstance(starts[0], int) else None


def _pads(node: ir.Node, rank: int) -> list[int] | None:
    if len(node.inputs) < 2:
        return None
    array = constant_array(node.inputs[1], 64)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = constant_array(node.inputs[3], 64)
        return None if axes is None else [0]
    return None if array is None or array.size != 2 * rank else [int(p) for p in array]
