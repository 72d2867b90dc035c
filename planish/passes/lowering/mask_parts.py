"""Takes an attention mask apart: the causal part, and a part that is the same for all queries (padding)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op
from planish.passes.base import Decline
from planish.passes.fusion.index_vectors import Offset, index_vector
from planish.passes.fusion.mask_values import ALMOST_LOWEST
from planish.passes.fusion.sizes import Term, rank, scalar, sizes

_DEPTH = 16
_LOWEST = float(np.finfo(np.float32).min)
_HIDDEN = float(np.float32(ALMOST_LOWEST))  #: What is this low absorbs every score.
#: Relation of key to query, by operator and by which side the key is on.
_KEY_LEFT = {"LessOrEqual": 0, "Less": -1}
_KEY_RIGHT = {"GreaterOrEqual": 0, "Greater": -1}


@dataclass
class MaskParts:
    """A key is seen where all of this holds.

    Attributes:
        hidden: the score of a key that is not seen. With the lowest number a query that sees no key gives zeros in
            ONNX Runtime's Attention; with anything above it the mean of all values, since all weights are equal.
        causal: key j is seen by query i if j <= i, both counted from 0.
        keys: bool values, broadcast to (batch, 1, 1, keys), that are true where a key is seen.
    """

    hidden: float = _LOWEST
    causal: bool = False
    keys: list[ir.Value] = field(default_factory=list)


def mask_parts(mask: ir.Value, queries: Term, keys: Term) -> MaskParts:
    """The parts of `mask`, of bool or float, for so many queries and keys.

    A float mask must be made of 0 and of one number that absorbs every score.

    Raises:
        Decline: it has other parts, or it is not known what it is made of; the reason names the node.
    """
    parts = MaskParts()
    condition = mask if mask.dtype == ir.DataType.BOOL else _condition(mask, parts, _DEPTH)
    for leaf in _leaves(condition, _DEPTH):
        if _always(leaf):
            continue
        dims = sizes(leaf)
        if dims is None:
            raise Decline(f"the rank of a part of its mask, '{leaf.name}', is unknown")
        if len(dims) < 2 or dims[-2] == 1:
            if len(dims) > 2 and dims[-3] != 1:
                raise Decline(f"a part of its mask, '{leaf.name}', differs by head")
            parts.keys.append(leaf)
        elif _is_causal(leaf) and dims[-2:] == (queries, keys):
            parts.causal = True
        else:
            raise Decline(f"a part of its mask, '{leaf.name}', is neither causal nor the same for all queries")
    return parts


def _condition(mask: ir.Value, parts: MaskParts, depth: int) -> ir.Value:
    """The bool that a float mask of zeros and hidden scores is made of; `parts` learns the score."""
    node = mask.producer()
    sides = [] if node is None else [value for value in node.inputs if value is not None]
    if depth and is_op(node, "Expand", "Identity"):
        return _condition(sides[0], parts, depth - 1)
    if depth and is_op(node, "Max") and len(sides) == 2:
        for side, other in (sides, sides[::-1]):
            least = scalar(other)
            if least is not None and _LOWEST <= least <= _HIDDEN:
                found = _condition(side, parts, depth - 1)
                parts.hidden = max(parts.hidden, least)
                return found
    if is_op(node, "Where") and len(sides) == 3 and scalar(sides[1]) == 0.0:
        score = scalar(sides[2])
        if score is not None and score <= _HIDDEN:
            parts.hidden = max(score, _LOWEST)
            return sides[0]
    raise Decline(f"its float mask '{mask.name}' is not known to be made of 0 and the lowest number")


def _leaves(value: ir.Value, depth: int) -> Iterator[ir.Value]:
    """What a conjunction is made of; a broadcast part is given as it is before it."""
    node = value.producer()
    if depth and is_op(node, "And"):
        assert node is not None
        for side in node.inputs:
            assert side is not None
            yield from _leaves(side, depth - 1)
    elif depth and is_op(node, "Expand", "Identity"):
        assert node is not None and node.inputs[0] is not None
        yield from _leaves(node.inputs[0], depth - 1)
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


def _is_causal(value: ir.Value) -> bool:
    """Whether (…, queries, keys) is true exactly where key <= query."""
    node = value.producer()
    if not is_op(node, *_KEY_LEFT, *_KEY_RIGHT):
        return False
    assert node is not None
    key, query = node.inputs if node.op_type in _KEY_LEFT else node.inputs[::-1]
    strict = {**_KEY_LEFT, **_KEY_RIGHT}[node.op_type]
    k, q = index_vector(key), index_vector(query)
    if k is None or q is None or k.axis != -1 or q.axis != -2 or rank(value) is None:
        return False
    return q.offset.minus(k.offset).plus(Offset(strict)) == Offset()
