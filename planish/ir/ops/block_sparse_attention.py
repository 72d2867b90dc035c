"""planish::BlockSparseAttention and its relatives: a block of queries sees the blocks of keys that a list names.

The lists are CSR over blocks, as in S2-Attention (arXiv:2407.17678) and in ONNX Runtime's SparseAttention, with all
layouts in one list of indices. A few layouts serve all heads.

================================  ==================================================================================
BlockSparseAttention              the lists alone; causal inside of them, or not
BlockSparseAttentionKeyMask       of the listed keys those that a mask lets all queries see, as padding is
BlockSparseAttentionTiles         blocks that are seen in part: a listed block may have a tile, a mask of its own
BlockSparseAttentionTilesKeyMask  both
BlockSparseAttentionLse           gives the logarithms of the sums of exponentials too, so that attention over parts
                                  of the keys can be put together: :func:`combine`
================================  ==================================================================================

Tiles make every fixed mask exact, whether or not it falls on the borders of blocks; a band has two kinds of them,
however long it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.block_sparse_body import body
from planish.ir.ops.flash_attention import CAUSAL, HEADS, KV_HEADS, Q_HEADS, SCALE, causal, flops, infer_qkv
from planish.ir.ops.key_mask_attention import HIDDEN, attention_or_mean, infer_key_mask

BLOCK = "block_size"
_FLOAT, _INT, _BOOL = (frozenset({t}) for t in (ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.BOOL))
_LOWEST = float(np.finfo(np.float32).min)

_DOC = (
    "Attention by heads; q, y (batch, queries, q_num_heads · size), k, v (batch, keys, kv_num_heads · size). In layout "
    "l the queries at positions r · block_size … see the keys of the blocks indices[indptr[l, r] : indptr[l, r + 1]], "
    "in any order, each at most once; head h has the layout head_layout[h]. With is_causal = 1 the queries are at the "
    "last positions of the keys (those of a cache come first), and see no later key; else the first query is at "
    "position 0. A query that sees no key, or whose position has no row in the layout, gives zeros. indptr (layouts, "
    "rows + 1), at least one row; indices (entries,); head_layout (q_num_heads,)."
)
_DOC_KEYS = (
    " Hidden from all queries are the keys for which key_mask, (batch or 1, 1, 1, keys or 1), is false. hidden_score "
    "is the score of all keys that are not seen: a query without keys gives zeros with the lowest float32, and the "
    "mean of all values with anything above it."
)
_DOC_TILES = (
    " Of a listed block with entry_tile[e] = t >= 0 the query at position i sees the key at position j where "
    "tiles[t, j mod block_size, i mod block_size] is true; of one with -1 all keys. entry_tile (entries,); tiles "
    "(number, block_size, block_size)."
)
_DOC_LSE = (
    " lse (batch, q_num_heads, queries) is the natural logarithm of the sum of the exponentials of the scores, -inf "
    "for a query that sees no key."
)


def _schema(name: str) -> Schema:
    keys, tiles, lse = (word in name for word in ("KeyMask", "Tiles", "Lse"))
    # GPUs have kernels for the first in half precision; bodies of the others hold float32 scores.
    floats = _FLOAT if keys or tiles or lse else _FLOAT | {ir.DataType.FLOAT16}
    inputs = [Operand(n, floats) for n in ("q", "k", "v")]
    inputs += [Operand("key_mask", _BOOL, "M")] * keys
    inputs += [Operand(n, _INT, "I") for n in ("indptr", "indices", "head_layout")]
    inputs += [Operand("entry_tile", _INT, "I"), Operand("tiles", _BOOL, "M")] * tiles
    hidden = Attribute(HIDDEN, ir.AttributeType.FLOAT, default=_LOWEST)
    sizes = (Attribute(BLOCK, ir.AttributeType.INT, default=64), Attribute(CAUSAL, ir.AttributeType.INT, default=0))
    return Schema(
        name,
        tuple(inputs),
        (Operand("y", floats), *([Operand("lse", _FLOAT)] * lse)),
        (*HEADS, *sizes, *([hidden] * keys)),
        _DOC + _DOC_KEYS * keys + _DOC_TILES * tiles + _DOC_LSE * lse,
    )


def _lists(schema: Schema, values: Sequence[Any]) -> dict[str, Any]:
    return {operand.name: value for operand, value in zip(schema.inputs, values, strict=True)}


def _check_lists(given: Mapping[str, TensorInfo | None], attributes: Mapping[str, Any]) -> None:
    block = attributes[BLOCK]
    if not isinstance(block, int) or block < 1:
        raise InferenceError(f"{BLOCK} is {block}; it must be 1 or more")
    dims = {name: item.dims if item is not None else None for name, item in given.items()}
    for name, rank in (("indptr", 2), ("indices", 1), ("head_layout", 1), ("entry_tile", 1), ("tiles", 3)):
        found = dims.get(name)
        if found is not None and len(found) != rank:
            raise InferenceError(f"{name} has rank {len(found)}; it must have {rank}")
    indptr, layout, tiles, entry = (dims.get(n) for n in ("indptr", "head_layout", "tiles", "entry_tile"))
    if indptr is not None and isinstance(indptr[1], int) and indptr[1] < 2:
        raise InferenceError(f"indptr has {indptr[1]} columns; it must have 2 or more: one row, and its end")
    if layout is not None:
        same_dim(layout[0], attributes[Q_HEADS], f"head_layout and {Q_HEADS}")
    if entry is not None and dims["indices"] is not None:
        same_dim(entry[0], dims["indices"][0], "entry_tile and indices")
    if tiles is not None:
        for size in tiles[1:]:
            same_dim(size, block, f"tiles and {BLOCK}")


def layout_mask(
    indptr: np.ndarray, indices: np.ndarray, block: int, queries: int, keys: int, offset: int = 0,
    tiles: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:  # fmt: skip
    """(layouts, queries, keys), bool: which keys the lists let a query see.

    Args:
        offset: the position of the first query.
        tiles: entry_tile and tiles, as the operators have them.
    """
    mask = np.zeros((len(indptr), queries, keys), bool)
    positions = np.arange(queries) + offset
    rows = positions // block
    for layout, ends in enumerate(indptr):
        for r in range(len(ends) - 1):
            at = np.flatnonzero(rows == r)
            for entry in range(ends[r], ends[r + 1]) if len(at) else ():
                first = int(indices[entry]) * block
                if first < 0 or first >= keys:
                    continue
                seen: Any = True
                if tiles is not None and (tile := int(tiles[0][entry])) >= 0:
                    seen = tiles[1][tile].T[positions[at] % block, : keys - first]
                mask[layout, at, first : first + block] = seen
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


def log_sum_exp(q: np.ndarray, k: np.ndarray, heads: tuple[int, int], scale: float, seen: np.ndarray) -> np.ndarray:
    """(batch, heads, queries), float64: log Σ exp(scale q kᵀ) over the seen keys; -inf where there is none."""
    a, b = (
        x.astype(np.float64).reshape(*x.shape[:2], n, x.shape[2] // n).transpose(0, 2, 1, 3)
        for x, n in zip((q, k), heads, strict=True)
    )
    scores = np.where(seen, scale * a @ np.repeat(b, heads[0] // heads[1], 1).transpose(0, 1, 3, 2), -np.inf)
    top = scores.max(-1, keepdims=True, initial=_LOWEST)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(scores - top).sum(-1)) + top[..., 0])


def combine(outputs: Sequence[np.ndarray], lse: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Attention over all keys from attention over disjoint parts of them (FlashDecoding; S2-Attention, 3.3).

    Args:
        outputs: y of each part, (batch, queries, heads · size).
        lse: of each part, (batch, heads, queries).

    Returns:
        y and lse of the whole, in float64: Σ softmax(lse)ₚ yₚ and log Σ exp(lseₚ).
    """
    parts = np.stack([item.astype(np.float64) for item in lse])
    top = parts.max(0, initial=_LOWEST)
    weights = np.exp(parts - top)
    total = weights.sum(0)
    shares = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
    batch, heads, queries = parts.shape[1:]
    by_head = np.stack([y.astype(np.float64).reshape(batch, queries, heads, -1) for y in outputs])
    whole = (shares.transpose(0, 1, 3, 2)[..., None] * by_head).sum(0)
    with np.errstate(divide="ignore"):
        return whole.reshape(outputs[0].shape), np.asarray(np.log(total) + top)


def _flops(schema: Schema, inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> int:
    """By the mean length of the lists: that of the layouts that heads have is not known from shapes."""
    given = _lists(schema, inputs)
    q, k, indptr, indices = (given[name] for name in ("q", "k", "indptr", "indices"))
    (batch, queries, width), keys = q.sizes, k.sizes[1]
    pairs = queries * keys
    entries: Dim = indices.dims[0] if indices is not None and indices.dims is not None else None
    if isinstance(entries, int):
        layouts, ends = indptr.sizes
        pairs = min(pairs, round(queries * int(attributes[BLOCK]) * entries / max(layouts * (ends - 1), 1)))
    return flops(batch, int(attributes[Q_HEADS]), width, pairs)


def _make(name: str) -> DialectOp:
    schema = _schema(name)
    keys, lse = "KeyMask" in name, "Lse" in name

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        _check_lists(_lists(schema, inputs), attributes)
        found = infer_key_mask(inputs, attributes) if keys else infer_qkv(inputs, attributes)
        if lse:
            dims = found[0].dims or (None, None, None)
            found.append(TensorInfo(found[0].dtype, (dims[0], attributes[Q_HEADS], dims[1])))
        return found

    def reference(
        *arrays: np.ndarray, q_num_heads: int, kv_num_heads: int, scale: float,
        block_size: int = 64, is_causal: int = 0, hidden_score: float = _LOWEST,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        given, heads = _lists(schema, arrays), (q_num_heads, kv_num_heads)
        q, k, v = arrays[:3]
        offset = k.shape[1] - q.shape[1] if is_causal else 0
        tiles = (given["entry_tile"], given["tiles"]) if "tiles" in given else None
        seen = layout_mask(given["indptr"], given["indices"], block_size, q.shape[1], k.shape[1], offset, tiles)
        if is_causal:
            seen &= causal(q.shape[1], k.shape[1], offset)
        by_head = seen[given["head_layout"]]
        if keys:
            by_head = by_head & given["key_mask"]
        y = attention_or_mean((q, k, v), heads, scale, by_head, hidden_score)
        return (y, log_sum_exp(q, k, heads, scale, by_head)) if lse else (y,)

    return DialectOp(
        schema,
        infer,
        lambda opset: body(schema, opset),
        reference,
        lambda inputs, outputs, attributes: _flops(schema, inputs, attributes),
        min_opset=23,
    )


#: The family, by name.
BLOCK_SPARSE = {
    name: _make(name)
    for name in (
        "BlockSparseAttention",
        "BlockSparseAttentionKeyMask",
        "BlockSparseAttentionTiles",
        "BlockSparseAttentionTilesKeyMask",
        "BlockSparseAttentionLse",
    )
}
BLOCK_SPARSE_ATTENTION = BLOCK_SPARSE["BlockSparseAttention"]

__all__ = [
    "BLOCK",
    "BLOCK_SPARSE",
    "BLOCK_SPARSE_ATTENTION",
    "CAUSAL",
    "KV_HEADS",
    "Q_HEADS",
    "SCALE",
    "combine",
    "layout_mask",
    "layout_picture",
    "log_sum_exp",
]
