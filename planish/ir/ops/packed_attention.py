"""Attention that sees every key: over a packed product of queries, keys and values, and with a number for each key.

======================  ==============================================================================================
FlashAttentionKeyBias   softmax(scale q kᵀ + key_bias) v, by heads side by side in the last axis
PackedAttention         softmax(scale q kᵀ) v of q, k and v side by side in one value, plus their bias
PackedAttentionKeyBias  both
======================  ==============================================================================================

A number for each key, the same for all queries and heads, is what merged tokens need: the logarithm of how many a token
stands for (arXiv:2210.09461). It is float32 whatever the rest is. GPUs have kernels in half precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.body import FunctionBody
from planish.ir.ops.flash_attention import HEADS, KV_HEADS, Q_HEADS, SCALE, attention, flops, infer_qkv

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_BIAS = Operand("key_bias", frozenset({ir.DataType.FLOAT}), "B")
_PACKED = (Operand("qkv", _FLOATS), Operand("shift", _FLOATS))
_NUM_HEADS = Attribute("num_heads", ir.AttributeType.INT, required=True)
_SCALE = Attribute(SCALE, ir.AttributeType.FLOAT, required=True)


def _check_bias(bias: TensorInfo | None, keys: TensorInfo | None) -> None:
    if bias is None or bias.dims is None:
        return
    if len(bias.dims) != 2:
        raise InferenceError(f"key_bias has rank {len(bias.dims)}; it must have 2: batch, keys")
    if keys is not None and keys.dims is not None:
        same_dim(bias.dims[0], keys.dims[0], "the batch of key_bias and keys")
        same_dim(bias.dims[1], keys.dims[1], "the keys of key_bias and those there are")


def _mask(made: FunctionBody, bias: ir.Value, queries: ir.Value) -> ir.Value:
    """The bias as a mask for all queries: ONNX Runtime wants its last two axes in full."""
    sizes = made.shape(made.size(queries, 1), made.size(bias, 1))
    return made.add("CastLike", made.add("Expand", made.add("Unsqueeze", bias, made.ints(1, 2)), sizes), queries)


def _key_bias() -> DialectOp:
    schema = Schema(
        "FlashAttentionKeyBias",
        (*(Operand(name, _FLOATS) for name in ("q", "k", "v")), _BIAS),
        (Operand("y", _FLOATS),),
        HEADS,
        "y = softmax(scale q kᵀ + key_bias) v by heads; q, y (batch, queries, q_num_heads · size), k, v (batch, keys, "
        "kv_num_heads · size), key_bias (batch, keys).",
    )

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        _check_bias(inputs[3], inputs[1])
        return infer_qkv(inputs, attributes)

    def body(opset: int) -> ir.Function:
        made = FunctionBody(schema, opset)
        q, k, v, bias = made.values.values()
        refs = {name: name for name in (Q_HEADS, KV_HEADS, SCALE)}
        return made.function(made.add("Attention", q, k, v, _mask(made, bias, q), refs=refs))

    def reference(
        q: np.ndarray, k: np.ndarray, v: np.ndarray, key_bias: np.ndarray,
        q_num_heads: int, kv_num_heads: int, scale: float,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        seen, bias = np.ones((q.shape[1], k.shape[1]), bool), key_bias.astype(np.float64)[:, None, None]
        return (attention((q, k, v), (q_num_heads, kv_num_heads), scale, seen, bias),)

    def work(inputs: Sequence[TensorInfo | None], _: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
        q, k = inputs[:2]
        assert q is not None and k is not None
        (batch, queries, width), keys = q.sizes, k.sizes[1]
        return flops(batch, int(attributes[Q_HEADS]), width, queries * keys)

    return DialectOp(schema, infer, body, reference, work, min_opset=23)


def _infer_packed(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    qkv, shift = (item or TensorInfo() for item in inputs[:2])
    heads = attributes["num_heads"]
    if not isinstance(heads, int) or heads < 1:
        raise InferenceError(f"num_heads is {heads}; it must be 1 or more")
    if qkv.dims is not None and len(qkv.dims) != 3:
        raise InferenceError(f"qkv has rank {len(qkv.dims)}; it must have 3: batch, tokens, 3 · heads · size")
    dims = qkv.dims or (None, None, None)
    if isinstance(dims[2], int) and dims[2] % (3 * heads):
        raise InferenceError(f"the last axis of qkv has size {dims[2]}, which is no multiple of 3 · {heads}")
    if shift.dims is not None:
        if len(shift.dims) != 1:
            raise InferenceError(f"shift has rank {len(shift.dims)}; it must have 1")
        same_dim(shift.dims[0], dims[2], "shift and the last axis of qkv")
    if len(inputs) > 2:
        _check_bias(inputs[2], qkv)
    width = dims[2] // 3 if isinstance(dims[2], int) else None
    return [TensorInfo(qkv.dtype or shift.dtype, (dims[0], dims[1], width))]


def _packed(name: str, biased: bool) -> DialectOp:
    schema = Schema(
        name,
        (*_PACKED, *((_BIAS,) if biased else ())),
        (Operand("y", _FLOATS),),
        (_NUM_HEADS, _SCALE),
        f"y = softmax(scale q kᵀ{' + key_bias' * biased}) v by heads, where q, k and v (batch, tokens, num_heads · "
        f"size) are the thirds of the last axis of qkv + shift.{' key_bias is (batch, tokens).' * biased}",
    )

    def body(opset: int) -> ir.Function:
        made = FunctionBody(schema, opset)
        qkv, shift, *bias = made.values.values()
        q, k, v = made.outputs("Split", 3, made.add("Add", qkv, shift), axis=2, num_outputs=3)
        mask = [_mask(made, bias[0], q)] if bias else []
        refs = {Q_HEADS: "num_heads", KV_HEADS: "num_heads", SCALE: SCALE}
        return made.function(made.add("Attention", q, k, v, *mask, refs=refs))

    def reference(
        qkv: np.ndarray, shift: np.ndarray, *bias: np.ndarray, num_heads: int, scale: float
    ) -> tuple[np.ndarray, ...]:
        parts = np.split(qkv.astype(np.float64) + shift.astype(np.float64), 3, axis=2)
        seen = np.ones((qkv.shape[1], qkv.shape[1]), bool)
        added = bias[0].astype(np.float64)[:, None, None] if bias else None
        return (attention(parts, (num_heads, num_heads), scale, seen, added),)

    def work(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
        batch, tokens, width = outputs[0].sizes
        return flops(batch, int(attributes["num_heads"]), width, tokens * tokens) + 3 * batch * tokens * width

    return DialectOp(schema, _infer_packed, body, reference, work, min_opset=23)


#: The family, by name.
PACKED_ATTENTION: dict[str, DialectOp] = {
    "FlashAttentionKeyBias": _key_bias(),
    "PackedAttention": _packed("PackedAttention", False),
    "PackedAttentionKeyBias": _packed("PackedAttentionKeyBias", True),
}
