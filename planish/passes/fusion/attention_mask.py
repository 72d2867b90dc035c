"""The mask that means what the masking steps of a decomposed graph mean, on ONNX Runtime.

Measured on 1.31, on the CPU, of a row whose keys are all masked:

| mask of the row | Softmax | Attention | com.microsoft.MultiHeadAttention |
|---|---|---|---|
| ``-inf`` | NaN | zeros | NaN |
| the lowest float | weights all equal | zeros | weights all equal |
| -3.3e38 | weights all equal | weights all equal | weights all equal |

So a mask whose lowest values are known to be finite is Attention's, with these raised by a few percent, and one that
may hold anything is an attention bias of MultiHeadAttention, which adds it and takes the softmax, no more. Both want
the last two axes as long as queries and keys are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.attention_match import Attention, Mask
from planish.passes.fusion.mask_steps import MASKING, Addend, one_addend, one_condition
from planish.passes.fusion.mask_values import ALMOST_LOWEST, Bounds, bounds
from planish.passes.fusion.sizes import Term, size_vector, sizes


@dataclass
class BuiltMask:
    """A mask, and which operator it is for.

    Attributes:
        plain: the rows need the meaning of a plain softmax, which Attention does not give.
        guarded: rows that are NaN then become zeros.
    """

    value: ir.Value | None
    plain: bool = False
    guarded: bool = False


def build_mask(op: Any, found: Attention, lengths: tuple[Term, Term], graph: ir.Graph) -> BuiltMask:
    """Builds the mask for `found`.

    Args:
        op: the builder of the rewrite.
        lengths: number of queries and of keys, as terms.
        graph: where the new nodes will be.

    Raises:
        Decline: the masking can not be said exactly.
    """
    masks = found.masks = [m for m in found.masks if not _adds_nothing(m, found, lengths)]
    if not masks:
        return BuiltMask(None)
    single = one_condition(op, found.masks) if found.lowest is None else None
    if single is not None:
        made = _filled(op, single, found.guarded)
        if made is not None:
            dims = sizes(single.value) if len(found.masks) == 1 else (1, 1)
            return BuiltMask(_fitted(op, made, dims, found, lengths, graph))
    addend = one_addend(op, found.masks if single is None else [single])
    if found.lowest is not None:
        addend = _clamped(op, addend, found.lowest)
    if _is_plain(addend, found.guarded):
        value = _fitted(op, addend.value, addend.dims, found, lengths, graph, rank=4)
        return BuiltMask(value, plain=True, guarded=found.guarded)
    value = addend.value
    known = addend.bounds
    assert known is not None
    if known.low <= ALMOST_LOWEST and not known.infinite:
        value = op.Max(value, np.float32(ALMOST_LOWEST))
    return BuiltMask(_fitted(op, value, addend.dims, found, lengths, graph))


def _clamped(op: Any, addend: Addend, lowest: float) -> Addend:
    """As low as this every score is absorbed, so that the mask is clamped in place of the sum."""
    known = addend.bounds
    if known is not None and known.low > lowest and not known.infinite:
        return addend
    if known is not None:
        known = Bounds(max(known.low, lowest), max(known.high, lowest))
        if lowest <= ALMOST_LOWEST:
            # It is raised above that in any case.
            return Addend(addend.value, replace(known, low=lowest), addend.dims)
    return Addend(op.Max(addend.value, np.float32(lowest)), known, addend.dims)


def _adds_nothing(mask: Mask, found: Attention, lengths: tuple[Term, Term]) -> bool:
    """Whether it adds zeros: what torch.baddbmm has for the first factor beta is often 0."""
    dims = sizes(mask.value)
    if mask.fill is not None or bounds(mask.value) != Bounds(0.0, 0.0) or dims is None:
        return False
    scores = ((sizes(found.q) or (None,))[0], found.heads, *lengths)
    return len(dims) <= 4 and all(d in (1, s) for d, s in zip(dims[::-1], scores[::-1], strict=False))


def _is_plain(addend: Addend, guarded: bool) -> bool:
    known = addend.bounds
    if known is None or (known.infinite and not guarded):
        return True
    # Attention takes -inf and the lowest float for the same; the guard does not.
    return known.infinite and known.low <= ALMOST_LOWEST


def _filled(op: Any, mask: Mask, guarded: bool) -> ir.Value | None:
    """The mask of one Where; None if rows of ``-inf`` are to stay NaN."""
    assert mask.fill is not None
    if mask.fill > MASKING:
        raise Decline(f"the scores are filled with {mask.fill:g}, which may be a score")
    if math.isinf(mask.fill):
        if not guarded:
            return None
        return mask.value if mask.keep else op.Not(mask.value)  # type: ignore[no-any-return]
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
    rank: int = 0,
) -> ir.Value:
    """`mask` with its last two axes as long as queries and keys are, of `rank` at least."""
    if dims is None:
        raise Decline("the rank of the mask is unknown")
    if len(dims) > 4:
        raise Decline(f"the mask has rank {len(dims)}")
    heads = found.heads
    if len(dims) >= 3 and isinstance(dims[-3], int) and dims[-3] not in (1, heads):
        raise Decline(f"the mask has {dims[-3]} heads and the queries have {heads}")
    if len(dims) >= max(2, rank) and dims[-2:] == lengths:
        return mask
    # What is there already needs no size to be read, from a cache that Attention is to append to, say.
    lengths = tuple(1 if n == d else n for n, d in zip(lengths, dims[-2:], strict=True)) if len(dims) > 1 else lengths  # type: ignore
    if all(isinstance(n, int) for n in lengths):
        target: Any = np.array([1, 1, *lengths], dtype=np.int64)
    else:
        axis = len(sizes(found.q) or ()) - 2
        sources = ((found.q, axis), (found.k, found.k_perm[axis] if found.k_perm else axis))
        parts = [size_vector(op, n, *source, graph) for n, source in zip(lengths, sources, strict=True)]
        target = op.Concat(np.array([1, 1], dtype=np.int64), *parts, axis=0)
    expanded: ir.Value = op.Expand(mask, target)
    return expanded
