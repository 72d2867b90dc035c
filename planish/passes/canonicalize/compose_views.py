"""compose-views: two nodes in a row that only rearrange, convert or negate become one, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, dims_of, is_op
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor, apply_rules
from planish.passes.canonicalize.facts import same_item
from planish.passes.registry import register

_D = ir.DataType
_INTEGERS = (_D.UINT8, _D.INT8, _D.UINT16, _D.INT16, _D.INT32, _D.UINT32, _D.INT64, _D.UINT64)
#: Types whose every value the listed types hold exactly.
_WIDER: dict[ir.DataType, frozenset[ir.DataType]] = {
    _D.BOOL: frozenset((*_INTEGERS, _D.FLOAT16, _D.FLOAT, _D.DOUBLE)),
    _D.UINT8: frozenset((_D.UINT16, _D.INT16, _D.INT32, _D.UINT32, _D.INT64, _D.UINT64, _D.FLOAT, _D.DOUBLE)),
    _D.INT8: frozenset((_D.INT16, _D.INT32, _D.INT64, _D.FLOAT, _D.DOUBLE)),
    _D.UINT16: frozenset((_D.INT32, _D.UINT32, _D.INT64, _D.UINT64, _D.FLOAT, _D.DOUBLE)),
    _D.INT16: frozenset((_D.INT32, _D.INT64, _D.FLOAT, _D.DOUBLE)),
    _D.INT32: frozenset((_D.INT64, _D.DOUBLE)),
    _D.UINT32: frozenset((_D.INT64, _D.UINT64, _D.DOUBLE)),
    _D.FLOAT16: frozenset((_D.FLOAT, _D.DOUBLE)),
    _D.BFLOAT16: frozenset((_D.FLOAT, _D.DOUBLE)),
    _D.FLOAT: frozenset((_D.DOUBLE,)),
}
_FLOATS = frozenset((_D.FLOAT16, _D.BFLOAT16, _D.FLOAT, _D.DOUBLE))


@register
@dataclass(frozen=True)
class ComposeViews(ExactPass):
    """Composes Transposes, Reshapes, Squeeze with Unsqueeze, Casts that lose nothing, Not of Not, Neg of Neg.

    A CastLike becomes the Cast that it is, so that the other passes see one form.
    """

    name: ClassVar[str] = "compose-views"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        return apply_rules(program, self.name, _RULES)


def _inner(node: ir.Node, *op_types: str) -> ir.Node | None:
    """The producer of the first input, if it is one of `op_types`."""
    value = node.inputs[0] if node.inputs else None
    producer = value.producer() if value is not None else None
    return producer if is_op(producer, *op_types) else None


def _substitute(node: ir.Node, source: ir.Value | None, editor: Editor) -> bool:
    """Lets the users of `node` read `source`."""
    if source is None:
        return False
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    _replaced(node, source, editor)
    _drop_dead(before, editor)
    return True


def _rewire(node: ir.Node, inner: ir.Node, editor: Editor) -> bool:
    """Lets `node` read what `inner` reads."""
    node.replace_input_with(0, inner.inputs[0])
    editor.mark(node, [node, inner])
    _drop_dead(inner, editor)
    return True


def _drop_dead(node: ir.Node | None, editor: Editor) -> None:
    if node is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
        editor.remove(node)


def _transpose(node: ir.Node, editor: Editor) -> bool:
    inner = _inner(node, "Transpose")
    if inner is None:
        return False
    outer_perm, inner_perm = _perm(node), _perm(inner)
    if outer_perm is None or inner_perm is None:
        raise Decline("the rank is not known")
    perm = [inner_perm[axis] for axis in outer_perm]
    if perm == list(range(len(perm))):
        return _substitute(node, inner.inputs[0], editor)
    if len(inner.outputs[0].uses()) > 1 or inner.outputs[0].is_graph_output():
        raise Decline("the first Transpose has other users, so it would stay")
    node.attributes["perm"] = ir.AttrInt64s("perm", perm)
    return _rewire(node, inner, editor)


def _perm(node: ir.Node) -> list[int] | None:
    perm = node.attributes.get_ints("perm", None)
    if perm is not None:
        return list(perm)
    dims = dims_of(node.inputs[0])
    return list(reversed(range(len(dims)))) if dims is not None else None


def _reshape(node: ir.Node, editor: Editor) -> bool:
    inner = _inner(node, "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    if inner is None or len(node.inputs) < 2:
        return False
    if node.attributes.get_int("allowzero", 0):
        return _rewire(node, inner, editor)
    target = constant_array(node.inputs[1])
    if target is None:
        raise Decline("the target is not constant: one of its sizes may be 0, a copy from the first Reshape")
    if (target == 0).any():
        middle, source = dims_of(node.inputs[0]), dims_of(inner.inputs[0])
        sizes = target.copy()
        for axis in np.flatnonzero(target == 0):
            kept = middle[axis] if middle is not None else None
            if isinstance(kept, int) and kept > 0:
                sizes[axis] = kept
            elif source is None or axis >= len(source) or not same_item(kept, source[axis]):
                raise Decline(f"size {axis} is copied from the first Reshape, and not a size of its input")
        if (sizes != target).any():
            assert node.graph is not None
            node.replace_input_with(1, editor.constant(node.graph, sizes.astype(np.int64), f"{node.name}_sizes"))
    return _rewire(node, inner, editor)


def _undone(node: ir.Node, editor: Editor) -> bool:
    """Squeeze after Unsqueeze, or the reverse, over the same axes."""
    inner = _inner(node, "Unsqueeze" if node.op_type == "Squeeze" else "Squeeze")
    if inner is None:
        return False
    wide = dims_of(inner.outputs[0] if inner.op_type == "Unsqueeze" else node.outputs[0])
    axes = [_axes(n, None if wide is None else len(wide)) for n in (node, inner)]
    if axes[0] is None or axes[0] != axes[1]:
        raise Decline("the axes are not known to be the same")
    return _substitute(node, inner.inputs[0], editor)


def _axes(node: ir.Node, rank: int | None) -> list[int] | None:
    array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    listed = array.ravel().tolist() if array is not None else node.attributes.get_ints("axes", None)
    if listed is None or (rank is None and min(listed, default=0) < 0):
        return None
    return sorted(int(a) + (rank or 0 if a < 0 else 0) for a in listed)


def _cast(node: ir.Node, editor: Editor) -> bool:
    inner = _inner(node, "Cast")
    if inner is None or inner.inputs[0] is None or inner.inputs[0].dtype is None:
        return False
    source, target = inner.inputs[0].dtype, _D(node.attributes.get_int("to", 0))
    middle = _D(inner.attributes.get_int("to", 0))
    if middle not in _WIDER.get(source, ()):
        raise Decline(f"the Cast from {source.name} to {middle.name} may lose something")
    if target == source:
        return _substitute(node, inner.inputs[0], editor)
    if target not in _WIDER and target not in (_D.INT64, _D.UINT64, _D.DOUBLE):
        raise Decline(f"Cast to {target.name} may depend on where it comes from")
    if source in _FLOATS and target not in _FLOATS and target != _D.BOOL:
        raise Decline(f"Cast from a float to {target.name} may saturate")
    return _rewire(node, inner, editor)


def _cast_like(node: ir.Node, editor: Editor) -> bool:
    """CastLike is a Cast to the type of its second input, whose value it does not need."""
    target = node.inputs[1].dtype if node.inputs[1] is not None else None
    if target is None or "saturate" in node.attributes:
        return False
    output = node.outputs[0]
    if output.dtype is not None and output.dtype != target:
        raise Decline(f"the graph says that the result has type {output.dtype.name}, not {target.name}")
    new = editor.node(node, "Cast", [node.inputs[0]], {"to": int(target)}, like=output)
    return _replaced(node, new, editor)


def _replaced(node: ir.Node, new: ir.Value, editor: Editor) -> bool:
    editor.replace(node.outputs[0], new)
    editor.remove(node)
    return True


def _involution(node: ir.Node, editor: Editor) -> bool:
    inner = _inner(node, node.op_type)
    return inner is not None and _substitute(node, inner.inputs[0], editor)


_RULES = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _undone,
    "Unsqueeze": _undone,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Not": _involution,
    "Neg": _involution,
}
