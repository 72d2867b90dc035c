"""Attention, normalizations, softmax and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from planish.runtime.relax.elementwise import elementwise
from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, axis_of, emits


@emits("FlashAttention", "FlashAttentionBias", "FlashAttentionMask", domain="planish")
@emits("Attention")
def _attention(t: Translator, node: ir.Node) -> list[Operand]:
    from planish.runtime.kernels.attention import FlashAttention

    given = [*t.inputs(node), *[None] * 4]
    q, k, v, mask, past_key, past_value = given[:6]
    assert q is not None and k is not None and v is not None
    t.require_float(node, q, k, v)
    if float(attribute(node, "softcap", 0.0)) or len(node.outputs) > 3:
        t.refuse(node, "softcap, or scores as an output")
    flat = q.rank == 3
    heads = int(attribute(node, "q_num_heads")) if flat else q.dims[1]
    kv_heads = int(attribute(node, "kv_num_heads")) if flat else k.dims[1]
    width = q.dims[-1]
    if not isinstance(width, int) or not isinstance(heads, int):
        t.refuse(node, "its heads have no fixed size")
    size = width // heads if flat else width
    value_width = v.dims[-1] // kv_heads if flat else v.dims[-1]
    if value_width != size:
        t.refuse(node, f"its values have size {value_width} and its queries {size}")
    presents: list[Operand] = []
    if past_key is not None or len(node.outputs) > 1:
        k, v, presents = _with_past(t, k, v, past_key, past_value, kv_heads, size)
    q3, k3, v3 = (_side_by_side(t, x) for x in (q, k, v))
    inputs = [t.tensor(x) for x in (q3, k3, v3)]
    kind = "none"
    if mask is not None:
        kind = "bool" if mask.dtype == "bool" else "float"
        mask = _four_axes(t, node, mask, q3.dims[1], k3.dims[1])
        inputs.append(t.tensor(mask))
    scale = attribute(node, "scale")
    inputs.append(t.device.number(t, float(scale) if scale is not None else 1 / math.sqrt(size)))
    causal = bool(attribute(node, "is_causal", 0))
    if causal:
        past = 0 if past_key is None else past_key.dims[2]
        inputs.append(t.device.sizes(t, [past]))
    made = t.call(FlashAttention(size, causal=causal, mask=kind), inputs, (q3.dims, q.dtype))
    y = Operand(q.dtype, q3.dims, made)
    if not flat:
        y = _by_heads(t, y, heads, size)
    return [y, *presents]


def _side_by_side(t: Translator, x: Operand) -> Operand:
    """(batch, heads, length, size) as (batch, length, heads · size)."""
    if x.rank == 3:
        return x
    batch, heads, length, size = x.dims
    var = t.compute(
        "join_heads", [t.tensor(x)], lambda i, v: v(i[0], i[2], i[1], i[3]), [batch, length, heads, size], x.dtype
    )
    dims = [batch, length, t.product([heads, size])]
    return Operand(x.dtype, dims, t.reshape(var, dims))


def _by_heads(t: Translator, x: Operand, heads: int, size: int) -> Operand:
    """(batch, length, heads · size) as (batch, heads, length, size)."""
    batch, length = x.dims[:2]
    apart = t.reshape(t.tensor(x), [batch, length, heads, size])
    dims = [batch, heads, length, size]
    return Operand(
        x.dtype, dims, t.compute("split_heads", [apart], lambda i, v: v(i[0], i[2], i[1], i[3]), dims, x.dtype)
    )


def _with_past(
    t: Translator, k: Operand, v: Operand, past_key: Operand | None, past_value: Operand | None, heads: int, size: int
) -> tuple[Operand, Operand, list[Operand]]:
    """Keys and values behind those of the past, by heads."""
    whole = []
    for new, past in ((k, past_key), (v, past_value)):
        own = _by_heads(t, new, heads, size) if new.rank == 3 else new
        if past is not None:
            before = past.dims[2]
            dims = [*own.dims[:2], t.plain(t.dim(before) + t.dim(own.dims[2])), own.dims[3]]
            past = t.match(past, [dims[0], dims[1], before, dims[3]])
            var = t.compute(
                "append",
                [t.tensor(past), t.tensor(own)],
                lambda i, a, b, n=before: t.tir.if_then_else(
                    i[2] < t.dim(n), a(*i), b(i[0], i[1], i[2] - t.dim(n), i[3])
                ),
                dims,
                own.dtype,
            )
            own = Operand(own.dtype, dims, var)
        whole.append(own)
    return whole[0], whole[1], whole


def _four_axes(t: Translator, node: ir.Node, mask: Operand, queries: Any, keys: Any) -> Operand:
    if mask.rank > 4 or mask.rank < 2:
        t.refuse(node, f"its mask has rank {mask.rank}")
    dims = [*[1] * (4 - mask.rank), *mask.dims]
    one = [isinstance(d, int) and d == 1 for d in dims]
    made = Operand(mask.dtype, dims, t.reshape(t.tensor(mask), dims))
    return t.match(made, [*dims[:2], 1 if one[2] else queries, 1 if one[3] else keys])


@emits("LayerNormalization", "RMSNormalization")
def _norm(t: Translator, node: ir.Node) -> Operand:
    from planish.runtime.kernels.norms import LayerNorm, RmsNorm

    x, scale, *rest = t.inputs(node)
    assert x is not None and scale is not None
    t.require_float(node, x, scale)
    axis = axis_of(node, x.rank, -1)
    inner = x.dims[axis:]
    wanted = [t.product(inner)]
    rows = t.rows(x, x.rank - axis)
    epsilon = t.device.number(t, float(attribute(node, "epsilon", 1e-5)))
    weights = [t.reshape(t.tensor(_full(t, w, inner)), wanted) for w in (scale, *rest) if w is not None]
    bias = len(weights) > 1
    template = LayerNorm(bias=bias) if node.op_type == "LayerNormalization" else RmsNorm()
    made = t.call(template, [rows, *weights, epsilon], (list(rows.ty.shape), x.dtype))
    return Operand(x.dtype, x.dims, t.reshape(made, x.dims))


def _full(t: Translator, weight: Operand, dims: Sequence[Any]) -> Operand:
    """A scale or bias in the sizes of what it scales."""
    if weight.rank == len(dims) and all(t.equal(a, b) for a, b in zip(weight.dims, dims, strict=True)):
        return weight
    dtype = weight.dtype
    ones = Operand(dtype, list(dims), t.compute("zeros", [], lambda i: t.tir.const(0.0, dtype), dims, dtype))
    return elementwise(t, "widen", [weight, ones], lambda a, b: a + b, dtype)


@emits("Softmax", "LogSoftmax")
def _softmax(t: Translator, node: ir.Node) -> Operand:
    from planish.runtime.kernels.reductions import Softmax

    (x,) = t.inputs(node)
    assert x is not None
    t.require_float(node, x)
    axis = axis_of(node, x.rank, -1)
    perm = [*[a for a in range(x.rank) if a != axis], axis]
    dims = [x.dims[a] for a in perm]
    moved = x if axis == x.rank - 1 else _moved(t, x, perm)
    rows = t.rows(moved)
    made = t.call(Softmax(log=node.op_type == "LogSoftmax"), [rows], (list(rows.ty.shape), x.dtype))
    y = Operand(x.dtype, dims, t.reshape(made, dims))
    return y if axis == x.rank - 1 else _moved(t, y, [perm.index(a) for a in range(x.rank)])


def _moved(t: Translator, x: Operand, perm: Sequence[int]) -> Operand:
    """The operand transposed."""
    source = [list(perm).index(axis) for axis in range(x.rank)]
    dims = [x.dims[axis] for axis in perm]
    var = t.compute("transpose", [t.tensor(x)], lambda i, v: v(*[i[a] for a in source]), dims, x.dtype)
    return Operand(x.dtype, dims, var)


@emits("RotaryEmbedding")
def _rotary(t: Translator, node: ir.Node) -> Operand:
    given = [*t.inputs(node), None]
    x, cosine, sine, positions = given[:4]
    assert x is not None and cosine is not None and sine is not None
    heads = int(attribute(node, "num_heads", 0))
    flat = x.rank == 3
    size = x.dims[-1] // heads if flat else x.dims[-1]
    rotated = int(attribute(node, "rotary_embedding_dim", 0)) or size
    half = rotated // 2
    paired = bool(attribute(node, "interleaved", 0))
    if positions is not None:
        from planish.runtime.relax.gathers import rows_at

        cosine, sine = (rows_at(t, table, positions) for table in (cosine, sine))
    batch, length = x.dims[0], x.dims[1] if flat else x.dims[2]
    cosine, sine = (t.match(table, [_own(t, table.dims[0], batch), length, half]) for table in (cosine, sine))
    one = isinstance(cosine.dims[0], int) and cosine.dims[0] == 1
    dims = [batch, length, heads, size] if flat else x.dims
    tir = t.tir

    def element(i: Sequence[Any], v: Any, c: Any, s: Any) -> Any:
        def read(d: Any) -> Any:
            return v(*i[:3], d)

        at = i[3]
        row = (0 if one else i[0], i[1] if flat else i[2])
        if paired:
            pair = tir.floordiv(at, 2)
            a, b = read(pair * 2), read(pair * 2 + 1)
            first = tir.floormod(at, 2).equal(0)
        else:
            pair = tir.floormod(at, half)
            a, b = read(pair), read(pair + half)
            first = at < half
        turned = tir.Select(first, a * c(*row, pair) - b * s(*row, pair), b * c(*row, pair) + a * s(*row, pair))
        return turned if rotated == size else tir.if_then_else(at < rotated, turned, read(at))

    source = t.reshape(t.tensor(x), dims)
    made = t.compute("rotary", [source, t.tensor(cosine), t.tensor(sine)], element, dims, x.dtype)
    return Operand(x.dtype, x.dims, t.reshape(made, x.dims))


def _own(t: Translator, size: Any, batch: Any) -> Any:
    size = t.plain(size)
    return size if isinstance(size, int) and size == 1 else batch


@emits("LayerNorm", "RMSNorm", "AddLayerNormalization", "AddRMSNormalization", domain="planish")
def _dialect_norm(t: Translator, node: ir.Node) -> list[Operand]:
    from planish.runtime.kernels.norms import LayerNorm, RmsNorm

    x, *rest = t.inputs(node)
    assert x is not None
    added = node.op_type.startswith("Add")
    inputs = [t.rows(x)]
    if added:
        residual = rest.pop(0)
        assert residual is not None
        inputs.append(t.rows(t.match(residual, x.dims)))
    inputs += [t.tensor(w) for w in rest if w is not None]
    inputs.append(t.device.number(t, float(attribute(node, "epsilon", 1e-5))))
    keep = added and bool(node.outputs[1].uses() or node.outputs[1].is_graph_output())
    kind = LayerNorm if "Layer" in node.op_type else RmsNorm
    out = (list(inputs[0].ty.shape), x.dtype)
    made = t.call(kind(residual=added, keep_sum=keep), inputs, *[out] * (1 + keep))
    found = made if keep else [made]
    return [Operand(x.dtype, x.dims, t.reshape(var, x.dims)) for var in found]
