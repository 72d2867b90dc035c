"""Heads that were joined to the batch for products of rank 3: which values they are of rank 4, proved from shapes.

``torch.bmm`` and ``torch.baddbmm`` take three axes, so older attention flattens (B, H, L, D) to (B * H, L, D), takes
scores back to (B, H, S, L) where a mask is added, and parts the result again. ``torch.nn.MultiheadAttention`` cuts
heads out of (L, B, H * D), where they are next to the batch already. A Reshape has as many elements as its input, so
that all its sizes are known when all but one are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.fusion.sizes import Term, product, reshaped, size_vector, sizes, transposed_with

_SWAP, _SEQUENCE_FIRST = (0, 2, 1, 3), (1, 0, 2)
# From (B, H, L, D) and (B, L, H, D) to (B, H, D, L), and how the value before comes to (B, H, L, D).
_TO_COLUMNS: dict[tuple[int, ...], tuple[int, ...] | None] = {(0, 1, 3, 2): None, (0, 2, 3, 1): _SWAP}


@dataclass(frozen=True)
class Rows:
    """Where (batch, heads, length, depth) is found.

    Attributes:
        source: this value, or the (length, batch, heads * depth) that it is cut out of.
        dims: batch, heads, length and depth.
        sequence_first: which of both `source` is.
        perm: how `source` is transposed to the former, if it is.
    """

    source: ir.Value
    dims: tuple[Term, int, Term, Term]
    sequence_first: bool = False
    perm: tuple[int, ...] | None = None


def flat_rows(value: ir.Value | None) -> Rows | None:
    """What (B * H, L, D) was flattened from."""
    node = value.producer() if value is not None else None
    if is_op(node, "Reshape"):
        source = node.inputs[0]  # type: ignore[union-attr]
        dims = sizes(source) or ()
        if len(dims) == 4 and isinstance(dims[1], int) and proved(node, (product(dims[0], dims[1]), dims[2], dims[3])):
            return Rows(source, dims)  # type: ignore[arg-type]
    if transposed_with(node, *_SEQUENCE_FIRST):
        return _cut(node.inputs[0])  # type: ignore[union-attr]
    return None


def flat_columns(value: ir.Value | None) -> Rows | None:
    """What (B * H, D, L) was transposed and flattened from, in either order."""
    node = value.producer() if value is not None else None
    if transposed_with(node, 0, 2, 1):
        return flat_rows(node.inputs[0])  # type: ignore[union-attr]
    if transposed_with(node, 1, 2, 0):
        return _cut(node.inputs[0])  # type: ignore[union-attr]
    found = flat_rows(value)
    turn = found.source.producer() if found is not None and not found.sequence_first else None
    perm = tuple(turn.attributes.get_ints("perm", ())) if is_op(turn, "Transpose") else ()  # type: ignore[union-attr]
    if found is None or perm not in _TO_COLUMNS:
        return None
    batch, heads, depth, length = found.dims
    dims: Any = (batch, heads, length, depth)
    return Rows(turn.inputs[0], dims, perm=_TO_COLUMNS[perm])  # type: ignore


def parted_rows(value: ir.Value | None) -> Rows | None:
    """What (B, H, L, D) was cut out of if that is (L, B, H * D), by way of (B * H, L, D)."""
    node = value.producer() if value is not None else None
    if not is_op(node, "Reshape"):
        return None
    found = flat_rows(node.inputs[0])  # type: ignore[union-attr]
    return found if found is not None and found.sequence_first and proved(node, found.dims) else None


def proved(node: ir.Node | None, wanted: Sequence[Term | set[Term]]) -> bool:
    """Whether a Reshape gives these sizes; of each axis any of several terms will do, and one axis may be open."""
    dims = reshaped(node) if is_op(node, "Reshape") else None  # type: ignore[arg-type]
    known = sizes(node.outputs[0]) if node is not None else None
    if dims is None or len(wanted) != len(dims):
        return False
    same = 0
    for axis, item in enumerate(dims):
        term = wanted[axis]
        allowed = term if isinstance(term, set) else {term}
        seen = {item} if known is None or len(known) != len(dims) else {item, known[axis]}
        numbers = [{t for t in terms if isinstance(t, int)} for terms in (allowed, seen)]
        if all(numbers) and not numbers[0] & numbers[1]:
            return False
        same += bool(allowed & seen)
    return same >= len(dims) - 1


def _cut(value: ir.Value | None) -> Rows | None:
    """The (L, B, H * D) that was reshaped to `value`, (L, B * H, D)."""
    node = value.producer() if value is not None else None
    if not is_op(node, "Reshape"):
        return None
    source = node.inputs[0]  # type: ignore[union-attr]
    dims, after = sizes(source), reshaped(node)  # type: ignore[arg-type]
    if dims is None or after is None or len(dims) != 3 or len(after) != 3:
        return None
    hidden, depth = dims[2], after[2]
    if not isinstance(hidden, int) or not isinstance(depth, int) or depth < 1 or hidden % depth or not hidden:
        return None
    heads = hidden // depth
    if not proved(node, (dims[0], product(dims[1], heads), depth)):
        return None
    return Rows(source, (dims[1], heads, dims[0], depth), True)  # type: ignore[arg-type]


def lifted(op: Any, rows: Rows) -> ir.Value:
    """`rows` as (B, H, L, D); what is cut out of (L, B, H * D) gets the form that takes no copy per head."""
    if not rows.sequence_first:
        if rows.perm is None:
            return rows.source
        return shaped(op.Transpose(rows.source, perm=rows.perm), rows.source, rows.dims)
    batch, length, heads, depth = rows.dims[0], rows.dims[2], rows.dims[1], rows.dims[3]
    assert isinstance(depth, int)
    turned = shaped(op.Transpose(rows.source, perm=_SEQUENCE_FIRST), rows.source, (batch, length, heads * depth))
    split = shaped(op.Reshape(turned, [0, 0, heads, depth]), turned, (batch, length, heads, depth))
    return shaped(op.Transpose(split, perm=_SWAP), turned, rows.dims)


def shaped(value: ir.Value, like: ir.Value, dims: Sequence[Term]) -> ir.Value:
    """`value` with the type of `like` and the shape `dims`, as far as terms have names."""
    value.type = like.type
    value.shape = ir.Shape([d if isinstance(d, int | str) else None for d in dims])
    return value


def unflattened_mask(op: Any, mask: ir.Value, queries: Rows, graph: ir.Graph) -> ir.Value | None:
    """A mask for scores (B * H, S, L) as one for (B, H, S, L); None where its first axis is not understood."""
    batch, heads = queries.dims[:2]
    dims = sizes(mask)
    if dims is None or len(dims) > 3:
        return None
    if len(dims) < 3 or dims[0] == 1:
        return mask
    node = mask.producer()
    joined = product(batch, heads)
    source = _parted(node, batch, heads)
    if source is not None:
        return source
    target = reshaped(node) if is_op(node, "Reshape") else None  # type: ignore[arg-type]
    if joined not in (dims[0], target and target[0]):
        return None
    named = [t if isinstance(d, tuple) and t is not None else d for d, t in zip(dims, target or dims, strict=True)]
    first = size_vector(op, batch, queries.source, int(queries.sequence_first), graph)
    parts = [size_vector(op, d, mask, axis, graph) for axis, d in enumerate(named[1:], 1)]
    shape = op.Concat(first, np.array([heads], dtype=np.int64), *parts, axis=0)
    return shaped(op.Reshape(mask, shape), mask, (batch, heads, *named[1:]))


def one_head_mask(op: Any, mask: ir.Value) -> ir.Value | None:
    """A mask for scores (B, S, L) as one for (B, 1, S, L)."""
    dims = sizes(mask)
    if dims is None or len(dims) > 3:
        return None
    if len(dims) < 3 or dims[0] == 1:
        return mask
    return shaped(op.Unsqueeze(mask, np.array([1], dtype=np.int64)), mask, (dims[0], 1, *dims[1:]))


def _parted(node: ir.Node | None, batch: Term, heads: int) -> ir.Value | None:
    """The (B, H, S, L) that a mask was flattened from, before it was expanded to this: adding expands it again."""
    source = node.inputs[0] if is_op(node, "Reshape") else None  # type: ignore[union-attr]
    dims = sizes(source)
    if source is None or dims is None or len(dims) != 4:
        return None
    expand = source.producer()
    told = reshaped(expand) if is_op(expand, "Expand") else None  # type: ignore[arg-type]
    narrow = sizes(expand.inputs[0]) if told is not None else None  # type: ignore[union-attr]
    if narrow is not None and len(narrow) == 4:
        source = expand.inputs[0]  # type: ignore[union-attr]
    same = batch in (dims[0], (narrow or dims)[0]) and heads == dims[1]
    return source if same and proved(node, (product(batch, heads), *dims[2:])) else None


__all__ = [
    "Rows",
    "flat_columns",
    "flat_rows",
    "lifted",
    "one_head_mask",
    "parted_rows",
    "proved",
    "shaped",
    "unflattened_mask",
]
