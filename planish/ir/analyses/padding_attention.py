"""Padding through attention: rows of a batch never mix, keys in the padding have to be hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from planish.ir.analyses.padding_elementwise import elementwise
from planish.ir.analyses.padding_facts import LOWEST, Fact, Held, Known, Mixes, Span, State

if TYPE_CHECKING:
    from planish.ir.analyses.padding import Flow

SEEN = "each query sees a key that is no padding"


def _attend(
    flow: Flow,
    operands: Sequence[Held],
    places: Sequence[tuple[int, int]],
    causal: bool,
    masks: Sequence[tuple[Held, int | None, int]],
) -> tuple[dict[int, Span], State]:
    """The spans of the result, by the axes of the queries, and its state.

    Args:
        operands: queries, keys and values.
        places: of each, its axes of the batch and of the length.
        causal: query i sees keys 0 … i.
        masks: with the axes of queries, None if there is none, and of keys.
    """
    made: dict[int, Span] = {}
    for x, (batch, length) in zip(operands, places, strict=True):
        if any(axis not in (batch, length) or not s.plain for axis, s in x.spans.items()):
            raise Mixes(f"has {flow.dim} in its heads")
    q, k, v = operands
    (q_batch, q_length), (k_batch, k_length), (v_batch, _) = places
    if q_batch in q.spans:
        if k_batch not in k.spans or v_batch not in v.spans:
            raise Mixes("its operands carry the dimension in different ways")
        made[q_batch] = replace(q.spans[q_batch], fact=Fact.ANY)
    if q_length in q.spans:
        made[q_length] = replace(q.spans[q_length], fact=Fact.ANY)
    keys = k.spans.get(k_length)
    if keys is not None:
        alike = q_length in q.spans and q.spans[q_length].like(keys)
        if not (causal and alike) and not any(_hides(mask, axis) for mask, _, axis in masks):
            raise Mixes(f"sees keys in the padding of {flow.dim}")
        if k.state is not State.FINITE or v.state is not State.FINITE:
            raise Mixes(f"keys or values in the padding of {flow.dim} may be no numbers, hidden or not")
        if any(mask.data for mask, _, _ in masks):
            flow.assumes.add(SEEN)
    # All masks for one reason: a key that one shows and another hides is hidden.
    seen = all(_rows_see(mask, axis) for mask, axis, _ in masks) or all(_sees_itself(mask) for mask, _, _ in masks)
    finite = seen and all(x.state is State.FINITE for x in operands)
    return made, State.FINITE if finite else State.ANY


def _hides(mask: Held, axis: int) -> bool:
    span = mask.spans.get(axis)
    if span is None:
        return False
    if mask.dtype == "BOOL":
        return span.fact == Known(0.0)
    return span.fact is Fact.LOW or (isinstance(span.fact, Known) and span.fact.value <= LOWEST)


def _rows_see(mask: Held, axis: int | None) -> bool:
    """Whether a padded query sees as much as a real one, or at least no row is without a number."""
    span = None if axis is None else mask.spans.get(axis)
    return _finite(mask) or span is None or span.fact is Fact.FREE or span.fact in (Known(1.0),)


def _sees_itself(mask: Held) -> bool:
    return _finite(mask) or mask.diagonal


def _finite(mask: Held) -> bool:
    return mask.dtype != "BOOL" and mask.state is State.FINITE


def _mask(flow: Flow, mask: Held | None) -> list[tuple[Held, int | None, int]]:
    """A mask that is broadcast to (batch, heads, queries, keys)."""
    if mask is None:
        return []
    if mask.rank is None or mask.rank < 2:
        raise Mixes("the rank of its mask is not known")
    return [(mask, mask.rank - 2, mask.rank - 1)]


def _standard(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """Attention of ONNX and of planish: q, k, v as (batch, length, width) or (batch, heads, length, size)."""
    q, k, v = _operands(args)
    mask = args[3] if len(args) > 3 else None
    past = [a for a in args[4:] if a is not None]
    places = [(0, (x.rank or 3) - 2) for x in (q, k, v)]
    if past or len([o for o in node.outputs if o.uses() or o.is_graph_output()]) > 1:
        return _with_past(flow, node, args)
    if mask is not None and mask.dtype != "BOOL" and bool(node.attributes.get_float("softcap", 0.0)):
        raise Mixes("caps its scores, and has a mask that is added")
    causal = bool(node.attributes.get_int("is_causal", 0)) or node.op_type == "FlashAttentionPast"
    spans, state = _attend(flow, (q, k, v), places, causal, _mask(flow, mask))
    return [Held(flow.declared(node.outputs[0]), spans, state)] + [Held(None) for _ in node.outputs[1:]]


def _with_past(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """Caches: rows of a batch do not mix; more is not known."""
    if any(set(a.spans) - {0} for a in args if a is not None):
        raise Mixes(f"reads or writes a cache, or gives its scores, along {flow.dim}")
    return rows(flow, node, args)


def rows(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """What treats each entry along the first axis of its operands alone."""
    if any(set(a.spans) - {0} for a in args if a is not None):
        raise Mixes(f"works across {flow.dim}")
    given = [a.spans[0] for a in args if a is not None and a.spans]
    if any(not s.like(given[0]) for s in given) or not given:
        raise Mixes("its operands carry the dimension in different ways")
    made: list[Held | None] = []
    for value in node.outputs:
        sizes = flow.declared(value)
        if sizes is None or not sizes or not flow.carries(sizes[0]):
            made.append(Held(None) if not value.uses() and not value.is_graph_output() else None)
        else:
            made.append(Held(sizes, {0: replace(given[0], fact=Fact.ANY)}, State.ANY))
    return made


def _packed(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """com.microsoft's Attention: x, weights, bias, key mask, past, added mask."""
    x, key_mask, past, added = (args[k] if len(args) > k else None for k in (0, 3, 4, 5))
    assert x is not None
    if past is not None or (key_mask is not None and key_mask.rank != 2 and 1 in x.spans):
        raise Mixes("has a cache, or a mask in an old form")
    x = replace(x, state=x.state if all(a is None or a.state is State.FINITE for a in args[1:3]) else State.ANY)
    masks = _mask(flow, added) + ([] if key_mask is None else [(replace(key_mask, dtype="BOOL"), None, 1)])
    causal = bool(node.attributes.get_int("unidirectional", 0))
    spans, state = _attend(flow, (x, x, x), [(0, 1)] * 3, causal, masks)
    width = args[1].size(1) if args[1] is not None and "qkv_hidden_sizes" not in node.attributes else None
    third = None if width is None else tuple(n // 3 for n in width)
    return [Held(flow.declared(node.outputs[0]) or (x.size(0), x.size(1), third), spans, state)] + [
        Held(None) for _ in node.outputs[1:]
    ]


def _multi_head(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """com.microsoft's MultiHeadAttention: q, k, v, bias, key mask, added mask, past."""
    q, k, v = _operands(args)
    key_mask, added = (args[n] if len(args) > n else None for n in (4, 5))
    if any(a is not None for a in args[6:]) or any(x.rank not in (3, 4) for x in (q, k, v)):
        return _with_past(flow, node, args)
    if key_mask is not None and key_mask.rank != 2:
        raise Mixes("has a mask in an old form")
    places = [(0, 1 if x.rank == 3 else 2) for x in (q, k, v)]
    masks = _mask(flow, added) + ([] if key_mask is None else [(replace(key_mask, dtype="BOOL"), None, 1)])
    causal = bool(node.attributes.get_int("unidirectional", 0))
    spans, state = _attend(flow, (q, k, v), places, causal, masks)
    sizes = flow.declared(node.outputs[0]) or (q.size(0), q.size(1), v.size(2) if v.rank == 3 else None)
    return [Held(sizes if q.rank == 3 else flow.declared(node.outputs[0]), spans, state)] + [
        Held(None) for _ in node.outputs[1:]
    ]


def _operands(args: Sequence[Held | None]) -> tuple[Held, Held, Held]:
    if any(a is None or a.rank is None for a in args[:3]):
        raise Mixes("its keys or values are packed, or of unknown rank")
    q, k, v = args[:3]
    assert q is not None and k is not None and v is not None
    return q, k, v


def _rotary(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """RotaryEmbedding: x, tables of cosines and sines, and in some forms which row each position has."""
    if node.domain:  # com.microsoft has positions second
        x, positions, cos, sin = (*args, None, None)[:4]
    else:
        x, cos, sin, positions = (*args, None, None)[:4]
    if x is None or x.rank is None or cos is None or sin is None:
        raise Mixes("the rank of an operand is not known")
    length = 1 if x.rank == 3 else 2
    if any(axis not in (0, length) or not s.plain for axis, s in x.spans.items()):
        raise Mixes(f"has {flow.dim} in its heads")
    spans = {axis: replace(s, fact=Fact.ANY) for axis, s in x.spans.items()}
    if positions is not None:
        if cos.spans or sin.spans:
            raise Mixes(f"has {flow.dim} in its tables")
        if positions.rank == 1 and x.spans.keys() & {length} and positions.spans:
            raise Mixes("has positions in an old form")
        from planish.ir.analyses.padding_indices import require_inside

        require_inside(flow, positions, cos.size(0))
    for table in (cos, sin) if positions is None else ():
        for axis, at in ((0, 0), (1, length)):
            span, own = table.spans.get(axis), x.spans.get(at)
            if (span is None) != (own is None) or (span is not None and own is not None and not span.like(own)):
                raise Mixes("its tables and what they rotate carry the dimension in different ways")
    finite = all(a is None or a.state is State.FINITE for a in (x, cos, sin))
    return [Held(x.sizes, spans, State.FINITE if finite else State.ANY)]


def _grouped(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """com.microsoft's GroupQueryAttention: rows do not mix; along a length it has a cache, which has its size."""
    return _with_past(flow, node, args)


def _linear(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """planish's products: rows of the first operand, and of a residual."""
    x = args[0]
    assert x is not None
    residual = args[3] if node.op_type == "LinearAdd" else None
    weights = [a for a in args[1:] if a is not None and a is not residual]
    if x.rank is None or x.rank - 1 in x.spans or any(a.spans for a in weights):
        raise Mixes(f"sums over {flow.dim}")
    made = x.forget(x.state if x.state is State.FINITE else State.ANY)
    made = replace(made, sizes=flow.declared(node.outputs[0]))
    if residual is not None:
        made = elementwise(flow, ir.node("Add", [None, None]), [made, residual.forget()])[0] or made
    return [made]


_DIALECT_ATTENTION = ("FlashAttention", "FlashAttentionBias", "FlashAttentionMask", "FlashAttentionKeyMask")
_DIALECT_ROWS = (
    *("MergeTokens", "MergeTokensMaxNorm", "MergeTokensEnergy", "MergeTokensEnergyMaxNorm", "AddMergeTokensNorm"),
    *("AddMergeTokensEnergyNorm", "UnmergeTokens", "PruneTokens", "PackedAttention", "PackedAttentionKeyBias"),
    *("FlashAttentionKeyBias", "BlockSparseAttention", "BlockSparseAttentionKeyMask", "BlockSparseAttentionTiles"),
    *("BlockSparseAttentionTilesKeyMask", "WindowAttention", "WindowAttentionKeyMask"),
)
_LINEAR = ("Linear", "LinearRelu", "LinearGelu", "LinearGeluTanh", "LinearSilu", "LinearQuickGelu", "LinearAdd")
RULES: dict[tuple[str, str], Callable[..., Sequence[Held | None]]] = {
    ("", "Attention"): _standard,
    ("", "RotaryEmbedding"): _rotary,
    ("com.microsoft", "RotaryEmbedding"): _rotary,
    ("com.microsoft", "Attention"): _packed,
    ("com.microsoft", "MultiHeadAttention"): _multi_head,
    ("com.microsoft", "GroupQueryAttention"): _grouped,
    **{("planish", name): _standard for name in _DIALECT_ATTENTION},
    **{("planish", name): rows for name in _DIALECT_ROWS},
    **{("planish", name): _linear for name in _LINEAR},
}
