"""Matrix products: by weights that are packed at compile time, and of two activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.linear import ACTIVATIONS, COMPUTE_TYPE, LINEAR
from planish.runtime.relax.elementwise import broadcast, elementwise
from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, emits

_BFLOAT16 = int(ir.DataType.BFLOAT16)


def packed(t: Translator, weight: Operand) -> Any:
    """The variable of a weight (K, N) in panels of columns, as the kernel reads it."""
    from planish.runtime.kernels import gemm

    assert weight.array is not None
    key = ("packed", id(weight))
    if key not in t.derived:
        width = gemm.panel_width(t.cpu)
        panels = gemm.pack(np.asarray(weight.array, np.float32), width)
        t.derived[key] = (weight, t.parameter(panels, f"{weight.name or 'weight'}.panels{width}"))
    return t.derived[key][1]


def linear(
    t: Translator,
    x: Any,
    weight: Operand,
    bias: Operand | None,
    activation: str | None = None,
    residual: Any = None,
) -> Any:
    """The variable of ``activation(x W + bias) + residual`` for a matrix `x` of rows."""
    from planish.runtime.kernels import gemm

    rows, columns = x.ty.shape[0], int(weight.dims[1])
    bias = bias or Operand.constant(np.zeros(columns, np.float32), f"no_bias.{columns}")
    template = gemm.Gemm(activation, residual=residual is not None)
    inputs = [x, packed(t, weight), t.tensor(bias)]
    if residual is not None:
        inputs.append(residual)
    return t.call(template, inputs, ((rows, columns), "float32"))


@emits(*LINEAR, domain="planish")
def _linear(t: Translator, node: ir.Node) -> Operand:
    x, weight, *rest = t.inputs(node)
    assert x is not None and weight is not None
    if attribute(node, COMPUTE_TYPE, 1) == _BFLOAT16:
        t.refuse(node, "its product is in bfloat16")
    _require_weight(t, node, weight)
    dims = [*x.dims[:-1], weight.dims[1]]
    if node.op_type == "LinearSwiGLU":
        from planish.runtime.kernels import gemm

        weights = [packed(t, w) for w in (weight, rest[0]) if w is not None]
        rows = t.rows(x)
        made = t.call(gemm.GatedGemm("silu"), [rows, *weights], ((rows.ty.shape[0], weight.dims[1]), "float32"))
    else:
        residual = None
        if node.op_type == "LinearAdd":
            assert rest[1] is not None
            residual = t.rows(t.match(rest[1], dims))
        made = linear(t, t.rows(x), weight, rest[0], ACTIVATIONS[node.op_type], residual)
    return Operand("float32", dims, t.reshape(made, dims))


def _require_weight(t: Translator, node: ir.Node, weight: Operand) -> None:
    if weight.array is None or weight.array.ndim != 2 or weight.array.dtype != np.float32:
        t.refuse(node, "its weight is no constant float32 matrix")


@emits("Gemm")
def _gemm(t: Translator, node: ir.Node) -> Operand:
    a, b, *rest = t.inputs(node)
    assert a is not None and b is not None
    alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
    if attribute(node, "transA", 0):
        a = transposed(t, a)
    if attribute(node, "transB", 0):
        b = transposed(t, b)
    bias = rest[0] if rest else None
    if (
        b.array is not None
        and b.array.dtype == np.float32
        and alpha == 1.0 == beta
        and (bias is None or (bias.array is not None and bias.array.shape == (b.dims[1],)))
    ):
        return Operand("float32", [a.dims[0], b.dims[1]], linear(t, t.tensor(a), b, bias))
    y = product(t, node, a, b)
    scale = t.tir.const(alpha, "float32"), t.tir.const(beta, "float32")
    if bias is None:
        return elementwise(t, "scale", [y], lambda v: v * scale[0], "float32")
    return elementwise(t, "scale_add", [y, bias], lambda v, c: v * scale[0] + c * scale[1], "float32")


def transposed(t: Translator, x: Operand) -> Operand:
    """The operand with its last two axes exchanged."""
    axes = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    if x.array is not None:
        return Operand.constant(np.ascontiguousarray(x.array.transpose(axes)), f"{x.name}.t" if x.name else "")
    dims = [x.dims[axis] for axis in axes]
    var = t.compute("transpose", [t.tensor(x)], lambda i, v: v(*[i[axis] for axis in axes]), dims, x.dtype)
    return Operand(x.dtype, dims, var)


@emits("MatMul")
def _matmul(t: Translator, node: ir.Node) -> Operand:
    a, b = t.inputs(node)
    assert a is not None and b is not None
    if b.array is not None and b.rank == 2 and b.dtype == "float32" and a.rank >= 2:
        dims = [*a.dims[:-1], b.dims[1]]
        return Operand("float32", dims, t.reshape(linear(t, t.rows(a), b, None), dims))
    return product(t, node, a, b)


def product(t: Translator, node: ir.Node, a: Operand, b: Operand) -> Operand:
    """The product of two tensors as in NumPy's matmul."""
    from planish.runtime.kernels.batched import BatchedMatMul

    if a.dtype != "float32" or b.dtype != "float32":
        t.refuse(node, f"it multiplies {a.dtype} by {b.dtype}; it takes float32")
    if not a.rank or not b.rank:
        t.refuse(node, "it multiplies a scalar")
    left = a if a.rank > 1 else _view(t, a, [1, a.dims[0]])
    right = b if b.rank > 1 else _view(t, b, [b.dims[0], 1])
    outer = [Operand("float32", o.dims[:-2], t) for o in (left, right)]
    dims, _ = broadcast(t, outer) if outer[0].rank or outer[1].rank else ([], [])
    count = t.product(dims)
    flat = [_batched(t, o, dims, count) for o in (left, right)]
    shape = (count, left.dims[-2], right.dims[-1])
    made = t.call(BatchedMatMul(), flat, (shape, "float32"))
    result = [*dims, *([left.dims[-2]] if a.rank > 1 else []), *([right.dims[-1]] if b.rank > 1 else [])]
    return Operand("float32", result, t.reshape(made, result))


def _batched(t: Translator, x: Operand, dims: Sequence[Any], count: Any) -> Any:
    """The variable of an operand as a stack of matrices, one for each of the broadcast; or one for all."""
    own, (rows, columns) = x.dims[:-2], x.dims[-2:]
    if all(isinstance(d, int) and d == 1 for d in own):
        return t.reshape(t.tensor(x), [1, rows, columns])
    if len(own) != len(dims) or not all(t.equal(a, b) for a, b in zip(own, dims, strict=True)):
        ones = [isinstance(d, int) and d == 1 for d in own]
        shift = len(dims) - len(own)
        var = t.compute(
            "expand",
            [t.tensor(x)],
            lambda i, v: v(*[0 if one else i[axis + shift] for axis, one in enumerate(ones)], i[-2], i[-1]),
            [*dims, rows, columns],
            x.dtype,
        )
        x = Operand(x.dtype, [*dims, rows, columns], var)
    return t.reshape(t.tensor(x), [count, rows, columns])


def _view(t: Translator, x: Operand, dims: Sequence[Any]) -> Operand:
    return Operand(x.dtype, list(dims), t.reshape(t.tensor(x), dims))
