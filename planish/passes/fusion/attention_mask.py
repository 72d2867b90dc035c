"""The mask of ONNX's Attention that means what the masking steps of a decomposed graph mean, on ONNX Runtime.

Its CPU kernel does not broadcast the last two axes of a mask, and a row that is wholly at ``-inf`` or at the lowest
float gives zeros (measured on 1.31): so masks are expanded, and lowest values are raised by a few percent.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.fusion.attention_match import Attention, Mask
from planish.passes.fusion.mask_values import ALMOST_LOWEST, bounds
from planish.passes.fusion.sizes import Term, sizes

_MASKING = -1e4  # fills above this might be scores
_FULL_MASK, _BIAS = -1e8, -1e3  # what is below the one absorbs scores, what is above the other is added to them


def build_mask(op: Any, found: Attention, lengths: tuple[Term, Term], graph: ir.Graph) -> ir.Value | None:
    """Builds the ``attn_mask`` input for `found`, or returns None if there is no mask.

    Args:
        op: the builder of the rewrite.
        lengths: number of queries and of keys, as terms.
        graph: where the new nodes will be.

    Raises:
        Decline: the masking can not be said exactly.
    """
    if not found.masks:
        return None
    if len(found.masks) > 1:
        return _build_sum(op, found, lengths, graph)
    mask = found.masks[0]
    made = _added(op, mask, found.guarded) if mask.fill is None else _filled(op, mask, found.guarded)
    return _fitted(op, made, sizes(mask.value), found, lengths, graph)


def _build_sum(op: Any, found: Attention, lengths: tuple[Term, Term], graph: ir.Graph) -> ir.Value:
    """Several additions are one addition of their sum: position biases and a mask."""
    if any(m.fill is not None for m in found.masks):
        raise Decline("the scores are masked by a Where and by another step")
    total: ir.Value | None = None
    masking = 0
    for mask in found.masks:
        known = bounds(mask.value)
        if known is None or known.infinite:
            raise Decline("several masks are added, and their sum may be -inf")
        # In between, the order of the additions would show in rows where all is masked.
        if _FULL_MASK < known.low < _BIAS:
            raise Decline(f"several masks are added, and one holds {known.low:g}: the order of additions matters")
        masking += known.low <= _FULL_MASK
        value = _added(op, mask, found.guarded)
        total = value if total is None else op.Add(total, value)
    if masking > 1:
        raise Decline("several masks are added, and their sum may be -inf")
    assert total is not None
    dims = [sizes(m.value) for m in found.masks]
    if any(d is None for d in dims):
        raise Decline("the rank of the mask is unknown")
    # The sum of masks of different shapes is expanded in any case.
    widest = dims[0] if all(d == dims[0] for d in dims) else (1,) * max(len(d) for d in dims if d is not None)
    return _fitted(op, total, widest, found, lengths, graph)


def _added(op: Any, mask: Mask, guarded: bool) -> ir.Value:
    if mask.value.dtype != ir.DataType.FLOAT:
        raise Decline(f"the mask is {mask.value.dtype.name if mask.value.dtype else 'of unknown dtype'}, not float32")
    known = bounds(mask.value)
    if known is None or (known.infinite and not guarded):
        raise Decline("the mask may hold -inf: a row of them is NaN here and zeros in Attention")
    if known.low > ALMOST_LOWEST:
        return mask.value
    if known.infinite:
        raise Decline("the mask mixes -inf with the lowest float, which Attention takes for the same")
    raised: ir.Value = op.Max(mask.value, np.float32(ALMOST_LOWEST))
    return raised


def _filled(op: Any, mask: Mask, guarded: bool) -> ir.Value:
    assert mask.fill is not None
    if mask.fill > _MASKING:
        raise Decline(f"the scores are filled with {mask.fill:g}, which may be a score")
    if math.isinf(mask.fill):
        if not guarded:
            raise Decline("the scores are filled with -inf: a row of them is NaN here and zeros in Attention")
        return mask.value if mask.keep else op.Not(mask.value)
    zero, low = np.float32(0.0), np.float32(ALMOST_LOWEST)
    made: ir.Value = op.Where(mask.value, zero, low) if mask.keep else op.Where(mask.value, low, zero)
    return made


def _fitted(
    op: Any,
    mask: ir.Value,
    dims: tuple[Term, ...] | None,
    found: Attention,
    lengths: tuple[Term, Term],
    graph: ir.Graph,
) -> ir.Value:
    """`mask` with its last two axes as long as queries and keys are."""
    if dims is None:
        raise Decline("the rank of the mask is unknown")
    if len(dims) > 4:
        raise Decline(f"the mask has rank {len(dims)}")
    heads = (sizes(found.q) or (None,) * 4)[1]
    if len(dims) >= 3 and isinstance(dims[-3], int) and dims[-3] not in (1, heads):
        raise Decline(f"the mask has {dims[-3]} heads and the queries have {heads}")
    if len(dims) >= 2 and dims[-2:] == lengths:
        return mask
    if all(isinstance(n, int) for n in lengths):
        target: Any = np.array([1, 1, *lengths], dtype=np.int64)
    else:
        sources = ((found.q, 2), (found.k, 1 if found.k_perm else 2))
        parts = [_length(op, n, *source, graph) for n, source in zip(lengths, sources, strict=True)]
        target = op.Concat(np.array([1, 1], dtype=np.int64), *parts, axis=0)
    expanded: ir.Value = op.Expand(mask, target)
    return expanded


def _length(op: Any, length: Term, value: ir.Value, axis: int, graph: ir.Graph) -> Any:
    """A vector of one item: `length`; read off an input of the graph where that has it, so that layers share it."""
    if isinstance(length, int):
        return np.array([length], dtype=np.int64)
    for candidate in graph.inputs:
        dims = sizes(candidate) or ()
        if isinstance(length, str) and length in dims:
            value, axis = candidate, dims.index(length)
            break
    node = value.producer()
    perm = node.attributes.get_ints("perm", None) if is_op(node, "Transpose") else None  # type: ignore[union-attr]
    if perm is not None:
        value, axis = node.inputs[0], perm[axis]  # type: ignore
    return op.Shape(value, start=axis, end=axis + 1)
