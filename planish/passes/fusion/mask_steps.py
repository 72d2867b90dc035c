"""Several masking steps as one addend: what Where and Add do to scores, one after the other, said by one sum.

With scores s, ``Where(allowed, s, fill) + padding`` is ``s + Where(allowed, padding, fill + padding)`` as long as the
fill absorbs every score (float32 has no digits left for it at 1e8), and ``Where(allowed, s + padding, fill)`` is
``s + Where(allowed, padding, fill)``. A fill of -1e4 does not absorb: beside a padding whose values are 0 and close
to the lowest float any fill between means the same, and beside one of -1e4 nothing that is added to scores says what
happens to a row all of whose allowed keys are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.attention_match import Mask
from planish.passes.fusion.mask_values import Bounds, bounds, zero_or_masked
from planish.passes.fusion.sizes import Term, sizes

MASKING = -1e4  # fills above this might be scores
FULL_MASK, _BIAS = -1e8, -1e3  # what is below the one absorbs scores, what is above the other is added to them
_ABSORBED = -1e37  # what is below absorbs _BETWEEN
_BETWEEN = -1e30  # absorbs scores


@dataclass
class Addend:
    """What is added to the scores: its value, its bounds (None: unknown), its shape (None: unknown rank)."""

    value: ir.Value
    bounds: Bounds | None
    dims: tuple[Term, ...] | None


def one_condition(op: Any, masks: list[Mask]) -> Mask | None:
    """Several Where steps with one fill as a single one, or None if there are other steps."""
    if any(m.fill is None or m.fill != masks[0].fill for m in masks):
        return None
    value = masks[0].value if masks[0].keep or len(masks) == 1 else op.Not(masks[0].value)
    for mask in masks[1:]:
        value = op.And(value, mask.value if mask.keep else op.Not(mask.value))
    return Mask(value, masks[0].fill, masks[0].keep if len(masks) == 1 else True)


def one_addend(op: Any, masks: list[Mask]) -> Addend:
    """The sum that `masks` come to, in their order.

    Raises:
        Decline: no sum says it for every value that the masks can have.
    """
    added = [m for m in masks if m.fill is None]
    filled = [m for m in masks if m.fill is not None]
    for mask in added:
        if mask.value.dtype != ir.DataType.FLOAT:
            known = mask.value.dtype.name if mask.value.dtype else "of unknown dtype"
            raise Decline(f"the mask is {known}, not float32")
    if len(added) > 1:
        _require_any_order(added)
    between = bool(filled) and _require_fills(filled, added)
    total: Addend | None = None
    for mask in masks:
        total = _plus(op, total, mask) if mask.fill is None else _where(op, total, mask, between)
    assert total is not None
    return total


def _require_any_order(added: list[Mask]) -> None:
    """(s + a) + b is s + (a + b) but for rounding, which shows where a sum is far from all scores of a row.

    Beside masks that are zero or absorb all else there is none.
    """
    rest = [m for m in added if not zero_or_masked(m.value)]
    limits = [bounds(m.value) for m in rest]
    if len(rest) < 2 and all(b is not None and not b.infinite and max(-b.low, b.high) < -_BETWEEN for b in limits):
        return
    for mask in added:
        known = bounds(mask.value)
        if known is None:
            raise Decline(f"several masks are added, and nothing is known of the values of '{mask.value.name}'")
        if FULL_MASK < known.low < _BIAS or known.high > -FULL_MASK:
            far = known.low if known.low > FULL_MASK else known.high
            raise Decline(f"several masks are added, and one holds {far:g}: the order of additions matters")


def _require_fills(filled: list[Mask], added: list[Mask]) -> bool:
    """Whether fills that do not absorb scores may be replaced by one that does."""
    between = False
    for mask in filled:
        assert mask.fill is not None
        if mask.fill > MASKING:
            raise Decline(f"the scores are filled with {mask.fill:g}, which may be a score")
        between |= mask.fill > FULL_MASK
    if not between:
        return False
    if len({m.fill for m in filled}) > 1:
        raise Decline("the scores are filled with several numbers")
    for mask in added:
        known = bounds(mask.value)
        if known is None or known.low > _ABSORBED or known.high != 0.0:
            raise Decline(
                f"the scores are filled with {filled[0].fill:g} and '{mask.value.name}' is added: a row with no key "
                "that passes both would mix scores and fills"
            )
    return True


def _plus(op: Any, total: Addend | None, mask: Mask) -> Addend:
    known, dims = bounds(mask.value), sizes(mask.value)
    if total is None:
        return Addend(mask.value, known, dims)
    both = None
    if known is not None and total.bounds is not None:
        a, b = known, total.bounds
        both = Bounds(a.low + b.low, a.high + b.high, a.infinite or b.infinite).checked()
    return Addend(op.Add(total.value, mask.value), both, _widest(total.dims, dims))


def _where(op: Any, total: Addend | None, mask: Mask, between: bool) -> Addend:
    fill = _BETWEEN if between else mask.fill
    assert fill is not None
    before: Any = total.value if total is not None else np.float32(0.0)
    known: Bounds | None = total.bounds if total is not None else Bounds(0.0, 0.0)
    low = np.float32(fill)
    made = op.Where(mask.value, before, low) if mask.keep else op.Where(mask.value, low, before)
    if known is not None:
        known = known.join(Bounds(0.0, 0.0, True) if np.isneginf(fill) else Bounds(fill, fill))
    return Addend(made, known, _widest(total.dims if total is not None else (), sizes(mask.value)))


def _widest(a: tuple[Term, ...] | None, b: tuple[Term, ...] | None) -> tuple[Term, ...] | None:
    """The shape of a broadcast if it is that of one side, else ones, which are expanded in any case."""
    if a is None or b is None:
        return None
    if a == b or not b:
        return a
    return b if not a else (1,) * max(len(a), len(b))


__all__ = ["MASKING", "Addend", "one_addend", "one_condition"]
