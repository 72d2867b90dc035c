"""planish::WindowAttention: each query sees the keys around it, and some see or are seen by all (sliding windows).

The layout of block-sparse attention that needs no lists: any length, and windows that do not end where blocks do.
``left`` is Mistral's sliding_window - 1 (arXiv:2310.06825); both sides are Longformer's, with its global positions
(arXiv:2004.05150); a few global keys before a causal window are StreamingLLM's sinks (arXiv:2309.17453).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, InferenceError, Operand, Schema, TensorInfo
from planish.ir.ops.flash_attention import CAUSAL, HEADS, Q_HEADS, Body, attention, flops, infer_qkv
from planish.ir.ops.key_mask_attention import HIDDEN, attention_or_mean, infer_key_mask

LEFT, RIGHT, GLOBAL_KEYS, GLOBAL_QUERIES = "left", "right", "global_keys", "global_queries"
_FLOAT, _BOOL = frozenset({ir.DataType.FLOAT}), frozenset({ir.DataType.BOOL})
_LOWEST = float(np.finfo(np.float32).min)
_INT = ir.AttributeType.INT
_WINDOW = (
    Attribute(LEFT, _INT, default=-1),
    Attribute(RIGHT, _INT, default=-1),
    Attribute(GLOBAL_KEYS, _INT, default=0),
    Attribute(GLOBAL_QUERIES, _INT, default=0),
    Attribute(CAUSAL, _INT, default=0),
)
_DOC = (
    "y = softmax(scale q kᵀ) v by heads; q, y (batch, queries, q_num_heads · size), k, v (batch, keys, kv_num_heads · "
    "size). The queries are at the last positions of the keys (those of a cache come first). The query at position i "
    "sees the key at j if i - left <= j <= i + right (-1: no limit), or j < global_keys, or i < global_queries; with "
    "is_causal = 1 only if j <= i too."
)
_DOC_KEYS = (
    " Of these keys it sees those for which key_mask, (batch or 1, 1, 1, keys or 1), is true. hidden_score is the "
    "score of all other keys: a query that sees none gives zeros with the lowest float32, and the mean of all values "
    "with anything above it."
)


def window_mask(
    queries: int, keys: int, left: int = -1, right: int = -1, global_keys: int = 0, global_queries: int = 0,
    is_causal: int = 0,
) -> np.ndarray:  # fmt: skip
    """(queries, keys), bool: which keys a query sees."""
    i, j = np.arange(queries)[:, None] + keys - queries, np.arange(keys)
    seen = np.ones((queries, keys), bool)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    seen |= (j < global_keys) | (i < global_queries)
    return seen & (j <= i) if is_causal else seen


def window_pairs(queries: int, keys: int, attributes: Mapping[str, Any]) -> int:
    """How many pairs of a query and a key :func:`window_mask` has, without making it."""
    i = np.arange(queries, dtype=np.int64) + keys - queries
    left, right, g_keys, g_queries, is_causal = (int(attributes[a.name]) for a in _WINDOW)
    low = np.clip(i - left, 0, keys) if left >= 0 else np.zeros_like(i)
    high = np.clip(i + right + 1, 0, keys) if right >= 0 else np.full_like(i, keys)
    last = np.clip(i + 1, 0, keys) if is_causal else np.full_like(i, keys)
    high = np.minimum(high, last)
    count = np.maximum(high - low, 0) + np.clip(np.minimum(low, last), 0, g_keys)
    return int(np.where(i < g_queries, last, count).sum())


def _schema(name: str, keys: bool) -> Schema:
    inputs = [Operand(n, _FLOAT) for n in ("q", "k", "v")] + [Operand("key_mask", _BOOL, "M")] * keys
    hidden = [Attribute(HIDDEN, ir.AttributeType.FLOAT, default=_LOWEST)] * keys
    doc = _DOC + _DOC_KEYS * keys
    return Schema(name, tuple(inputs), (Operand("y", _FLOAT),), (*HEADS, *_WINDOW, *hidden), doc)


def _check(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> None:
    for name in (LEFT, RIGHT, GLOBAL_KEYS, GLOBAL_QUERIES):
        least = -1 if name in (LEFT, RIGHT) else 0
        if attributes[name] < least:
            raise InferenceError(f"{name} is {attributes[name]}; it must be {least} or more")
    queries, keys = ((item.dims or (None,) * 3)[1] if item else None for item in inputs[:2])
    if isinstance(queries, int) and isinstance(keys, int) and queries > keys:
        raise InferenceError(f"there are {queries} queries and {keys} keys; there must be a key for each query")


def _body(schema: Schema, opset: int) -> ir.Function:
    made = Body(schema, opset)
    value, add = made.values, made.add
    zero, one = (add("Constant", value_int=n) for n in (0, 1))
    queries, keys = (add("Squeeze", made.sizes(value[name], 1, 2)) for name in ("q", "k"))
    j = add("Range", zero, keys, one)
    i = add("Reshape", add("Range", add("Sub", keys, queries), keys, one), made.ints(-1, 1))
    left, right, g_keys, g_queries, is_causal = (made.attribute(a.name) for a in _WINDOW)
    after = add("Or", add("GreaterOrEqual", j, add("Sub", i, left)), add("Less", left, zero))
    before = add("Or", add("LessOrEqual", j, add("Add", i, right)), add("Less", right, zero))
    everywhere = add("Or", add("Less", j, g_keys), add("Less", i, g_queries))
    seen = add("Or", add("And", after, before), everywhere)
    seen = add("And", seen, add("Or", add("LessOrEqual", j, i), add("Equal", is_causal, zero)))
    if "key_mask" not in value:
        return made.function(made.attend(value["q"], value["k"], value["v"], seen, is_causal=0))
    hidden = add("Constant", refs={"value_float": HIDDEN})
    scores = add("Where", add("And", seen, value["key_mask"]), add("Constant", value_float=0.0), hidden)
    return made.function(made.attend(value["q"], value["k"], value["v"], scores, is_causal=0))


def _make(name: str) -> DialectOp:
    keys = name.endswith("KeyMask")
    schema = _schema(name, keys)

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        _check(inputs, attributes)
        return infer_key_mask(inputs, attributes) if keys else infer_qkv(inputs, attributes)

    def reference(
        *arrays: np.ndarray, q_num_heads: int, kv_num_heads: int, scale: float, hidden_score: float = _LOWEST,
        **window: int,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        heads, qkv = (q_num_heads, kv_num_heads), arrays[:3]
        seen = window_mask(qkv[0].shape[1], qkv[1].shape[1], **window)[None, None]
        if keys:
            return (attention_or_mean(qkv, heads, scale, seen & arrays[3], hidden_score),)
        return (attention(qkv, heads, scale, seen),)

    def cost(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
        q, k = inputs[:2]
        assert q is not None and k is not None
        (batch, queries, width), length = q.sizes, k.sizes[1]
        return flops(batch, int(attributes[Q_HEADS]), width, window_pairs(queries, length, attributes))

    return DialectOp(schema, infer, lambda opset: _body(schema, opset), reference, cost, min_opset=23)


#: The family, by name.
WINDOW_ATTENTION = {name: _make(name) for name in ("WindowAttention", "WindowAttentionKeyMask")}

__all__ = ["GLOBAL_KEYS", "GLOBAL_QUERIES", "LEFT", "RIGHT", "WINDOW_ATTENTION", "window_mask", "window_pairs"]
