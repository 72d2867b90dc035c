"""Takes heads out of the weights, the sizes and the counts that :mod:`head_flow` has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from planish.ir.causal_lm import KEPT_HEADS
from planish.ir.graphs import constant_array, constant_tensor, dims_of, is_op
from planish.ir.program import Program
from planish.passes.base import Decline
from planish.passes.canonicalize.editing import Editor
from planish.passes.layers.head_flow import Count, Cut, HeadFlow, Pick, Size
from planish.passes.layers.head_views import Layout

Kept = Mapping[str, Sequence[int]]
#: (tensor by identity, how it is cut) → the tensor, which keeps its identity its own, and what is left of it.
Memo = dict[tuple[object, ...], tuple[ir.TensorProtocol, ir.TensorProtocol]]


def require_untied(program: Program, flows: Sequence[HeadFlow]) -> None:
    """Weight matrices are cut for all who read them, or not at all.

    Raises:
        Decline: something that is not cut along reads one of them, or it is cut in two ways.
    """
    ways: dict[int, tuple[int, str]] = {}
    cuts = [edit for flow in flows for edit in flow.edits if isinstance(edit, Cut) and edit.matrix]
    places = {(edit.node, edit.index) for edit in cuts}
    for edit in cuts:
        value = edit.node.inputs[edit.index]
        if ways.setdefault(id(constant_tensor(value)), _way(edit)) != _way(edit):
            raise Decline(f"'{_name(value)}' is read in two ways")
    for graph in program.graphs():
        for value in graph.initializers.values():
            if id(value.const_value) not in ways:
                continue
            if value.is_graph_input() or value.is_graph_output():
                raise Decline(f"'{value.name}' is an input or an output of the model")
            for user, index in value.uses():
                if (user, index) not in places:
                    reader = f"{user.op_type} '{user.name}'"
                    raise Decline(f"'{value.name}' is also read by {reader}, whose heads would go too")


def require_sizes(flow: HeadFlow) -> None:
    """Raises Decline: the sizes that a Reshape makes can not be changed."""
    for edit in flow.edits:
        if isinstance(edit, Size):
            _place_of_size(edit)


def cut_heads(flow: HeadFlow, kept: Kept, editor: Editor, memo: Memo) -> None:
    """Leaves only the heads `kept`, by role, in everything that belongs to an attention.

    Args:
        memo: tensors that were cut already; give the same to all entries, which share their weights.
    """
    edits = list(flow.edits)
    own = _own_constants(edits)
    for edit in edits:
        if isinstance(edit, Count):
            edit.node.attributes[edit.name] = ir.AttrInt64(edit.name, len(kept[edit.role]))
        elif isinstance(edit, Size):
            _resize(flow.graph, edit, len(kept[edit.layout.role]) * edit.layout.depth, editor)
        elif isinstance(edit, Pick):
            _pick(flow.graph, edit, kept, editor)
    # Last: what is an operand of several edits is cut once, in place.
    for value in own:
        edit = own[value]
        tensor = _without(value, edit.layout, kept, memo)
        value.const_value, value.shape = tensor, ir.Shape(tensor.shape.numpy())
    for edit in edits:
        operand = edit.node.inputs[edit.index] if isinstance(edit, Cut) else None
        if isinstance(edit, Cut) and operand is not None and operand not in own:
            new = editor.constant(flow.graph, _without(operand, edit.layout, kept, memo), f"{operand.name}_heads")
            edit.node.replace_input_with(edit.index, new)
    for value, layout in flow.layouts.items():
        if value.is_graph_input():
            _note_kept(value, kept[layout.role], layout)
        dims = list(value.shape or ())
        dims[layout.axis] = len(kept[layout.role]) * layout.depth
        value.shape = ir.Shape(dims)


def _note_kept(value: ir.Value, kept: Sequence[int], layout: Layout) -> None:
    """What holds caches of the whole model, such as calibration inputs, is cut by this."""
    known = value.metadata_props.get(KEPT_HEADS)
    before = [int(text) for text in known.split()] if known is not None else range(layout.heads)
    value.metadata_props[KEPT_HEADS] = " ".join(str(before[head]) for head in kept)


def _way(edit: Cut) -> tuple[int, str]:
    return edit.layout.axis, edit.layout.role


def _name(value: ir.Value | None) -> str:
    return (value.name or "?") if value is not None else "?"


def _own_constants(edits: Sequence[object]) -> dict[ir.Value, Cut]:
    """Initializers that nobody reads but these edits, in one way: cut in place, they keep their name."""
    found: dict[ir.Value, list[Cut]] = {}
    for edit in edits:
        value = edit.node.inputs[edit.index] if isinstance(edit, Cut) else None
        if isinstance(edit, Cut) and value is not None and value.is_initializer():
            found.setdefault(value, []).append(edit)
    return {
        value: cuts[0]
        for value, cuts in found.items()
        if {tuple(use) for use in value.uses()} == {(c.node, c.index) for c in cuts}
        and len({c.layout for c in cuts}) == 1
        and not value.is_graph_input()
        and not value.is_graph_output()
    }


def _without(value: ir.Value, layout: Layout, kept: Kept, memo: Memo) -> ir.TensorProtocol:
    tensor = constant_tensor(value)
    assert tensor is not None
    key = (id(tensor), layout, tuple(kept[layout.role]))
    if key not in memo:
        array = np.take(np.asarray(tensor.numpy()), layout.places(kept[layout.role]), layout.axis)
        memo[key] = tensor, ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=value.name)
    return memo[key][1]


def _pick(graph: ir.Graph, edit: Pick, kept: Kept, editor: Editor) -> None:
    value = edit.node.inputs[edit.index]
    assert value is not None
    indices = editor.constant(graph, edit.layout.places(kept[edit.layout.role]), "kept_heads")
    axis = len(dims_of(value) or ()) + edit.layout.axis
    picked = editor.node(edit.node, "Gather", [value, indices], {"axis": axis}, sources=[edit.node])
    dims = list(value.shape or ())
    dims[axis] = len(kept[edit.layout.role])
    picked.type, picked.shape = value.type, ir.Shape(dims)
    edit.node.replace_input_with(edit.index, picked)


def _place_of_size(edit: Size) -> tuple[ir.Node, int, np.ndarray, int] | None:
    """(node, input, its contents, position in them) of the number to change; None if it follows by itself.

    Raises:
        Decline: it is computed.
    """
    node, value = edit.node, edit.node.inputs[1]
    rank = len(dims_of(node.outputs[0]) or ())
    at, operand = rank + edit.position, 1
    producer = value.producer() if value is not None else None
    if producer is not None and is_op(producer, "Concat"):
        node = producer
        ends = np.cumsum([_length(part, edit) for part in node.inputs])
        operand = int(np.searchsorted(ends, at, side="right"))
        at -= int(ends[operand - 1]) if operand else 0
    array = constant_array(node.inputs[operand])
    if array is None:
        raise Decline(f"the sizes of Reshape '{edit.node.name}' are computed")
    number = int(array[at])
    # 0 copies the size in the same place, counted from the front: that holds heads too if the ranks agree there.
    if number == 0 and not edit.node.attributes.get_int("allowzero", 0):
        return node, operand, array, at
    return None if number == -1 else (node, operand, array, at)


def _length(value: ir.Value | None, edit: Size) -> int:
    dims = dims_of(value)
    if not dims or not isinstance(dims[0], int):
        raise Decline(f"the sizes of Reshape '{edit.node.name}' are not known")
    return dims[0]


def _resize(graph: ir.Graph, edit: Size, size: int, editor: Editor) -> None:
    found = _place_of_size(edit)
    if found is None:
        return
    node, operand, array, at = found
    sizes = array.copy()
    sizes[at] = size
    if node is not edit.node:  # a Concat, which others may read: this Reshape gets one of its own
        inputs = list(node.inputs)
        inputs[operand] = editor.constant(graph, sizes, "head_sizes")
        attributes = {"axis": node.attributes.get_int("axis")}
        made = editor.node(edit.node, "Concat", inputs, attributes, like=node.outputs[0], sources=[node])
        edit.node.replace_input_with(1, made)
        return
    edit.node.replace_input_with(operand, editor.constant(graph, sizes, "head_sizes"))
