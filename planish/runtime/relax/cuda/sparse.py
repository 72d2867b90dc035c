"""Attention over lists of blocks on GPUs: our kernels in half precision, else products around a softmax with a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.block_sparsity.overlap import worth_together
from planish.runtime.relax.cuda.attention import FLASH_SIZES, HALVES, by_products, use, use_apart, use_prefill
from planish.runtime.relax.cuda.caches import DECODE, clears, workspace
from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, emits

_TILE = 64
#: Of scores that are hidden: below this a query without keys gives zeros.
_LOWEST = -3e38


@emits("BlockSparseAttention", "BlockSparseAttentionKeyMask", domain="planish")
def _block_sparse(t: Translator, node: ir.Node) -> Operand:
    from planish.runtime.relax.cuda.device import CudaDevice

    device = t.device
    if not isinstance(device, CudaDevice):
        t.refuse(node, "there is no code for it")
    q, k, v, *rest = t.inputs(node)
    key_mask = rest.pop(0) if node.op_type.endswith("KeyMask") else None
    if q is None or k is None or v is None or any(item is None for item in rest):
        t.refuse(node, "an input is missing")
    t.require_float(node, q, k, v)
    heads, block = int(attribute(node, "q_num_heads")), int(attribute(node, "block_size", _TILE))
    if not isinstance(q.dims[2], int):
        t.refuse(node, "its heads have no fixed size")
    size, causal = q.dims[2] // heads, bool(attribute(node, "is_causal", 0))
    scale = float(attribute(node, "scale", 0.0)) or 1 / math.sqrt(size)
    tensors = [t.tensor(item) for item in (q, k, v)]
    out = t.type(q.dims, q.dtype)
    if key_mask is None and q.dtype in HALVES and size in FLASH_SIZES and block % _TILE == 0:
        use_prefill(device, size, 0, q.dtype)
        together = block % (2 * _TILE) == 0 or _alike(rest)
        if together:
            use_apart(device, size, 0, q.dtype, q.dims[1], lists=1)
        types, bfloat = [out], int(q.dtype == "bfloat16")
        lists = [t.tensor(item) for item in rest if item is not None]
        if causal:  # one query, then, is at the end of a cache
            use(device, DECODE, size, 1 + 16 * bfloat, "attention_decode.cu", _defines(size, bfloat))
            clears(device, size, q.dtype)
            types.append(t.type([workspace(t, t.product([q.dims[0], heads]), size)], "uint8"))
        inputs = [*tensors, *lists, size, block, int(causal) + 2 * int(together), scale]
        made = device.packed(t, "planish_block_sparse", inputs, types)
        return Operand(q.dtype, list(q.dims), t.emit(t.relax.TupleGetItem(made, 0)) if causal else made)
    if float(attribute(node, "hidden_score", -np.inf)) > _LOWEST:
        t.refuse(node, "a query without keys is the mean of all values")
    mask = _mask(t, node, (q, k), [item for item in rest if item is not None], block, causal)
    if key_mask is not None:
        seen = t.match(key_mask, [key_mask.dims[0], 1, 1, k.dims[1] if not _one(key_mask.dims[3]) else 1])
        mask = _both(t, mask, seen)
    made = by_products(device, t, (tensors[0], tensors[1], tensors[2]), t.force(mask), (size, scale, ""), q.dtype)
    return Operand(q.dtype, list(q.dims), made)


def _alike(lists: Sequence[Operand | None]) -> bool:
    """Whether lists are constants, and those of neighbouring tiles nearly the same."""
    indptr, indices = (None if item is None else item.array for item in lists[:2])
    return indptr is not None and indices is not None and worth_together(np.asarray(indptr), np.asarray(indices))


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _defines(size: int, bfloat: int) -> dict[str, int]:
    return {"HEAD": size, "SHARED": 1, "ELEMENT_BF16": bfloat}


def _mask(
    t: Translator, node: ir.Node, qk: tuple[Operand, Operand], lists: list[Operand], block: int, causal: bool
) -> Any:
    """(1, heads, queries, keys) bool, not emitted yet: which keys the lists let a query see."""
    arrays = [item.array for item in lists]
    if any(array is None for array in arrays):
        t.refuse(node, "its lists are no constants")
    indptr, indices, layout = (np.asarray(array) for array in arrays)
    rows, columns = indptr.shape[1] - 1, int(indices.max(initial=-1)) + 1
    listed = np.zeros((len(indptr), rows, max(columns, 1)), bool)
    for number, ends in enumerate(indptr):
        for row in range(rows):
            listed[number, row, indices[ends[row] : ends[row + 1]]] = True
    table = t.parameter(listed[layout], "")
    tir, (queries, keys) = t.tir, (t.dim(item.dims[1]) for item in qk)
    offset = keys - queries if causal else tir.IntImm("int64", 0)

    def element(i: Any, seen: Any) -> Any:
        at = i[2] + offset
        row, column = tir.floordiv(at, block), tir.floordiv(i[3], block)
        inside = tir.all(row < rows, column < columns, *([i[3] <= at] if causal else []))
        return tir.if_then_else(inside, seen(i[1], row, column), tir.const(False, "bool"))

    return t.compute("listed", [table], element, [1, len(layout), queries, keys], "bool")


def _both(t: Translator, mask: Any, keys: Operand) -> Any:
    """A mask with that of keys, (batch or 1, 1, 1, keys or 1)."""
    _, heads, queries, count = mask.dims
    one, zero = _one(keys.dims[3]), t.tir.IntImm("int64", 0)
    single = _one(keys.dims[0])
    dims = [keys.dims[0], heads, queries, count]

    def element(i: Any, a: Any, b: Any) -> Any:
        return t.tir.all(a(zero, *i[1:]), b(zero if single else i[0], zero, zero, zero if one else i[3]))

    return t.compute("listed_keys", [t.force(mask), t.tensor(keys)], element, dims, "bool")
