"""planish::FlashAttention and its relatives: attention by heads that are side by side in the last axis, float32.

====================  ================================================================================
FlashAttention        softmax(scale q kᵀ) v; causal from the first key on, as ONNX's Attention has it
FlashAttentionBias    the same with a float mask that is added to the scores
FlashAttentionMask    the same with a bool mask, true where a key is seen
FlashAttentionPast    causal, with the queries at the end of the keys: those of a cache, then their own
====================  ================================================================================

An operator each, since the body of a function has neither optional inputs nor choices. All are ONNX's Attention, which
is also their body, so a query that sees no key gives zeros. FlashAttention: Dao 2023, arXiv:2307.08691; grouped heads:
Ainslie et al. 2023, arXiv:2305.13245.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.schemas import DIALECT_DOMAIN

Q_HEADS, KV_HEADS, SCALE, CAUSAL = "q_num_heads", "kv_num_heads", "scale", "is_causal"
HEADS = (
    Attribute(Q_HEADS, ir.AttributeType.INT, required=True),
    Attribute(KV_HEADS, ir.AttributeType.INT, required=True),
    Attribute(SCALE, ir.AttributeType.FLOAT, required=True),
)
_IS_CAUSAL = Attribute(CAUSAL, ir.AttributeType.INT, default=0)
_FLOAT = frozenset({ir.DataType.FLOAT})
_QKV = tuple(Operand(name, _FLOAT) for name in ("q", "k", "v"))
_LOWEST = float(np.finfo(np.float32).min)


def attention(
    arrays: Sequence[np.ndarray], heads: tuple[int, int], scale: float, seen: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """Attention in float64.

    Args:
        arrays: q (batch, queries, heads · size), k and v (batch, keys, kv heads · size).
        heads: of q, and of k and v.
        scale: of q kᵀ.
        seen: bool, broadcast to (batch, heads, queries, keys).
        bias: added to the scores, broadcast likewise; the lowest float32 hides a key, as -inf does.

    Returns:
        (batch, queries, heads · size); a query that sees no key has zeros.
    """
    q, k, v = (
        x.astype(np.float64).reshape(*x.shape[:2], n, x.shape[2] // n).transpose(0, 2, 1, 3)
        for x, n in zip(arrays, (heads[0], heads[1], heads[1]), strict=True)
    )
    k, v = (np.repeat(x, heads[0] // heads[1], 1) for x in (k, v))
    scores = scale * q @ k.transpose(0, 1, 3, 2)
    if bias is not None:
        scores, seen = scores + bias, seen & (bias > _LOWEST)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=_LOWEST))
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
    return np.asarray((weights @ v).transpose(0, 2, 1, 3).reshape(arrays[0].shape))


def causal(queries: int, keys: int, offset: int) -> np.ndarray:
    """(queries, keys): query i sees keys 0 … i + offset."""
    return np.asarray(np.arange(keys) <= np.arange(queries)[:, None] + offset)


def infer_qkv(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> list[TensorInfo]:
    """The output of attention over q, k and v of rank 3, after checking them against the numbers of heads."""
    q, k, v = (item or TensorInfo() for item in inputs[:3])
    heads, kv_heads = attributes[Q_HEADS], attributes[KV_HEADS]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise InferenceError(f"{Q_HEADS} is {heads} and {KV_HEADS} is {kv_heads}; one must be a multiple of the other")
    for name, item in (("q", q), ("k", k), ("v", v)):
        if item.dims is not None and len(item.dims) != 3:
            raise InferenceError(
                f"{name} has rank {len(item.dims)}; it must have 3: batch, length, heads and their size"
            )
    qd, kd, vd = (item.dims or (None, None, None) for item in (q, k, v))
    batch = same_dim(same_dim(qd[0], kd[0], "batch of q and k"), vd[0], "batch of k and v")
    same_dim(kd[1], vd[1], "lengths of k and v")
    size = _per_head(qd[2], heads, "q")
    for name, dims in (("k", kd), ("v", vd)):
        size = same_dim(size, _per_head(dims[2], kv_heads, name), f"head sizes of q and {name}")
    width = size * heads if isinstance(size, int) else qd[2]
    dtype = next((item.dtype for item in (q, k, v) if item.dtype is not None), None)
    return [TensorInfo(dtype, (batch, qd[1], width))]


def _per_head(width: Dim, heads: int, name: str) -> Dim:
    if not isinstance(width, int):
        return None
    if width % heads:
        raise InferenceError(f"the last axis of {name} has size {width}, which {heads} heads do not divide")
    return width // heads


def _infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    result = infer_qkv(inputs, attributes)
    mask = inputs[3].dims if len(inputs) > 3 and inputs[3] is not None else None
    if mask is not None:
        k = inputs[1].dims if inputs[1] is not None else None
        dims = result[0].dims or (None, None, None)
        full = (dims[0], attributes[Q_HEADS], dims[1], k[1] if k is not None else None)
        if not 2 <= len(mask) <= 4:
            raise InferenceError(f"the mask has rank {len(mask)}; it must have 2, 3 or 4")
        for axis, (have, want) in enumerate(zip(mask, full[4 - len(mask) :], strict=True)):
            if isinstance(have, int) and isinstance(want, int) and have not in (1, want):
                raise InferenceError(f"axis {axis} of the mask has size {have}; it must be 1 or {want}")
    return result


def flops(batch: int, heads: int, width: int, pairs: int) -> int:
    """Work on `pairs` of a query and a key in each head."""
    # Two products with each key; for each score: scale, maximum, difference, exponential, sum.
    return batch * pairs * (4 * width + 5 * heads)


def _pairs(queries: int, keys: int, offset: int) -> int:
    """How many of them causal attention has."""
    return int(np.clip(np.arange(queries, dtype=np.int64) + offset + 1, 0, keys).sum())


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
    q, k = inputs[:2]
    assert q is not None and k is not None
    (batch, queries, width), keys = q.sizes, k.sizes[1]
    pairs = _pairs(queries, keys, 0) if attributes[CAUSAL] else queries * keys
    return flops(batch, int(attributes[Q_HEADS]), width, pairs)


def _past_flops(
    inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]
) -> int:
    q, k = inputs[:2]
    assert q is not None and k is not None
    (batch, queries, width), keys = q.sizes, k.sizes[1]
    return flops(batch, int(attributes[Q_HEADS]), width, _pairs(queries, keys, keys - queries))


class Body:
    """Builds the graph of a function, with references to its attributes."""

    def __init__(self, schema: Schema, opset: int) -> None:
        self.schema, self._opset = schema, opset
        self.values = {operand.name: ir.Value(name=operand.name) for operand in schema.inputs}
        self._types = {attribute.name: attribute for attribute in schema.attributes}
        self._nodes: list[ir.Node] = []

    def add(
        self, op: str, *inputs: ir.Value | None, refs: Mapping[str, str] | None = None, **attributes: Any
    ) -> ir.Value:
        """A node with one output; `refs` are attributes of the node that are attributes of the function."""
        label = f"{op.lower()}_{len(self._nodes)}"
        for name, of in (refs or {}).items():
            attributes[name] = ir.RefAttr(name, of, self._types[of].type)
        outputs = [ir.Value(name=f"{label}_out")]
        self._nodes.append(ir.node(op, list(inputs), attributes=attributes, name=label, outputs=outputs))
        return outputs[0]

    def ints(self, *numbers: int) -> ir.Value:
        return self.add("Constant", value_ints=list(numbers))

    def rounded(self, value: ir.Value) -> ir.Value:
        """A float32 value with the precision of bfloat16."""
        return self.add("Cast", self.add("Cast", value, to=int(ir.DataType.BFLOAT16)), to=int(ir.DataType.FLOAT))

    def attribute(self, name: str) -> ir.Value:
        """An int attribute of the function as a scalar."""
        return self.add("Constant", refs={"value_int": name})

    def sizes(self, value: ir.Value, start: int, end: int) -> ir.Value:
        return self.add("Shape", value, start=start, end=end)

    def attend(self, *inputs: ir.Value | None, is_causal: int | None = None) -> ir.Value:
        refs = {name: name for name in (Q_HEADS, KV_HEADS, SCALE)}
        if is_causal is None:
            return self.add("Attention", *inputs, refs={**refs, CAUSAL: CAUSAL})
        return self.add("Attention", *inputs, refs=refs, is_causal=is_causal)

    def function(self, *results: ir.Value) -> ir.Function:
        for result, operand in zip(results, self.schema.outputs, strict=True):
            result.name = operand.name
        name, inputs = self.schema.name, list(self.values.values())
        graph = ir.Graph(inputs, results, nodes=self._nodes, opset_imports={"": self._opset}, name=name)
        attributes = [ir.Attr(a.name, a.type, a.default) for a in self.schema.attributes]
        return ir.Function(DIALECT_DOMAIN, name, graph=graph, attributes=attributes)


def _dense(name: str, mask: Operand | None) -> DialectOp:
    what = {
        "FlashAttention": "",
        "FlashAttentionBias": " attn_mask, broadcast to (batch, heads, queries, keys), is added to the scores;"
        " the lowest float32 and -inf hide a key.",
        "FlashAttentionMask": " A key is seen where attn_mask, broadcast to (batch, heads, queries, keys), is true.",
    }[name]
    # GPUs have a kernel in half precision for the one without a mask.
    floats = _FLOAT if mask else _FLOAT | {ir.DataType.FLOAT16}
    schema = Schema(
        name,
        (*(Operand(operand.name, floats) for operand in _QKV), *([mask] if mask else [])),
        (Operand("y", floats),),
        (*HEADS, _IS_CAUSAL),
        "y = softmax(scale q kᵀ) v by heads; q, y (batch, queries, q_num_heads · size), k, v (batch, keys, "
        f"kv_num_heads · size). With is_causal = 1 query i sees keys 0 … i.{what} A query that sees none gives zeros.",
    )

    def body(opset: int) -> ir.Function:
        made = Body(schema, opset)
        q, k, v, *more = made.values.values()
        if more:  # ONNX Runtime wants the last two axes of a mask in full
            last = made.add("Concat", made.sizes(q, 1, 2), made.sizes(k, 1, 2), axis=0)
            more = [made.add("Expand", more[0], last)]
        return made.function(made.attend(q, k, v, *more))

    def reference(
        q: np.ndarray, k: np.ndarray, v: np.ndarray, *more: np.ndarray,
        q_num_heads: int, kv_num_heads: int, scale: float, is_causal: int = 0,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        seen = causal(q.shape[1], k.shape[1], 0 if is_causal else k.shape[1])
        bias = None
        if more and more[0].dtype == bool:
            seen = seen & more[0]
        elif more:
            bias = more[0].astype(np.float64)
        return (attention((q, k, v), (q_num_heads, kv_num_heads), scale, seen, bias),)

    return DialectOp(schema, _infer, body, reference, _flops, min_opset=23)


def _past() -> DialectOp:
    schema = Schema(
        "FlashAttentionPast",
        _QKV,
        (Operand("y", _FLOAT),),
        HEADS,
        "Causal attention of the last positions over all: query i sees keys 0 … i + keys - queries. k and v hold those "
        "of a cache first; there are at least as many keys as queries. Shapes as of FlashAttention.",
    )

    def body(opset: int) -> ir.Function:
        made = Body(schema, opset)
        zero, one = (made.add("Constant", value_int=n) for n in (0, 1))
        queries, keys = (made.add("Squeeze", made.sizes(made.values[name], 1, 2)) for name in ("q", "k"))
        position = made.add("Range", made.add("Sub", keys, queries), keys, one)
        seen = made.add(
            "LessOrEqual",
            made.add("Range", zero, keys, one),
            made.add("Reshape", position, made.ints(-1, 1)),
        )
        # Not Attention's own past: that is a copy of keys and values in another layout.
        return made.function(made.attend(*made.values.values(), seen, is_causal=0))

    def reference(
        q: np.ndarray, k: np.ndarray, v: np.ndarray, q_num_heads: int, kv_num_heads: int, scale: float
    ) -> tuple[np.ndarray, ...]:
        seen = causal(q.shape[1], k.shape[1], k.shape[1] - q.shape[1])
        return (attention((q, k, v), (q_num_heads, kv_num_heads), scale, seen),)

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        queries, keys = ((item.dims or (None,) * 3)[1] if item else None for item in inputs[:2])
        if isinstance(queries, int) and isinstance(keys, int) and queries > keys:
            raise InferenceError(f"there are {queries} queries and {keys} keys; there must be a key for each query")
        return infer_qkv(inputs, attributes)

    return DialectOp(schema, infer, body, reference, _past_flops, min_opset=23)


#: The family, by name.
FLASH_ATTENTION: dict[str, DialectOp] = {
    "FlashAttention": _dense("FlashAttention", None),
    "FlashAttentionBias": _dense("FlashAttentionBias", Operand("attn_mask", _FLOAT, "T")),
    "FlashAttentionMask": _dense("FlashAttentionMask", Operand("attn_mask", frozenset({ir.DataType.BOOL}), "M")),
    "FlashAttentionPast": _past(),
}
