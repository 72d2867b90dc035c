"""Matrix products: by weights that are packed at compile time, and of two activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, is_op
from planish.ir.ops.linear import ACTIVATIONS, COMPUTE_TYPE, LINEAR
from planish.runtime.relax.elementwise import broadcast, elementwise
from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, emits

_BFLOAT16 = int(ir.DataType.BFLOAT16)


@emits(*LINEAR, domain="planish")
def _linear(t: Translator, node: ir.Node) -> Operand:
    x, weight, *rest = t.inputs(node)
    assert x is not None and weight is not None
    if attribute(node, COMPUTE_TYPE, 1) == _BFLOAT16:
        t.refuse(node, "its product is in bfloat16")
    t.require_float(node, x)
    _require_weight(t, node, weight, x.dtype)
    dims = [*x.dims[:-1], weight.dims[1]]
    if node.op_type == "LinearSwiGLU":
        assert rest[0] is not None
        made = t.device.gated(t, t.rows(x), weight, rest[0])
    else:
        residual = None
        if node.op_type == "LinearAdd":
            assert rest[1] is not None
            residual = t.rows(t.match(rest[1], dims))
        made = t.device.linear(t, t.rows(x), weight, rest[0], ACTIVATIONS[node.op_type], residual)
    return Operand(x.dtype, dims, t.reshape(made, dims))


def _require_weight(t: Translator, node: ir.Node, weight: Operand, dtype: str) -> None:
    if weight.array is None or weight.array.ndim != 2 or weight.dtype != dtype:
        t.refuse(node, f"its weight is no constant {dtype} matrix")


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
        and b.dtype == a.dtype in t.device.floats
        and alpha == 1.0 == beta
        and (bias is None or (bias.array is not None and bias.array.shape == (b.dims[1],)))
    ):
        return Operand(a.dtype, [a.dims[0], b.dims[1]], t.device.linear(t, t.tensor(a), b, bias, None, None))
    y = product(t, node, a, b)
    scale = t.tir.const(alpha, y.dtype), t.tir.const(beta, y.dtype)
    if bias is None:
        return elementwise(t, "scale", [y], lambda v: v * scale[0], y.dtype)
    return elementwise(t, "scale_add", [y, bias], lambda v, c: v * scale[0] + c * scale[1], y.dtype)


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
    if b.array is not None and b.rank == 2 and b.dtype == a.dtype in t.device.floats and a.rank >= 2:
        dims = [*a.dims[:-1], b.dims[1]]
        bias, residual, last = _added(t, node, dims, b.dtype)
        rows = None if residual is None else t.rows(residual)
        made = Operand(a.dtype, dims, t.reshape(t.device.linear(t, t.rows(a), b, bias, None, rows), dims))
        t.values[last] = made
        return made
    return product(t, node, a, b)


def _added(
    t: Translator, node: ir.Node, dims: Sequence[Any], dtype: str
) -> tuple[Operand | None, Operand | None, ir.Value]:
    """The bias and the residual that Adds behind a product, which alone read it, add to it; and the last value."""
    value, bias, residual = node.outputs[0], None, None
    for _ in range(2):
        uses = list(value.uses())
        add = uses[0].node if len(uses) == 1 else None
        if add is None or not is_op(add, "Add") or value.is_graph_output():
            break
        other = add.inputs[1 - uses[0].idx]
        if other is None or (other not in t.values and constant_tensor(other) is None):
            break  # it is not computed yet
        added = t.get(other)
        if added.dtype != dtype or residual is not None:
            break
        if bias is None and added.array is not None and added.array.shape == (dims[-1],):
            bias = added
        elif added.rank == len(dims) and all(t.equal(p, q) for p, q in zip(added.dims, dims, strict=True)):
            residual = added
        else:
            break
        t.done.add(add)
        value = add.outputs[0]
    return bias, residual, value


def product(t: Translator, node: ir.Node, a: Operand, b: Operand) -> Operand:
    """The product of two tensors as in NumPy's matmul."""
    from planish.runtime.kernels.batched import BatchedMatMul

    t.require_float(node, a, b)
    if not a.rank or not b.rank:
        t.refuse(node, "it multiplies a scalar")
    left = a if a.rank > 1 else _view(t, a, [1, a.dims[0]])
    right = b if b.rank > 1 else _view(t, b, [b.dims[0], 1])
    outer = [Operand(a.dtype, o.dims[:-2], t) for o in (left, right)]
    dims, _ = broadcast(t, outer) if outer[0].rank or outer[1].rank else ([], [])
    count = t.product(dims)
    flat = [_batched(t, o, dims, count) for o in (left, right)]
    shape = (count, left.dims[-2], right.dims[-1])
    made = t.call(BatchedMatMul(), flat, (shape, a.dtype))
    result = [*dims, *([left.dims[-2]] if a.rank > 1 else []), *([right.dims[-1]] if b.rank > 1 else [])]
    return Operand(a.dtype, result, t.reshape(made, result))


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
