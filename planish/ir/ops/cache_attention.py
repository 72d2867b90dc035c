"""planish::QuantizeCache and CacheAttention: keys and values of a cache as int8, with a scale for each token and head.

A token's keys (or values) of a head are rounded to 127 steps of the largest of them, so that what is written never
depends on what comes later, and nothing is clipped. Keys have channels that are large for every token (KIVI: Liu et al.
2024, arXiv:2402.02750): they are divided by `channels` first, which the query is multiplied with.

=====================  ======================================================================================
QuantizeCache          codes and scales of the keys or values of a prompt
CacheAttention         writes one token a row into the cache and attends over it, as com.microsoft's
                       GroupQueryAttention does in float32
CacheAttentionFloat16  the same over a cache in float16, which has neither scales nor `channels`
=====================  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.body import FunctionBody
from planish.ir.ops.flash_attention import HEADS, KV_HEADS, Q_HEADS, SCALE, attention

WINDOW = "window"
_FLOAT = frozenset({ir.DataType.FLOAT})
_INT8 = frozenset({ir.DataType.INT8})
_HALF = frozenset({ir.DataType.FLOAT16})
_STEPS, _LEAST, _MOST = np.float32(127), np.float32(1e-30), np.float32(np.finfo(np.float16).max)
#: Without a window.
UNLIMITED = 1 << 40

Cache = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def quantize(x: np.ndarray, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (batch, heads, tokens, size) int8 and scales (batch, heads, tokens, 1) float32, in float32.

    Args:
        x: of the shape of the codes.
        channels: (heads, size), what x is divided by.
    """
    x = np.asarray(x, np.float32) / np.asarray(channels, np.float32)[:, None]
    largest = np.abs(x).max(-1, keepdims=True, initial=0)
    codes = np.rint(x * (_STEPS / np.maximum(largest, _LEAST))).astype(np.int8)
    return codes, np.asarray(largest * np.float32(1 / 127), np.float32)


def append(
    new: Sequence[np.ndarray],
    codes: Sequence[np.ndarray],
    scales: Sequence[np.ndarray],
    lengths: np.ndarray,
    channels: np.ndarray,
) -> Cache:
    """The cache (keys, values, their scales) with one more token a row, at position `lengths`.

    Args:
        new: keys and values (batch, heads, size).
        codes: (batch, heads, capacity, size) int8.
        scales: (batch, heads, capacity, 1).
    """
    made, factors = [], []
    rows = np.arange(len(lengths))
    for x, held, kept, by in zip(new, codes, scales, (channels, np.ones_like(channels)), strict=True):
        found, factor = quantize(x[:, :, None], by)
        made.append(held.copy())
        factors.append(np.asarray(kept, np.float32).copy())
        made[-1][rows, :, lengths], factors[-1][rows, :, lengths] = found[:, :, 0], factor[:, :, 0]
    return made[0], made[1], factors[0], factors[1]


def append_half(
    new: Sequence[np.ndarray], held: Sequence[np.ndarray], lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same of a cache in float16, (batch, heads, capacity, size) each."""
    made = [np.array(x, np.float16) for x in held]
    for x, cache in zip(new, made, strict=True):
        cache[np.arange(len(lengths)), :, lengths] = np.clip(x, -_MOST, _MOST).astype(np.float16)
    return made[0], made[1]


def step_over(
    q: np.ndarray, cache: Cache, lengths: np.ndarray, channels: np.ndarray, scale: float, window: int
) -> np.ndarray:
    """Attention of one token a row over a cache that has it, (batch, kv heads, group, size), in float64.

    Args:
        q: (batch, kv heads, group, size).
        lengths: (batch,) the position of the token.
        window: how many of the last tokens are seen.
    """
    k, v = (codes.astype(np.float64) * factors for codes, factors in zip(cache[:2], cache[2:], strict=True))
    k = k * channels.astype(np.float64)[:, None]
    batch, heads, group, size = q.shape
    at, last = np.arange(k.shape[2]), np.asarray(lengths, np.int64)[:, None]
    seen = ((at <= last) & (at > last - window))[:, None, None]
    flat = [x.transpose(0, 2, 1, 3).reshape(batch, -1, heads * size) for x in (k, v)]
    y = attention((q.reshape(batch, 1, -1), *flat), (heads * group, heads), scale, seen)
    return y.reshape(q.shape)


def _codes(made: FunctionBody, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes and scales, along the last axis."""
    largest = made.add("ReduceMax", made.add("Abs", x), made.ints(-1), keepdims=1)
    steps = made.add("Div", made.floating(127.0), made.add("Max", largest, made.floating(1e-30)))
    zero = made.add("Cast", made.ints(0), to=int(ir.DataType.INT8))
    scaled = made.add("Mul", x, steps)
    # With a scale of 1 that is rounding to nearest even.
    codes = made.add("QuantizeLinear", scaled, made.floating(1.0), made.add("Squeeze", zero, made.ints(0)))
    return codes, made.add("Mul", largest, made.floating(float(np.float32(1 / 127))))


def _prompt() -> DialectOp:
    schema = Schema(
        "QuantizeCache",
        (Operand("x", _FLOAT), Operand("channels", _FLOAT, "C")),
        (Operand("codes", _INT8, "Q"), Operand("scales", _FLOAT)),
        (),
        "x (batch, heads, tokens, size) divided by channels (heads, size), rounded to 127 steps of the largest number "
        "of each token and head: codes as x, scales (batch, heads, tokens, 1).",
    )

    def body(opset: int) -> ir.Function:
        made = FunctionBody(schema, opset)
        x, channels = made.values.values()
        return made.function(*_codes(made, made.add("Div", x, made.add("Unsqueeze", channels, made.ints(1)))))

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        x = inputs[0].dims if inputs[0] is not None else None
        if x is not None and len(x) != 4:
            raise InferenceError(f"x has rank {len(x)}; it must have 4: batch, heads, tokens, size")
        dims = None if x is None else (*x[:3], 1)
        return [TensorInfo(ir.DataType.INT8, x), TensorInfo(ir.DataType.FLOAT, dims)]

    def reference(x: np.ndarray, channels: np.ndarray) -> tuple[np.ndarray, ...]:
        return quantize(x, channels)

    def flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
        return 4 * int(np.prod(outputs[0].sizes))

    return DialectOp(schema, infer, body, reference, flops, min_opset=23)


_CACHE = ("key", "value")
_WHAT = (
    "One token a row over a cache: q, y (batch, 1, q_num_heads · size), k, v (batch, 1, kv_num_heads · size); past and "
    "present keys and values (batch, kv_num_heads, capacity, size), of which the first lengths (batch) count. The "
    "token is written at position lengths, which must be below the capacity, and sees the last `window`, itself too."
)
_ATTRIBUTES = (*HEADS, Attribute(WINDOW, ir.AttributeType.INT, default=UNLIMITED))
_LENGTHS = Operand("lengths", frozenset({ir.DataType.INT32}), "I")
_STEP = Schema(
    "CacheAttention",
    (
        *(Operand(name, _FLOAT) for name in "qkv"),
        *(Operand(f"past_{name}", _INT8, "Q") for name in _CACHE),
        *(Operand(f"past_{name}_scale", _FLOAT) for name in _CACHE),
        _LENGTHS,
        Operand("channels", _FLOAT),
    ),
    (
        Operand("y", _FLOAT),
        *(Operand(f"present_{name}", _INT8, "Q") for name in _CACHE),
        *(Operand(f"present_{name}_scale", _FLOAT) for name in _CACHE),
    ),
    _ATTRIBUTES,
    f"{_WHAT} Scales are (batch, kv_num_heads, capacity, 1); keys are divided by channels (kv_num_heads, size).",
)
_STEP_HALF = Schema(
    "CacheAttentionFloat16",
    (
        *(Operand(name, _FLOAT) for name in "qkv"),
        *(Operand(f"past_{name}", _HALF, "Q") for name in _CACHE),
        _LENGTHS,
    ),
    (Operand("y", _FLOAT), *(Operand(f"present_{name}", _HALF, "Q") for name in _CACHE)),
    _ATTRIBUTES,
    _WHAT,
)


def _step_body(opset: int) -> ir.Function:
    made = FunctionBody(_STEP, opset)
    _, k, v, key, value, key_scale, value_scale, lengths, channels = made.values.values()
    by_head = made.shape(made.ints(0), made.number(KV_HEADS), made.ints(-1))
    last, where = place(made, lengths)
    caches = []
    for new, codes, scales, divided in ((k, key, key_scale, True), (v, value, value_scale, False)):
        x = made.add("Reshape", new, by_head)
        found, factor = _codes(made, made.add("Div", x, channels) if divided else x)
        caches += [made.add("ScatterND", codes, where, found), made.add("ScatterND", scales, where, factor)]
    keys, values = (made.add("Mul", _float(made, caches[i]), caches[i + 1]) for i in (0, 2))
    y = _attend(made, keys, values, last, channels)
    return made.function(y, caches[0], caches[2], caches[1], caches[3])


def _half_body(opset: int) -> ir.Function:
    made = FunctionBody(_STEP_HALF, opset)
    _, k, v, key, value, lengths = made.values.values()
    by_head = made.shape(made.ints(0), made.number(KV_HEADS), made.ints(-1))
    last, where = place(made, lengths)
    caches = []
    for new, held in ((k, key), (v, value)):
        x = made.add("Clip", made.add("Reshape", new, by_head), *(made.floating(n * float(_MOST)) for n in (-1, 1)))
        caches.append(made.add("ScatterND", held, where, made.add("Cast", x, to=int(ir.DataType.FLOAT16))))
    keys, values = (_float(made, cache) for cache in caches)
    return made.function(_attend(made, keys, values, last, None), *caches)


def _float(made: FunctionBody, value: ir.Value) -> ir.Value:
    return made.add("Cast", value, to=int(ir.DataType.FLOAT))


def _attend(
    made: FunctionBody, keys: ir.Value, values: ir.Value, last: ir.Value, channels: ir.Value | None
) -> ir.Value:
    """y over keys and values in float32, (batch, kv heads, capacity, size)."""
    q, size = made.values["q"], made.size(keys, 3)
    queries = made.add("Reshape", q, made.shape(made.ints(0), made.number(KV_HEADS), made.ints(-1), size))
    if channels is not None:  # of the query, which is small
        queries = made.add("Mul", queries, made.add("Unsqueeze", channels, made.ints(1)))
    queries = made.add("Mul", queries, made.number(SCALE))
    scores = made.add("MatMul", queries, made.add("Transpose", keys, perm=[0, 1, 3, 2]))
    at = made.span(made.ints(0), made.size(keys, 2))
    row = made.add("Reshape", last, made.ints(-1, 1, 1, 1))
    later = made.add("Greater", at, row)
    early = made.add("LessOrEqual", at, made.add("Sub", row, made.number(WINDOW)))
    scores = made.add("Where", made.add("Or", later, early), made.floating(float("-inf")), scores)
    y = made.add("MatMul", made.add("Softmax", scores, axis=-1), values)
    return made.add("Reshape", y, made.add("Shape", q))


def place(made: FunctionBody, lengths: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Lengths as int64, and (batch, heads, 3): row, head and position of what is written."""
    last, heads = made.add("Cast", lengths, to=int(ir.DataType.INT64)), made.number(KV_HEADS)
    batch = made.add("Shape", last)
    shape = made.shape(batch, heads)
    rows = made.add("Unsqueeze", made.span(made.ints(0), batch), made.ints(1))
    parts = [rows, made.span(made.ints(0), heads), made.add("Unsqueeze", last, made.ints(1))]
    wide = [made.add("Unsqueeze", made.add("Expand", part, shape), made.ints(2)) for part in parts]
    return last, made.add("Concat", *wide, axis=2)


def _step_infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    q, k, v, key, value, key_scale, value_scale, _, channels = (None if i is None else i.dims for i in inputs)
    heads = _heads(attributes)
    cache = same_cache((None, heads[1], None, None), ("past_key", key), ("past_value", value))
    # Scales have the cache's other axes, and say as much about them.
    one = same_cache((*cache[:3], 1), ("past_key_scale", key_scale), ("past_value_scale", value_scale))
    cache = (*one[:3], cache[3])
    _check_new(heads, cache[3], q, k, v)
    if channels is not None and len(channels) == 2:
        same_dim(channels[0], heads[1], "heads of channels")
        same_dim(channels[1], cache[3], "channels and size of a head")
    codes, scales = (TensorInfo(t, d) for t, d in ((ir.DataType.INT8, cache), (ir.DataType.FLOAT, one)))
    return [TensorInfo(ir.DataType.FLOAT, q), codes, codes, scales, scales]


def _half_infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    q, k, v, key, value, _ = (None if item is None else item.dims for item in inputs)
    heads = _heads(attributes)
    cache = same_cache((None, heads[1], None, None), ("past_key", key), ("past_value", value))
    _check_new(heads, cache[3], q, k, v)
    return [TensorInfo(ir.DataType.FLOAT, q), *[TensorInfo(ir.DataType.FLOAT16, cache)] * 2]


Dims = tuple[Dim, ...] | None


def _heads(attributes: Mapping[str, Any]) -> tuple[int, int]:
    heads, kv_heads = attributes[Q_HEADS], attributes[KV_HEADS]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise InferenceError(f"{Q_HEADS} is {heads} and {KV_HEADS} is {kv_heads}; one must be a multiple of the other")
    if attributes[WINDOW] is not None and attributes[WINDOW] < 1:
        raise InferenceError(f"{WINDOW} is {attributes[WINDOW]}; a token sees 1 or more")
    return heads, kv_heads


def same_cache(wanted: tuple[Dim, ...], *given: tuple[str, Dims]) -> tuple[Dim, ...]:
    """The shape that these have in common."""
    for name, dims in given:
        if dims is None:
            continue
        if len(dims) != 4:
            raise InferenceError(f"{name} has rank {len(dims)}; it must have 4: batch, heads, capacity, size")
        pairs = enumerate(zip(wanted, dims, strict=True))
        wanted = tuple(same_dim(a, b, f"{name}, axis {axis}") for axis, (a, b) in pairs)
    return wanted


def _check_new(heads: tuple[int, int], size: Dim, *given: Dims) -> None:
    for name, dims, count in zip("qkv", given, (heads[0], heads[1], heads[1]), strict=True):
        if dims is None:
            continue
        if len(dims) != 3:
            raise InferenceError(f"{name} has rank {len(dims)}; it must have 3: batch, 1, heads and their size")
        same_dim(dims[1], 1, f"{name}: tokens")
        if isinstance(size, int):
            same_dim(dims[2], count * size, f"{name}: its last axis, {count} heads of size {size}")


def _step_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, past_key: np.ndarray, past_value: np.ndarray,
    past_key_scale: np.ndarray, past_value_scale: np.ndarray, lengths: np.ndarray, channels: np.ndarray,
    q_num_heads: int, kv_num_heads: int, scale: float, window: int = UNLIMITED,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    batch, at = len(q), lengths.astype(np.int64)
    new = [x.reshape(batch, kv_num_heads, -1) for x in (k, v)]
    codes = [x.astype(np.int8) for x in (past_key, past_value)]
    cache = append(new, codes, (past_key_scale, past_value_scale), at, channels)
    heads = q.reshape(batch, kv_num_heads, q_num_heads // kv_num_heads, -1)
    return (step_over(heads, cache, at, channels, scale, window).reshape(q.shape), *cache)


def _half_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, past_key: np.ndarray, past_value: np.ndarray, lengths: np.ndarray,
    q_num_heads: int, kv_num_heads: int, scale: float, window: int = UNLIMITED,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    batch, at = len(q), lengths.astype(np.int64)
    keys, values = append_half([x.reshape(batch, kv_num_heads, -1) for x in (k, v)], (past_key, past_value), at)
    heads = q.reshape(batch, kv_num_heads, q_num_heads // kv_num_heads, -1)
    one = np.ones(1)
    y = step_over(heads, (keys, values, one, one), at, np.ones((kv_num_heads, keys.shape[3])), scale, window)
    return y.reshape(q.shape), keys, values


def _step_flops(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]
) -> int:
    q, key = inputs[0], inputs[3]
    assert q is not None and key is not None
    tokens = min(key.sizes[2], int(attributes[WINDOW]))
    return q.sizes[0] * tokens * (4 * q.sizes[2] + 5 * int(attributes[Q_HEADS]))


QUANTIZE_CACHE = _prompt()
CACHE_ATTENTION = DialectOp(_STEP, _step_infer, _step_body, _step_reference, _step_flops, min_opset=23)
CACHE_ATTENTION_FLOAT16 = DialectOp(_STEP_HALF, _half_infer, _half_body, _half_reference, _step_flops, min_opset=23)
#: Steps over a cache, by name.
CACHE_STEPS = {op.name: op for op in (CACHE_ATTENTION, CACHE_ATTENTION_FLOAT16)}
