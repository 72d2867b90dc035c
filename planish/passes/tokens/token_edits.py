"""Lets the layers behind a hidden state run with fewer of its tokens, and gives the others back behind them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import dims_of
from planish.passes.canonicalize.editing import Editor
from planish.passes.tokens.emitter import Emitter
from planish.passes.tokens.token_flow import Cut, TokenFlow


def run_with(flow: TokenFlow, fewer: ir.Value, kept: ir.Value, dropped: int, editor: Editor) -> None:
    """Edits the graph so that the readers of a hidden state read `fewer` of its tokens.

    Behind the layers, a token that was dropped has the hidden state that it was dropped with: then everything there
    finds each token at its place.

    Args:
        flow: of the hidden state, traced.
        fewer: the tokens that are left, (batch, kept, width).
        kept: their places, int64 (batch, kept), ascending.
        dropped: how many are not.
    """
    after = [(user, index) for user, index in flow.end.uses()]
    for edit in flow.sizes:
        sizes = editor.constant(flow.graph, np.array(edit.sizes, np.int64), "token_sizes")
        edit.node.replace_input_with(1, sizes)
        edit.node.attributes.pop("allowzero", None)
    for node in flow.shapes:
        if node.inputs[0] is not flow.start and dims_of(node.inputs[0]) == dims_of(flow.start):
            node.replace_input_with(0, flow.start)
    made: dict[tuple[ir.Value, int, int], ir.Value] = {}
    for cut in flow.cuts:
        _cut(flow, cut, kept, made, editor)
    for user, index in flow.start.uses():
        if user in flow.readers and user not in flow.shapes:
            user.replace_input_with(index, fewer)
    _restore(flow, kept, after, editor)
    left = flow.tokens - dropped if isinstance(flow.tokens, int) else None
    for value, axis in flow.axes.items():
        if value is not flow.start:
            dims: list[int | str | None] = list(dims_of(value) or ())
            dims[axis] = left
            value.shape = ir.Shape(dims)


def _cut(
    flow: TokenFlow, cut: Cut, kept: ir.Value, made: dict[tuple[ir.Value, int, int], ir.Value], editor: Editor
) -> None:
    value = cut.node.inputs[cut.index]
    assert value is not None
    key = (value, cut.axis, cut.rank)
    if key not in made:
        dims = dims_of(value)
        assert dims is not None
        emit = Emitter(editor, cut.node)
        picked = value
        if len(dims) < cut.rank:
            picked = emit.add("Unsqueeze", picked, emit.ints(*range(cut.rank - len(dims))))
        batch = (dims_of(flow.start) or (None,))[0]
        if len(dims) < cut.rank or dims[0] != batch or batch is None:
            picked = emit.expand(picked, emit.size(kept, 0), *[emit.ints(1)] * (cut.rank - 1))
        order = list(range(cut.rank))
        order[1], order[cut.axis] = order[cut.axis], order[1]
        moved = cut.axis != 1
        picked = emit.pick(emit.transpose(picked, order) if moved else picked, kept)
        picked = emit.transpose(picked, order) if moved else picked
        picked.type = value.type
        full = [1] * (cut.rank - len(dims)) + list(dims)
        full[0], full[cut.axis] = batch, None
        picked.shape = ir.Shape(full)
        made[key] = picked
    cut.node.replace_input_with(cut.index, made[key])


def _restore(flow: TokenFlow, kept: ir.Value, after: list[tuple[ir.Node, int]], editor: Editor) -> None:
    producer = flow.end.producer()
    assert producer is not None
    follower = next((node for node, _ in after), None)
    # Right behind its producer: whoever reads it comes later.
    anchor = _next(flow.graph, producer) or follower
    if anchor is None:
        return
    emit = Emitter(editor, anchor)
    places = emit.add("Expand", emit.add("Unsqueeze", kept, emit.ints(2)), emit.add("Shape", flow.end))
    whole = emit.add("ScatterElements", flow.start, places, flow.end, axis=1)
    whole.type, whole.shape = flow.end.type, ir.Shape(list(flow.start.shape or ()))
    if flow.end.is_graph_output():
        editor.replace(flow.end, whole)
    for user, index in after:
        user.replace_input_with(index, whole)


def _next(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    found = False
    for other in graph:
        if found:
            return other
        found = other is node
    return None
