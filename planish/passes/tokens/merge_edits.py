"""Writes token merging into the layers of an encoder: the merges, and what attention has to know of sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import dims_of
from planish.ir.ops.merge_reference import merged_count
from planish.passes.canonicalize.editing import Editor
from planish.passes.tokens.emitter import Behind, Emitter
from planish.passes.tokens.merge_sites import Encoder, Site

Tokens = int | str | None


@dataclass(frozen=True)
class Plan:
    """What merges in an encoder.

    Attributes:
        r: tokens that each layer merges.
        ratio: the share of the tokens that each layer merges besides.
        protected: tokens in front that stay as they are.
        proportional: a merged token counts in attention as often as its size says.
        weighted: a merged token counts in later means as often as its size says; else as one.
        op: the operator; `margins` are those of each layer, where the operator has one.
    """

    r: list[int]
    ratio: float
    protected: int
    proportional: bool = True
    op: str = "MergeTokens"
    margins: list[float] | None = None
    weighted: bool = True

    def attributes(self, layer: int) -> dict[str, Any]:
        own = {} if self.margins is None else {"margin": float(self.margins[layer])}
        return {"r": self.r[layer], "ratio": float(self.ratio), "protected": self.protected, **own}

    def left(self, layer: int, tokens: Tokens) -> Tokens:
        """The tokens behind a layer; None if they are unknown."""
        if not isinstance(tokens, int):
            return tokens if not self.r[layer] and not self.ratio else None
        return tokens - merged_count(tokens, self.r[layer], self.ratio, self.protected)


@dataclass
class Merged:
    """The tokens as they are behind some merges.

    Attributes:
        tokens: how many there are.
        sizes: of each, (batch, tokens); None before the first merge.
        index: where each of the first tokens is now, (batch, first tokens); None before the first merge.
    """

    tokens: Tokens
    sizes: ir.Value | None = None
    index: ir.Value | None = None


def merge_layers(encoder: Encoder, plan: Plan, editor: Editor) -> Merged:
    """Merges tokens in the layers; what is behind them has to be seen to. Returns what they are there."""
    flow = encoder.flow
    for edit in flow.sizes:
        edit.node.replace_input_with(1, editor.constant(flow.graph, np.array(edit.sizes, np.int64), "token_sizes"))
        edit.node.attributes.pop("allowzero", None)
    readers = {
        node for value in flow.axes for node in [value.producer()] if node is not None and value is not flow.start
    }
    state = Merged(flow.tokens)
    counts: dict[ir.Value, Tokens] = {}
    for number, site in enumerate(encoder.sites):
        if state.sizes is not None:
            _attend(site, state, plan.proportional, editor)
        left = plan.left(number, state.tokens)
        if left == state.tokens and (left is not None or not plan.r[number]):
            continue
        if left is None:
            left = editor.names.fresh("merged_tokens")
        users = [(user, index) for user, index in site.at.uses() if user in readers]
        merged, state = _merge(site, state, plan, number, left, editor)
        for user, index in users:
            user.replace_input_with(index, merged)
        counts[merged] = left
        editor.fired += 1
    _set_shapes(encoder, counts)
    return state


def _merge(site: Site, state: Merged, plan: Plan, number: int, left: Tokens, editor: Editor) -> tuple[ir.Value, Merged]:
    """One merge behind the hidden state of a site."""
    node = site.at.producer()
    assert node is not None
    emit = Behind(editor, node)
    keys = site.attention.inputs[1]
    sizes = state.sizes if plan.weighted else None
    if sizes is None:
        one = emit.constant(np.array(1, np.float32), "token_size")
        sizes = emit.add("Expand", one, emit.add("Shape", site.at, start=0, end=2))
        _typed(sizes, ir.DataType.FLOAT, (_dims(site.at)[0], state.tokens))
    if not site.heads:
        keys = emit.add("ReduceMean", keys, emit.ints(1), keepdims=0)
    attributes = plan.attributes(number) | {"heads": site.heads or 1}
    y, merged, index = emit.outputs(f"planish.{plan.op}", 3, site.at, keys, sizes, **attributes)
    batch, _, width = _dims(site.at)
    _typed(y, ir.DataType.FLOAT, (batch, left, width))
    _typed(merged, ir.DataType.FLOAT, (batch, left))
    _typed(index, ir.DataType.INT64, (batch, state.tokens))
    if state.index is not None:
        before = state.index
        index = emit.add("GatherElements", index, before, axis=1)
        _typed(index, ir.DataType.INT64, _dims(before))
    return y, Merged(left, merged, index)


def _attend(site: Site, state: Merged, proportional: bool, editor: Editor) -> None:
    """Gives the attention of a layer the mask that merged tokens want.

    A key of size s counts s times in the softmax if log s is added to its scores. A bias by position is that between
    the first tokens that have become part of a token each.
    """
    node = site.attention
    emit = Emitter(editor, node)
    assert state.sizes is not None and state.index is not None
    bias = None
    if proportional:
        bias = emit.add("Unsqueeze", emit.add("Log", state.sizes), emit.ints(1, 2))
    if site.bias is not None:
        shared = _shared_bias(emit, site.bias, state)
        bias = shared if bias is None else emit.add("Add", shared, bias)
    elif bias is not None:  # ONNX Runtime wants the last two axes in full
        if isinstance(state.tokens, int):
            sizes = emit.ints(state.tokens, state.tokens)
        else:
            tokens = emit.size(state.sizes, 1)
            sizes = emit.add("Concat", tokens, tokens, axis=0)
        bias = emit.add("Expand", bias, sizes)
    if bias is not None:
        heads = (dims_of(site.bias) or (None,) * 4)[-3] if site.bias is not None else 1
        _typed(bias, ir.DataType.FLOAT, (_dims(site.at)[0], heads, state.tokens, state.tokens))
    if len(node.inputs) > 3:
        node.replace_input_with(3, bias)
    elif bias is not None:
        node.resize_inputs(4)
        node.replace_input_with(3, bias)


def _shared_bias(emit: Emitter, bias: ir.Value, state: Merged) -> ir.Value:
    """Rows and columns of a bias, (batch, heads, tokens, tokens)."""
    assert state.index is not None and state.sizes is not None
    rank = len(dims_of(bias) or ())
    if rank < 4:
        bias = emit.add("Unsqueeze", bias, emit.ints(*range(4 - rank)))
    # Of the tokens that became part of one the first: everything else is ahead of no token.
    first = emit.size(state.index, 1)
    order = emit.add("Range", *(emit.add("Squeeze", v, emit.ints(0)) for v in (emit.ints(0), first)), emit.scalar(1))
    numbers = emit.add("Expand", order, emit.add("Shape", state.index))
    start = emit.add("Expand", first, emit.add("Shape", state.sizes))
    members = emit.add("ScatterElements", start, state.index, numbers, axis=1, reduction="min")
    batch = emit.size(members, 0)
    whole = emit.expand(bias, batch, *[emit.ints(1)] * 3)
    rows = emit.pick(emit.add("Transpose", whole, perm=[0, 2, 1, 3]), members)
    both = emit.pick(emit.add("Transpose", rows, perm=[0, 3, 2, 1]), members)
    return emit.add("Transpose", both, perm=[0, 2, 3, 1])


def _set_shapes(encoder: Encoder, counts: dict[ir.Value, Tokens]) -> None:
    """Tells values behind a merge how many tokens they hold."""
    flow = encoder.flow
    held: dict[ir.Value, Tokens] = dict(counts)
    for node in flow.graph:
        found = [held[v] for v in node.inputs if v is not None and v in held]
        if not found or (node.domain == "planish" and node.op_type.startswith("MergeTokens")):
            continue
        for value in node.outputs:
            if value in flow.axes and value is not flow.start:
                held[value] = found[0]
                dims = list(value.shape) if value.shape is not None else None
                if dims is not None:
                    value.shape = ir.Shape([found[0] if i == flow.axes[value] else d for i, d in enumerate(dims)])


def _typed(value: ir.Value, dtype: ir.DataType, dims: tuple[Any, ...]) -> None:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(dims)


def _dims(value: ir.Value) -> tuple[Any, ...]:
    dims = dims_of(value)
    assert dims is not None
    return dims
