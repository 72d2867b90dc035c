"""planish::BlockSparseAttention: a block of queries sees the blocks of keys that a list names.

The lists are CSR over blocks, as in S2-Attention (arXiv:2407.17678) and in ONNX Runtime's SparseAttention, with all
layouts in one list of indices. A few layouts serve all heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.flash_attention import (
    CAUSAL,
    HEADS,
    KV_HEADS,
    Q_HEADS,
    SCALE,
    Body,
    attention,
    causal,
    flops,
    infer_qkv,
)

BLOCK = "block_size"
_FLOAT, _INT = frozenset({ir.DataType.FLOAT}), frozenset({ir.DataType.INT32})
_SCHEMA = Schema(
    "BlockSparseAttention",
    (
        *(Operand(name, _FLOAT) for name in ("q", "k", "v")),
        *(Operand(name, _INT, "I") for name in ("indptr", "indices", "head_layout")),
    ),
    (Operand("y", _FLOAT),),
    (*HEADS, Attribute(BLOCK, ir.AttributeType.INT, default=64), Attribute(CAUSAL, ir.AttributeType.INT, default=0)),
    "Attention by heads; q, y (batch, queries, q_num_heads · size), k, v (batch, keys, kv_num_heads · size). In layout "
    "l the queries at positions r · block_size … see the keys of the blocks indices[indptr[l, r] : indptr[l, r + 1]], "
    "in any order, each at most once; head h has the layout head_layout[h]. With is_causal = 1 the queries are at the "
    "last positions of the keys (those of a cache come first), and see no later key; else the first query is at "
    "position 0. A query that sees no key, or whose position has no row in the layout, gives zeros. indptr (layouts, "
    "rows + 1), at least one row; indices (entries,); head_layout (q_num_heads,).",
)


def _infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    block = attributes[BLOCK]
    if not isinstance(block, int) or block < 1:
        raise InferenceError(f"{BLOCK} is {block}; it must be 1 or more")
    indptr, indices, layout = ((item.dims if item is not None else None) for item in inputs[3:6])
    for name, dims, rank in (("indptr", indptr, 2), ("indices", indices, 1), ("head_layout", layout, 1)):
        if dims is not None and len(dims) != rank:
            raise InferenceError(f"{name} has rank {len(dims)}; it must have {rank}")
    if indptr is not None and isinstance(indptr[1], int) and indptr[1] < 2:
        raise InferenceError(f"indptr has {indptr[1]} columns; it must have 2 or more: one row, and its end")
    if layout is not None:
        same_dim(layout[0], attributes[Q_HEADS], f"head_layout and {Q_HEADS}")
    return infer_qkv(inputs, attributes)


def _body(opset: int) -> ir.Function:
    """A mask (1, heads, queries, keys) out of the lists, for ONNX's Attention."""
    made = Body(_SCHEMA, opset)
    value, add = made.values, made.add
    zero, one = (add("Constant", value_int=n) for n in (0, 1))
    block, is_causal = made.attribute(BLOCK), made.attribute(CAUSAL)
    queries, keys = (add("Squeeze", made.sizes(value[name], 1, 2)) for name in ("q", "k"))
    past = add("Mul", add("Sub", keys, queries), is_causal)
    positions = add("Add", add("Range", zero, queries, one), past)
    key = add("Range", zero, keys, one)
    columns = add("Div", add("Add", keys, add("Sub", block, one)), block)
    # (layouts · rows, entries): is the entry in the row's list? Times (entries, blocks): does it name the block?
    entry = add("Range", zero, add("Squeeze", made.sizes(value["indices"], 0, 1)), one)
    ends = add("Cast", value["indptr"], to=int(ir.DataType.INT64))
    last = made.sizes(value["indptr"], 1, 2)
    first_end, second_end = (
        add("Reshape", add("Slice", ends, made.ints(a), b, made.ints(1)), made.ints(-1, 1))
        for a, b in ((0, add("Sub", last, one)), (1, last))
    )
    listed = add("And", add("GreaterOrEqual", entry, first_end), add("Less", entry, second_end))
    index = add("Cast", add("Unsqueeze", value["indices"], made.ints(1)), to=int(ir.DataType.INT64))
    named = add("Equal", index, add("Range", zero, columns, one))
    count = add("MatMul", *(add("Cast", item, to=int(ir.DataType.FLOAT)) for item in (listed, named)))
    rows = add("Sub", last, one)
    shape = add("Concat", made.sizes(value["indptr"], 0, 1), rows, add("Unsqueeze", columns, made.ints(0)), axis=0)
    # Without keys there are no blocks, and a 0 in the shape must not mean "as before".
    blocks = add("Reshape", count, shape, allowzero=1)
    # (heads, queries, keys)
    row = add("Div", positions, block)
    there = add("Clip", row, zero, add("Squeeze", add("Sub", rows, one)))
    sees = add("Gather", add("Gather", blocks, value["head_layout"], axis=0), there, axis=1)
    sees = add("Greater", add("Gather", sees, add("Div", key, block), axis=2), add("Constant", value_float=0.5))
    column = made.ints(-1, 1)
    inside = add("Reshape", add("And", add("GreaterOrEqual", positions, zero), add("Less", row, rows)), column)
    earlier = add("LessOrEqual", key, add("Reshape", positions, column))
    earlier = add("Or", earlier, add("Equal", is_causal, zero))
    mask = add("Unsqueeze", add("And", sees, add("And", inside, earlier)), made.ints(0))
    return made.function(made.attend(value["q"], value["k"], value["v"], mask, is_causal=0))


def layout_mask(
    indptr: np.ndarray, indices: np.ndarray, block: int, queries: int, keys: int, offset: int = 0
) -> np.ndarray:
    """(layouts, queries, keys), bool: which keys the lists let a query see; the first query is at position `offset`."""
    mask = np.zeros((len(indptr), queries, keys), bool)
    rows = (np.arange(queries) + offset) // block
    for layout, ends in enumerate(indptr):
        for r in range(len(ends) - 1):
            for column in indices[ends[r] : ends[r + 1]]:
                if column >= 0:
                    mask[layout, rows == r, column * block : (column + 1) * block] = True
    return mask


def layout_picture(
    indptr: np.ndarray, indices: np.ndarray, columns: int | None = None, *, is_causal: bool = False
) -> str:
    """A layout as text: a line for each block of queries, ``#`` for a block of keys that it sees, ``.`` for others.

    Args:
        indptr, indices: of one layout (rows + 1,) or of several (layouts, rows + 1), as the operator has them.
        columns: blocks of keys; as many as the largest index asks for if it is None.
        is_causal: blocks after the diagonal of a square layout are left blank where they are not listed.

    Returns:
        Lines without a line break at the end; an empty line between layouts.
    """
    indptr = np.atleast_2d(indptr)
    if columns is None:
        columns = int(indices.max(initial=-1)) + 1
    pictures = []
    for ends in indptr:
        lines = []
        for row in range(len(ends) - 1):
            seen = set(indices[ends[row] : ends[row + 1]].tolist())
            marks = ("#" if c in seen else " " if is_causal and c > row else "." for c in range(columns))
            lines.append("".join(marks).rstrip())
        pictures.append("\n".join(lines))
    return "\n\n".join(pictures)


def _reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, indptr: np.ndarray, indices: np.ndarray, head_layout: np.ndarray,
    q_num_heads: int, kv_num_heads: int, scale: float, block_size: int = 64, is_causal: int = 0,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    queries, keys = q.shape[1], k.shape[1]
    offset = keys - queries if is_causal else 0
    seen = layout_mask(indptr, indices, block_size, queries, keys, offset)
    if is_causal:
        seen &= causal(queries, keys, offset)
    return (attention((q, k, v), (q_num_heads, kv_num_heads), scale, seen[head_layout]),)


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
    """By the mean length of the lists: that of the layouts that heads have is not known from shapes."""
    q, k, indptr, indices = inputs[0], inputs[1], inputs[3], inputs[4]
    assert q is not None and k is not None and indptr is not None
    (batch, queries, width), keys = q.sizes, k.sizes[1]
    pairs = queries * keys
    entries: Dim = indices.dims[0] if indices is not None and indices.dims is not None else None
    if isinstance(entries, int):
        layouts, ends = indptr.sizes
        pairs = min(pairs, round(queries * int(attributes[BLOCK]) * entries / max(layouts * (ends - 1), 1)))
    return flops(batch, int(attributes[Q_HEADS]), width, pairs)


BLOCK_SPARSE_ATTENTION = DialectOp(_SCHEMA, _infer, _body, _reference, _flops, min_opset=23)

__all__ = ["BLOCK", "BLOCK_SPARSE_ATTENTION", "CAUSAL", "KV_HEADS", "Q_HEADS", "SCALE", "layout_mask", "layout_picture"]
