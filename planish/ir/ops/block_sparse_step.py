"""planish::BlockSparseStep: one token a row over a cache, of which it sees the blocks that a list names.

What `BlockSparseAttention` is to a prompt: the row of a layout that the token's position is in says which blocks of
keys are read, so that a step reads a part of its cache. The token is written first, and sees itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.block_sparse_attention import BLOCK
from planish.ir.ops.body import FunctionBody
from planish.ir.ops.cache_attention import place, same_cache
from planish.ir.ops.flash_attention import HEADS, KV_HEADS, Q_HEADS, SCALE, attention

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_INT = frozenset({ir.DataType.INT32})
_LISTS = ("indptr", "indices", "head_layout")

_SCHEMA = Schema(
    "BlockSparseStep",
    (
        *(Operand(name, _FLOATS) for name in ("q", "k", "v", "past_key", "past_value")),
        Operand("lengths", _INT, "I"),
        *(Operand(name, _INT, "I") for name in _LISTS),
    ),
    tuple(Operand(name, _FLOATS) for name in ("y", "present_key", "present_value")),
    (*HEADS, Attribute(BLOCK, ir.AttributeType.INT, default=64)),
    "One token a row over a cache: q, y (batch, 1, q_num_heads · size), k, v (batch, 1, kv_num_heads · size); past and "
    "present keys and values (batch, kv_num_heads, capacity, size), of which the first lengths (batch) count. The "
    "token is written at position lengths, which must be below the capacity. Of the keys up to itself it sees those in "
    "the blocks of its row, lengths / block_size, of the layout of its head, as in BlockSparseAttention; beyond the "
    "last row of the layouts, all.",
)


def _body(opset: int) -> ir.Function:
    made = FunctionBody(_SCHEMA, opset)
    add, value = made.add, made.values
    size = made.size(value["past_key"], 3)
    by_head = made.shape(made.ints(0), made.number(KV_HEADS), size)
    last, where = place(made, value["lengths"])
    caches = [
        add("ScatterND", value[f"past_{name}"], where, add("Reshape", value[name[0]], by_head))
        for name in ("key", "value")
    ]
    group = add("Div", made.number(Q_HEADS), made.number(KV_HEADS))
    rows = made.shape(made.ints(0), made.number(KV_HEADS), group, size)
    q = add("Mul", add("Reshape", value["q"], rows), add("CastLike", made.number(SCALE), value["q"]))
    scores = add("MatMul", q, add("Transpose", caches[0], perm=[0, 1, 3, 2]))
    hidden = add("CastLike", made.floating(float("-inf")), scores)
    seen = add("Reshape", _seen(made, last, made.size(caches[0], 2)), add("Shape", scores))
    y = add("MatMul", add("Softmax", add("Where", seen, scores, hidden), axis=-1), caches[1])
    return made.function(add("Reshape", y, add("Shape", value["q"])), *caches)


def _seen(made: FunctionBody, last: ir.Value, capacity: ir.Value) -> ir.Value:
    """(batch, heads, capacity), bool."""
    add, value = made.add, made.values
    block = made.number(BLOCK)
    ends, index = (add("Cast", value[name], to=int(ir.DataType.INT64)) for name in ("indptr", "indices"))
    heads = add("Gather", ends, value["head_layout"], axis=0)  # (heads, rows + 1)
    count = add("Sub", made.size(heads, 1), made.ints(1))
    row = add("Div", last, block)
    # (heads, batch): where the list of a row begins and ends.
    inside = add("Min", row, add("Sub", count, made.ints(1)))
    begin, end = (add("Gather", heads, add("Add", inside, made.ints(more)), axis=1) for more in (0, 1))
    entry = made.span(made.ints(0), made.size(index, 0))
    listed = add(
        "And",
        add("GreaterOrEqual", entry, add("Unsqueeze", begin, made.ints(2))),
        add("Less", entry, add("Unsqueeze", end, made.ints(2))),
    )
    keys = made.span(made.ints(0), capacity)
    named = add("Equal", add("Unsqueeze", index, made.ints(1)), add("Div", keys, block))  # (entries, capacity)
    kind = int(ir.DataType.FLOAT)
    hits = add("MatMul", add("Cast", listed, to=kind), add("Cast", named, to=kind))  # (heads, batch, capacity)
    beyond = add("Reshape", add("GreaterOrEqual", row, count), made.ints(1, -1, 1))
    seen = add("Or", add("Greater", hits, made.floating(0.5)), beyond)
    earlier = add("LessOrEqual", keys, add("Reshape", last, made.ints(1, -1, 1)))
    return add("Transpose", add("And", seen, earlier), perm=[1, 0, 2])


def _infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    q, k, v, key, value = (None if item is None else item.dims for item in inputs[:5])
    heads, kv_heads = attributes[Q_HEADS], attributes[KV_HEADS]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise InferenceError(f"{Q_HEADS} is {heads} and {KV_HEADS} is {kv_heads}; one must be a multiple of the other")
    if not isinstance(attributes[BLOCK], int) or attributes[BLOCK] < 1:
        raise InferenceError(f"{BLOCK} is {attributes[BLOCK]}; it must be 1 or more")
    cache = same_cache((None, kv_heads, None, None), ("past_key", key), ("past_value", value))
    for name, dims, count in zip("qkv", (q, k, v), (heads, kv_heads, kv_heads), strict=True):
        if dims is None:
            continue
        if len(dims) != 3:
            raise InferenceError(f"{name} has rank {len(dims)}; it must have 3: batch, 1, heads and their size")
        same_dim(dims[1], 1, f"{name}: tokens")
        if isinstance(cache[3], int):
            same_dim(dims[2], count * cache[3], f"{name}: its last axis, {count} heads of size {cache[3]}")
    _check_lists([None if item is None else item.dims for item in inputs[6:]], heads)
    dtype = next((item.dtype for item in inputs[:5] if item is not None and item.dtype is not None), None)
    return [TensorInfo(dtype, q), *[TensorInfo(dtype, cache)] * 2]


def _check_lists(dims: Sequence[tuple[Dim, ...] | None], heads: int) -> None:
    for name, found, rank in zip(_LISTS, dims, (2, 1, 1), strict=True):
        if found is not None and len(found) != rank:
            raise InferenceError(f"{name} has rank {len(found)}; it must have {rank}")
    if dims[2] is not None:
        same_dim(dims[2][0], heads, f"head_layout and {Q_HEADS}")


def _reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, past_key: np.ndarray, past_value: np.ndarray, lengths: np.ndarray,
    indptr: np.ndarray, indices: np.ndarray, head_layout: np.ndarray,
    q_num_heads: int, kv_num_heads: int, scale: float, block_size: int = 64,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    batch, _, capacity, size = past_key.shape
    caches = []
    for new, past in ((k, past_key), (v, past_value)):
        caches.append(past.copy())
        caches[-1][np.arange(batch), :, lengths] = new.reshape(batch, kv_num_heads, size)
    seen = np.zeros((batch, q_num_heads, 1, capacity), bool)
    for row, last in enumerate(lengths.tolist()):
        for head, layout in enumerate(head_layout.tolist()):
            at = last // block_size
            blocks = np.arange(at + 1)
            if at < indptr.shape[1] - 1:
                blocks = indices[indptr[layout, at] : indptr[layout, at + 1]]
            seen[row, head, 0] = np.isin(np.arange(capacity) // block_size, blocks) & (np.arange(capacity) <= last)
    flat = [x.transpose(0, 2, 1, 3).reshape(batch, capacity, -1) for x in caches]
    return attention((q, *flat), (q_num_heads, kv_num_heads), scale, seen), *caches


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
    """By the longest list that the layouts can have on average."""
    key, indptr, indices = inputs[3], inputs[6], inputs[7]
    assert key is not None and indptr is not None and indices is not None
    batch, _, capacity, size = key.sizes
    layouts, ends = indptr.sizes
    read = min(capacity, int(attributes[BLOCK]) * indices.sizes[0] // max(layouts * (ends - 1), 1))
    return 4 * batch * int(attributes[Q_HEADS]) * read * size


BLOCK_SPARSE_STEP = DialectOp(_SCHEMA, _infer, _body, _reference, _flops, min_opset=23)
