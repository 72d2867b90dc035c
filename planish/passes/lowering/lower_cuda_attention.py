"""Attention as operators for which ONNX Runtime's CUDA provider has flash kernels, with its projections packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.fusion.mask_values import ALMOST_LOWEST
from planish.passes.fusion.sizes import sizes
from planish.passes.lowering.known_values import known_array
from planish.passes.lowering.mask_parts import MaskParts, mask_parts
from planish.passes.lowering.projections import Projection, as_one, packed
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass

_MICROSOFT = "com.microsoft"
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MOST = 1 << 26  # elements of a table that is compared
_LOW_HALF = -6e4


@register
@dataclass(frozen=True)
class LowerCudaAttention(RewritePass):
    """Replaces Attention by the operator with the fastest kernel of the CUDA provider that is exact for it.

    GroupQueryAttention for causal attention in half precision where key heads are shared or positions are rotated: it
    takes the packed projection and rotates inside. Else com.microsoft's Attention, where queries, keys and values are
    products of one value with weights: one product, and the bias and the split into heads in one pass. Else
    MultiHeadAttention. A mask of padding, or one that is added, becomes a bias, whose kernel never holds all scores.
    """

    name: ClassVar[str] = "lower-cuda-attention"
    min_opset: ClassVar[int] = 23
    remove_nodes: ClassVar[bool] = False

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        node = match.root
        if match.target.name != "ort-cuda":
            raise Decline(f"target '{match.target}' has other attention kernels; this is for 'ort-cuda'")
        if any(match.rank(name) != 3 for name in "qkv"):
            raise Decline("its heads are an axis of their own; the operators read (batch, length, heads · size)")
        if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
            raise Decline("it reads or writes a cache, or gives its scores")
        if node.attributes.get_float("softcap", 0.0):
            raise Decline("its scores are capped")
        if match.dtype("q") not in (ir.DataType.FLOAT, *_HALF):
            raise Decline("it is neither float32 nor half precision")
        if any(not isinstance((match.shape(name) or (None,) * 3)[2], int) for name in "qkv"):
            raise Decline("the size of its heads is unknown")

    def rewrite(self, op: Any, match: Match, q: ir.Value, k: ir.Value, v: ir.Value) -> Any:
        node = match.root
        parts, bias = _mask_of(match)
        causal = parts.causal or bool(node.attributes.get_int("is_causal", 0))
        heads, kv_heads = (node.attributes.get_int(f"{name}_num_heads", 0) for name in ("q", "kv"))
        width = (match.shape("q") or (None,) * 3)[2]
        assert isinstance(width, int)
        settings = {"num_heads": heads, "scale": node.attributes.get_float("scale", 1 / math.sqrt(width // heads))}
        if causal and (sizes(q) or ())[1:2] != (sizes(k) or ())[1:2]:
            raise Decline("it is causal, and its queries and keys are not known to be as many")
        made = None
        rotations = [_rotation(value) for value in (q, k)]
        if (
            causal
            and not parts.keys
            and bias is None
            and match.dtype("q") in _HALF
            and (kv_heads < heads or all(rotations))
        ):
            made = _grouped(op, match, settings | {"kv_num_heads": kv_heads}, rotations)
        if made is None and kv_heads < heads:
            raise Decline(f"{heads} heads share {kv_heads} of keys: only causal attention in half precision has a form")
        if made is None:
            bias = _bias_of(op, match, parts) if parts.keys else bias
            made = _multi_head(op, match, bias, settings | {"unidirectional": int(causal)})
        made.type, made.shape = match.output.type, match.output.shape
        return made


def _mask_of(match: Match) -> tuple[MaskParts, ir.Value | None]:
    """The parts of the mask; or, where it has others, the mask itself if it is one to add, of full size."""
    node = match.root
    try:
        return _parts(node), None
    except Decline:
        mask = node.inputs[3]
        dims, q, k = (sizes(value) for value in (mask, *node.inputs[:2]))
        if mask is None or mask.dtype != match.dtype("q") or dims is None or q is None or k is None:
            raise
        if len(dims) != 4 or dims[2:] != (q[1], k[1]):
            raise
        return MaskParts(), mask


def _parts(node: ir.Node) -> MaskParts:
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        return MaskParts()
    q, k = (sizes(value) for value in node.inputs[:2])
    assert q is not None and k is not None
    array = known_array(mask, _MOST)
    if array is not None and array.ndim >= 2:
        seen = array if array.dtype == bool else array == 0
        absorbing = _LOW_HALF if array.dtype == np.float16 else ALMOST_LOWEST
        if array.dtype != bool and not (array[~seen] <= absorbing).all():
            raise Decline(f"its mask '{mask.name}' is not made of 0 and of numbers that absorb every score")
        if seen.all():
            return MaskParts()
        if seen.shape[-2:] == (q[1], k[1]) and (seen == np.tri(*seen.shape[-2:])).all():
            return MaskParts(causal=True)
    return mask_parts(mask, q[1], k[1], windows=False)


# --- heads of queries that each have their own keys -----------------------------------------------------------------


def _multi_head(op: Any, match: Match, bias: Any, settings: dict[str, Any]) -> Any:
    alike = match.shape("q") == match.shape("k") == match.shape("v")
    together = packed([Projection.of(match[name]) for name in "qkv"]) if alike else None
    settings["_domain"] = _MICROSOFT
    if together is None:
        # The biases of the projections stay with these: the operator's own bias would cost the same pass.
        return op.MultiHeadAttention(match["q"], match["k"], match["v"], None, None, bias, **settings)
    weight, shift = op.initializer(together.weight, name="qkv_weight"), op.initializer(together.bias, name="qkv_bias")
    return op.Attention(together.x, weight, shift, None, None, bias, **settings)


def _bias_of(op: Any, match: Match, parts: MaskParts) -> Any:
    """The padding of a mask as (batch or 1, 1, queries, keys) to add: 0, and the lowest number."""
    dtype = match.dtype("q")
    assert dtype is not None
    kind = dtype.numpy()
    lowest = max(parts.hidden, float(np.finfo(np.float16).min)) if dtype in _HALF else parts.hidden
    kept = parts.keys[0]
    for value in parts.keys[1:]:
        kept = op.And(_rank_4(op, kept), _rank_4(op, value))
    added = op.Where(_rank_4(op, kept), op.initializer(np.zeros((), kind)), op.initializer(np.array(lowest, kind)))
    queries, keys = (op.Shape(match[name], start=1, end=2) for name in "qk")
    return op.Expand(added, op.Concat(np.ones(2, np.int64), queries, keys, axis=0))


def _rank_4(op: Any, value: ir.Value) -> Any:
    missing = 4 - len(sizes(value) or ())
    return op.Unsqueeze(value, list(range(missing))) if missing else value


# --- heads of queries that share keys, and rotated positions ---------------------------------------------------------


@dataclass(frozen=True)
class _Rotation:
    """RotaryEmbedding by positions 0, 1, 2, … the same for all sequences.

    Attributes:
        x: what is rotated.
        cos, sin: (positions, half of a head).
    """

    x: ir.Value
    cos: np.ndarray
    sin: np.ndarray
    interleaved: int


def _rotation(value: ir.Value) -> _Rotation | None:
    node = value.producer()
    if not is_op(node, "RotaryEmbedding") or node is None or len([v for v in node.inputs if v is not None]) != 3:
        return None
    tables = [known_array(table, _MOST) for table in node.inputs[1:3]]
    x = node.inputs[0]
    if x is None or node.attributes.get_int("rotary_embedding_dim"):
        return None
    rows = []
    for table in tables:
        if table is None or table.ndim != 3 or not (table == table[:1]).all():
            return None
        rows.append(table[0])
    return _Rotation(x, rows[0], rows[1], node.attributes.get_int("interleaved", 0))


def _grouped(op: Any, match: Match, settings: dict[str, Any], rotations: Sequence[_Rotation | None]) -> Any:
    """GroupQueryAttention, with the rotation inside and the projections packed where that is the same."""
    q, k, v = match["q"], match["k"], match["v"]
    dims = match.shape(q)
    batch, length = (dims or (None, None))[:2]
    if not isinstance(batch, int) or not isinstance(length, int):
        return None if settings["num_heads"] == settings["kv_num_heads"] else _refuse()
    tables: list[Any] = [None, None]
    first, second = rotations
    alike = first is not None and second is not None and np.array_equal(first.cos, second.cos)
    if alike and np.array_equal(first.sin, second.sin) and first.interleaved == second.interleaved:  # type: ignore
        assert first is not None and second is not None
        q, k = first.x, second.x
        dtype = match.dtype("q").numpy()  # type: ignore[union-attr]
        tables = [op.initializer(np.ascontiguousarray(t, dtype), name="rotation") for t in (first.cos, first.sin)]
        settings |= {"do_rotary": 1, "rotary_interleaved": first.interleaved}
    given = as_one(op, (q, k, v), packed([Projection.of(value) for value in (q, k, v)]))
    last = op.initializer(np.full(batch, length - 1, np.int32), name="last_position")
    total = op.initializer(np.array(length, np.int32), name="length")
    y, *caches = op.GroupQueryAttention(*given, None, None, last, total, *tables, **settings,
                                        _domain=_MICROSOFT, _outputs=3)  # fmt: skip
    for cache in caches:
        cache.type = match.output.type
    return y


def _refuse() -> Any:
    raise Decline("heads share keys, and batch or length are not fixed")
