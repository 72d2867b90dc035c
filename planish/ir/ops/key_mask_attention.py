"""planish::FlashAttentionKeyMask: attention with a mask that is the same for all queries, as padding is.

Apart from FlashAttentionMask it says what a query gives that sees no key: models hide keys by a low score, and then a
query whose keys are all hidden has equal weights on all of them, not zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, InferenceError, Operand, Schema, TensorInfo
from planish.ir.ops.flash_attention import CAUSAL, FLASH_ATTENTION, HEADS, Body, attention, causal, infer_qkv

HIDDEN = "hidden_score"
_FLOAT, _BOOL = frozenset({ir.DataType.FLOAT}), frozenset({ir.DataType.BOOL})
_LOWEST = float(np.finfo(np.float32).min)

_SCHEMA = Schema(
    "FlashAttentionKeyMask",
    (*(Operand(name, _FLOAT) for name in ("q", "k", "v")), Operand("key_mask", _BOOL, "M")),
    (Operand("y", _FLOAT),),
    (
        *HEADS,
        Attribute(CAUSAL, ir.AttributeType.INT, default=0),
        Attribute(HIDDEN, ir.AttributeType.FLOAT, default=_LOWEST),
    ),
    "y = softmax(scale q kᵀ) v by heads over the keys for which key_mask, (batch or 1, 1, 1, keys or 1), is true; with "
    "is_causal = 1 query i sees keys 0 … i of them. Shapes as of FlashAttention. hidden_score is the score of the "
    "other keys, low enough to absorb every score: a query that sees no key gives zeros with the lowest float32, and "
    "the mean of all values with anything above it.",
)


def infer_key_mask(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> list[TensorInfo]:
    """The output of attention over q, k, v and a key mask, after checking them."""
    result = infer_qkv(inputs, attributes)
    mask, k = inputs[3], inputs[1]
    if mask is None or mask.dims is None:
        return result
    if len(mask.dims) != 4:
        raise InferenceError(f"the key mask has rank {len(mask.dims)}; it must have 4: batch or 1, 1, 1, keys")
    keys = k.dims[1] if k is not None and k.dims is not None and len(k.dims) == 3 else None
    for axis, want in enumerate((result[0].dims[0] if result[0].dims else None, 1, 1, keys)):
        have = mask.dims[axis]
        if isinstance(have, int) and isinstance(want, int) and have not in (1, want):
            raise InferenceError(
                f"axis {axis} of the key mask has size {have}; it must be 1{f' or {want}' * (want > 1)}"
            )
    return result


def _body(opset: int) -> ir.Function:
    made = Body(_SCHEMA, opset)
    return body_over(made, *list(made.values.values())[:3])


def body_over(made: Body, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Function:
    """The function that `made` begins, with attention over these in place of its first inputs."""
    mask = made.values["key_mask"]
    zero, one = (made.add("Constant", value_int=n) for n in (0, 1))
    queries, keys = (made.sizes(value, 1, 2) for value in (q, k))
    key = made.add("Range", zero, made.add("Squeeze", keys), one)
    query = made.add("Reshape", made.add("Range", zero, made.add("Squeeze", queries), one), made.ints(-1, 1))
    # All keys if it is not causal: an attribute can not choose between nodes.
    free = made.add("Equal", made.attribute(CAUSAL), zero)
    seen = made.add("And", mask, made.add("Or", made.add("LessOrEqual", key, query), free))
    seen = made.add("Expand", seen, made.add("Concat", queries, keys, axis=0))
    hidden = made.add("Constant", refs={"value_float": HIDDEN})
    scores = made.add("Where", seen, made.add("Constant", value_float=0.0), hidden)
    return made.function(made.attend(q, k, v, scores, is_causal=0))


def attention_or_mean(
    arrays: Sequence[np.ndarray], heads: tuple[int, int], scale: float, seen: np.ndarray, hidden: float
) -> np.ndarray:
    """Attention in float64 as :func:`attention`, where a query that sees no key gives what `hidden` says.

    Args:
        seen: bool, broadcast to (batch, heads, queries, keys).
        hidden: score of hidden keys: zeros with the lowest float32, else the mean of all values.
    """
    q, k, v = arrays
    y = attention(arrays, heads, scale, seen)
    if np.float32(hidden) <= _LOWEST or not k.shape[1]:
        return y
    size = v.shape[2] // heads[1]
    mean = v.astype(np.float64).mean(1, keepdims=True).reshape(v.shape[0], 1, heads[1], size)
    mean = np.repeat(mean, heads[0] // heads[1], 2)
    sees = np.broadcast_to(seen.any(-1), (q.shape[0], heads[0], q.shape[1])).transpose(0, 2, 1)
    by_head = y.reshape(*q.shape[:2], heads[0], size)
    return np.asarray(np.where(sees[..., None], by_head, mean).reshape(q.shape))


def _reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, key_mask: np.ndarray,
    q_num_heads: int, kv_num_heads: int, scale: float, is_causal: int = 0, hidden_score: float = _LOWEST,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    seen = np.broadcast_to(key_mask, (q.shape[0], 1, q.shape[1], k.shape[1]))
    if is_causal:
        seen = seen & causal(q.shape[1], k.shape[1], 0)
    return (attention_or_mean((q, k, v), (q_num_heads, kv_num_heads), scale, seen, hidden_score),)


KEY_MASK_ATTENTION = DialectOp(
    _SCHEMA, infer_key_mask, _body, _reference, FLASH_ATTENTION["FlashAttention"].flops, min_opset=23
)
