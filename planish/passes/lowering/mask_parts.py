"""Takes an attention mask apart: causal, a window, constants, and a part that is the same for all queries (padding)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op
from planish.passes.base import Decline
from planish.passes.fusion.index_vectors import index_vector
from planish.passes.fusion.mask_values import ALMOST_LOWEST
from planish.passes.fusion.sizes import Term, scalar, sizes
from planish.passes.lowering.mask_bands import CAUSAL, Band, band_of

_DEPTH = 16
_MOST_ELEMENTS = 1 << 28
_LOWEST = float(np.finfo(np.float32).min)
_HIDDEN = float(np.float32(ALMOST_LOWEST))  #: What is this low absorbs every score.


@dataclass
class MaskParts:
    """A key is seen where all of this holds.

    Attributes:
        hidden: the score of a key that is not seen. With the lowest number a query that sees no key gives zeros in
            ONNX Runtime's Attention; with anything above it the mean of all values, since all weights are equal.
        causal: key j is seen by query i if j <= i, both counted from 0.
        keys: bool values, broadcast to (batch, 1, 1, keys), that are true where a key is seen.
        band: which keys around a query it sees, where windows are asked for; `causal` is then a part of it.
        fixed: constants, broadcast to (batch, heads, queries, keys), where windows are asked for.
    """

    hidden: float = _LOWEST
    causal: bool = False
    keys: list[ir.Value] = field(default_factory=list)
    band: Band = field(default_factory=Band)
    fixed: list[np.ndarray] = field(default_factory=list)


def mask_parts(mask: ir.Value, queries: Term, keys: Term, *, windows: bool = False) -> MaskParts:
    """The parts of `mask`, of bool or float, for so many queries and keys.

    A float mask must be made of 0 and of one number that absorbs every score. With `windows`, other bands than the
    causal one and constants are parts too.

    Raises:
        Decline: it has other parts, or it is not known what it is made of; the reason names the node.
    """
    parts = MaskParts()
    condition = mask if mask.dtype == ir.DataType.BOOL else _condition(mask, parts, _DEPTH, windows)
    for leaf in [] if condition is None else leaves(condition):
        if _always(leaf):
            continue
        dims = sizes(leaf)
        if dims is None:
            raise Decline(f"the rank of a part of its mask, '{leaf.name}', is unknown")
        if len(dims) < 2 or dims[-2] == 1:
            if len(dims) > 2 and dims[-3] != 1:
                raise Decline(f"a part of its mask, '{leaf.name}', differs by head")
            parts.keys.append(leaf)
        elif dims[-2:] == (queries, keys) and (band := band_of(leaf)) is not None and (windows or band == CAUSAL):
            parts.causal = parts.causal or band == CAUSAL
            parts.band = parts.band.both(band, leaf)
        elif windows and (array := constant_array(leaf, _MOST_ELEMENTS)) is not None:
            parts.fixed.append(array)
        else:
            more = ", a window" if windows else ""
            raise Decline(f"a part of its mask, '{leaf.name}', is neither causal{more} nor the same for all queries")
    return parts


def _condition(mask: ir.Value, parts: MaskParts, depth: int, windows: bool) -> ir.Value | None:
    """The bool that a float mask of zeros and hidden scores is made of; `parts` learns the score, or the constant."""
    node = mask.producer()
    array = constant_array(mask, _MOST_ELEMENTS) if windows else None
    if array is not None:
        _learn_constant(mask, array, parts)
        return None
    sides = [] if node is None else [value for value in node.inputs if value is not None]
    if depth and is_op(node, "Expand", "Identity"):
        return _condition(sides[0], parts, depth - 1, windows)
    if depth and is_op(node, "Max") and len(sides) == 2:
        for side, other in (sides, sides[::-1]):
            least = scalar(other)
            if least is not None and _LOWEST <= least <= _HIDDEN:
                found = _condition(side, parts, depth - 1, windows)
                parts.hidden = max(parts.hidden, least)
                return found
    if is_op(node, "Where") and len(sides) == 3 and scalar(sides[1]) == 0.0:
        score = scalar(sides[2])
        if score is not None and score <= _HIDDEN:
            parts.hidden = max(score, _LOWEST)
            return sides[0]
    raise Decline(f"its float mask '{mask.name}' is not known to be made of 0 and the lowest number")


def _learn_constant(mask: ir.Value, array: np.ndarray, parts: MaskParts) -> None:
    """A float mask that is a constant."""
    hidden = array[array != 0]
    if hidden.size and not (np.isneginf(hidden).all() or ((hidden == hidden[0]).all() and hidden[0] <= _HIDDEN)):
        raise Decline(f"its float mask '{mask.name}' is not made of 0 and of one number that absorbs every score")
    if hidden.size:
        parts.hidden = max(float(hidden[0]), _LOWEST)
    parts.fixed.append(array == 0)


def leaves(value: ir.Value, depth: int = _DEPTH) -> Iterator[ir.Value]:
    """What a conjunction is made of; a broadcast part is given as it is before it."""
    node = value.producer()
    if depth and is_op(node, "And"):
        assert node is not None
        for side in node.inputs:
            assert side is not None
            yield from leaves(side, depth - 1)
    elif depth and is_op(node, "Expand", "Identity"):
        assert node is not None and node.inputs[0] is not None
        yield from leaves(node.inputs[0], depth - 1)
    else:
        yield value


def _always(value: ir.Value) -> bool:
    """Whether a bool is true everywhere: a constant, or positions that are compared with 0."""
    array = constant_array(value, 1 << 24)
    if array is not None:
        return bool(array.all())
    node = value.producer()
    if not is_op(node, "GreaterOrEqual"):
        return False
    assert node is not None
    index = index_vector(node.inputs[0])
    return index is not None and index.offset.never_negative and scalar(node.inputs[1]) == 0.0
