"""Which image tokens matter: scores that are written into the graph, one for each image token of a row.

====================  =====================================================================================
attention             of the last text token, FastV (arXiv 2403.06764) with rotary embedding, FEATHER
                      (arXiv 2412.13180) without: rotary positions favour the image tokens next to the text
relevance, diversity  EfficientVLA (arXiv 2506.10100): what the text attends to, and what is least like it
random, uniform       baselines that look at nothing
====================  =====================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.ir.analyses.layers import Layer
from planish.ir.graphs import dims_of, is_op
from planish.passes.base import Decline
from planish.passes.tokens.emitter import Emitter

_VIEWS = ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Attended:
    """Queries and keys of an attention, (batch, tokens, heads · size) or (batch, heads, tokens, size)."""

    queries: ir.Value
    keys: ir.Value
    q_heads: int
    kv_heads: int
    size: int
    scale: float
    softcap: float = 0.0


def find_attended(layer: Layer, *, rotary: bool) -> Attended:
    """Queries and keys of the self-attention of a layer, with or without their rotary embedding.

    Raises:
        Decline: it is not one operator, or the embedding is not.
    """
    found = [node for node in layer.nodes if is_op(node, "Attention")]
    if len(found) != 1:
        what = f"{len(found)} Attention operators" if found else "no Attention operator; prune-tokens comes behind"
        raise Decline(f"'{layer.name}' has {what}{'' if found else ' fuse-attention'}")
    node = found[0]
    q, k = node.inputs[:2]
    dims = dims_of(q)
    if q is None or k is None or dims is None or dims_of(k) is None:
        raise Decline(f"the shapes of Attention '{node.name}' are not known")
    kv_dims = dims_of(k) or ()
    if len(dims) == 4:
        heads, kv_heads, size = dims[1], kv_dims[1], dims[3]
    else:
        heads, kv_heads = (node.attributes.get_int(f"{name}_num_heads", 0) for name in ("q", "kv"))
        size = dims[2] // heads if heads and isinstance(dims[2], int) else None
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or not isinstance(size, int):
        raise Decline(f"the heads of Attention '{node.name}' are not known")
    scale = node.attributes.get_float("scale", 0.0) or size**-0.5
    softcap = node.attributes.get_float("softcap", 0.0)
    if not rotary:
        q, k = (_before_rotary(v, layer) for v in (q, k))
    return Attended(q, k, heads, kv_heads, size, scale, softcap)


def _before_rotary(value: ir.Value, layer: Layer) -> ir.Value:
    at = value
    while True:
        node = at.producer()
        if node is not None and node.op_type == "RotaryEmbedding":
            found = node.inputs[0]
            assert found is not None
            return found
        if not is_op(node, *_VIEWS):
            break
        assert node is not None and node.inputs[0] is not None
        at = node.inputs[0]
    parts = [v.producer() for v in node.inputs if v is not None] if node is not None else []
    written_out = is_op(node, "Add") and len(parts) == 2 and all(is_op(p, "Mul") for p in parts)
    if written_out or is_op(node, "Concat"):
        raise Decline(f"the rotary embedding of '{layer.name}' is not one operator; fuse-rotary-embedding comes before")
    return value


@dataclass
class Image:
    """Where image tokens lie.

    Attributes:
        count: how many each row has.
        start: the place of the first one, where they follow each other at the same place of every row.
        mask: else int64 (batch, tokens), 1 for an image token.
        positions: their places, int64 (batch, count), ascending.
    """

    count: int
    start: int | None = None
    mask: ir.Value | None = None
    positions: ir.Value | None = None

    def place(self, emit: Emitter, hidden: ir.Value) -> ir.Value:
        """`positions`, written into the graph."""
        if self.start is not None:
            row = emit.constant(np.arange(self.start, self.start + self.count, dtype=np.int64)[None], "image_tokens")
            self.positions = emit.expand(row, emit.size(hidden, 0), emit.ints(1))
        else:
            assert self.mask is not None
            self.positions = emit.top(self.mask, self.count)
        return self.positions

    def after(self, emit: Emitter, kept: ir.Value, count: int) -> Image:
        """Where they lie among the tokens that are left."""
        if self.mask is None:
            return Image(count, self.start)
        return Image(count, None, emit.add("GatherElements", self.mask, kept, axis=1))


def from_query(emit: Emitter, a: Attended, image: ir.Value, query: ir.Value, *, all_keys: bool, hide: bool) -> ir.Value:
    """Mean over heads of the attention of one token of each row to the image tokens, (batch, count).

    Args:
        query: its place, int64 (batch, 1).
        all_keys: whether the softmax is over all tokens, as in the model, or over the image tokens.
        hide: whether tokens may follow the query, which it does not see.
    """
    q = emit.reshape(emit.pick(_rows(emit, a.queries), query), 0, a.kv_heads, -1, a.size)
    keys = _rows(emit, a.keys)
    k = emit.reshape(keys if all_keys else emit.pick(keys, image), 0, -1, a.kv_heads, a.size)
    scores = _scores(emit, a, q, emit.transpose(k, (0, 2, 3, 1)))  # (batch, kv heads, group, keys)
    if all_keys and hide:
        later = emit.add("Greater", _places(emit, keys), emit.reshape(query, -1, 1, 1, 1))
        scores = emit.add("Where", later, emit.number(float(np.finfo(np.float32).min), a.queries), scores)
    shares = emit.reshape(emit.add("Softmax", scores, axis=-1), 0, a.q_heads, -1)
    found = emit.add("ReduceMean", shares, emit.ints(1), keepdims=0)
    return emit.add("GatherElements", found, image, axis=1) if all_keys else found


def from_text(emit: Emitter, a: Attended, image: ir.Value, count: int, last: ir.Value) -> ir.Value:
    """The attention to each image token, (batch, count), averaged over heads and summed over the text behind the image.

    Args:
        image: places of the image tokens, int64 (batch, count).
        last: place of the last token of the text, int64 (batch, 1).
    """
    rows = _rows(emit, a.queries)
    q = emit.reshape(rows, 0, -1, a.kv_heads, a.q_heads // a.kv_heads, a.size)
    q = emit.reshape(emit.transpose(q, (0, 2, 3, 1, 4)), 0, a.kv_heads, -1, a.size)
    k = emit.reshape(emit.pick(_rows(emit, a.keys), image), 0, count, a.kv_heads, a.size)
    scores = _scores(emit, a, q, emit.transpose(k, (0, 2, 3, 1)))  # (batch, kv heads, group · tokens, count)
    shares = emit.reshape(emit.add("Softmax", scores, axis=-1), 0, a.q_heads, -1, count)
    shares = emit.add("ReduceMean", shares, emit.ints(1), keepdims=0)
    places = _places(emit, rows)
    end = emit.add("Slice", image, emit.ints(count - 1), emit.ints(count), emit.ints(1))
    text = emit.add("And", emit.add("Greater", places, end), emit.add("LessOrEqual", places, last))
    weights = emit.add("Cast", emit.add("Unsqueeze", text, emit.ints(1)), to=ir.DataType.FLOAT)
    return emit.add("Squeeze", emit.add("MatMul", weights, shares), emit.ints(1))


def relevant_and_diverse(
    emit: Emitter, hidden: ir.Value, image: ir.Value, relevance: ir.Value, first: int, by_relevance: int
) -> ir.Value:
    """Scores, (batch, count), by which the most relevant tokens come first, then those least like the first ones.

    Args:
        hidden: the hidden state, (batch, tokens, width), whose cosines say how alike tokens are.
        first: how many of the most relevant tokens the others are compared with.
        by_relevance: how many come first, `first` included.
    """
    best = emit.top(relevance, by_relevance)
    tokens = emit.pick(hidden, image)
    norm = emit.add("ReduceL2", tokens, emit.ints(-1), keepdims=1)
    unit = emit.add("Div", tokens, emit.add("Max", norm, emit.number(1e-12, hidden)))
    key = emit.add("Slice", best, emit.ints(0), emit.ints(first), emit.ints(1))
    alike = emit.add("MatMul", unit, emit.transpose(emit.pick(unit, key), (0, 2, 1)))
    far = emit.add("Neg", emit.add("ReduceMax", alike, emit.ints(-1), keepdims=0))
    above = emit.add("Expand", emit.number(2.0, hidden), emit.add("Shape", best))  # -far is at most 1
    return emit.add("ScatterElements", far, best, above, axis=1)


def _rows(emit: Emitter, value: ir.Value) -> ir.Value:
    """Tokens along axis 1."""
    return emit.transpose(value, (0, 2, 1, 3)) if len(dims_of(value) or ()) == 4 else value


def _scores(emit: Emitter, a: Attended, q: ir.Value, k: ir.Value) -> ir.Value:
    scores = emit.add("MatMul", emit.add("Mul", q, emit.number(a.scale, a.queries)), k)
    if a.softcap:
        cap = emit.number(a.softcap, a.queries)
        scores = emit.add("Mul", emit.add("Tanh", emit.add("Div", scores, cap)), cap)
    return scores


def _places(emit: Emitter, rows: ir.Value) -> ir.Value:
    """0, 1, … for each token, int64 (tokens)."""
    zero, one = (emit.constant(np.array(n, np.int64)) for n in (0, 1))
    return emit.add("Range", zero, emit.add("Squeeze", emit.size(rows, 1), emit.ints(0)), one)


__all__ = ["Attended", "Image", "find_attended", "from_query", "from_text", "relevant_and_diverse"]
