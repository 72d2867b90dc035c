"""planish::QuantizedLinear4 and relatives: a product of a few rows with a weight in 4 or 8 bits, scaled by blocks.

=================  =============================================
QuantizedLinear4   x wᵀ, w = (code - 8) · scale
QuantizedLinear8   x wᵀ, w = (code - 128) · scale
…Zeros             w = (code - zero) · scale, a zero for each block
…Bias, …ZerosBias  with a bias added
=================  =============================================

Codes, scales and zeros are laid out as com.microsoft's MatMulNBits has them: one set of initializers serves both
operators. An operator each, since the body of a function has neither optional inputs nor choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.body import FunctionBody

BLOCK = "block_size"
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_UINT8 = frozenset({ir.DataType.UINT8})


def quantized_linear(bits: int, zeros: bool, bias: bool) -> str:
    """The name of the operator for weights of `bits`, with zeros for blocks, and with a bias."""
    return f"QuantizedLinear{bits}{'Zeros' * zeros}{'Bias' * bias}"


def unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of the last axis, of which 4-bit ones are two in a byte, the earlier one in the low half."""
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def _op(bits: int, zeros: bool, bias: bool) -> DialectOp:
    name = quantized_linear(bits, zeros, bias)
    operands = [Operand("x", _FLOATS), Operand("codes", _UINT8, "C"), Operand("scales", _FLOATS)]
    operands += [Operand("zeros", _UINT8, "C")] * zeros + [Operand("bias", _FLOATS)] * bias
    schema = Schema(
        name,
        tuple(operands),
        (Operand("y", _FLOATS),),
        (Attribute(BLOCK, ir.AttributeType.INT, required=True),),
        f"y = x wᵀ{' + bias' * bias}; x (…, K), codes (N, blocks, {BLOCK} · {bits} / 8), scales (N, blocks) or flat"
        f"{', zeros (N, bytes) or flat' * zeros}; the last block is padded.",
    )

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        known = [item or TensorInfo() for item in inputs]
        block, (x, codes) = int(attributes[BLOCK]), known[:2]
        dtype = next((item.dtype for item in (x, known[2], *known[4:]) if item.dtype is not None), None)
        if block < 1 or block * bits % 8:
            raise InferenceError(f"{BLOCK} is {block}; {bits}-bit codes of a block must fill bytes")
        columns = None
        if codes.dims is not None:
            if len(codes.dims) != 3:
                raise InferenceError(f"codes have rank {len(codes.dims)}; they must have 3")
            columns = codes.dims[0]
            same_dim(codes.dims[2], block * bits // 8, "bytes of a block")
        if bias and known[-1].dims is not None:
            columns = same_dim(columns, known[-1].dims[0], "rows of codes and the bias")
        if x.dims is None:
            return [TensorInfo(dtype)]
        if not x.dims:
            raise InferenceError("x has rank 0; it must have columns")
        depth, blocks = x.dims[-1], None if codes.dims is None else codes.dims[1]
        if isinstance(depth, int) and isinstance(blocks, int) and -(-depth // block) != blocks:
            raise InferenceError(f"x has {depth} columns and codes {blocks} blocks of {block}")
        return [TensorInfo(dtype, (*x.dims[:-1], columns))]

    def body(opset: int) -> ir.Function:
        return _body(schema, opset, bits, zeros, bias)

    def reference(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, *others: np.ndarray,
                  block_size: int) -> tuple[np.ndarray, ...]:  # fmt: skip
        n, blocks = codes.shape[:2]
        middle: Any = np.float64(1 << (bits - 1))
        if zeros:
            middle = unpack(others[0].astype(np.uint8).reshape(n, -1), bits)[:, :blocks, None].astype(np.float64)
        numbers = unpack(codes.astype(np.uint8), bits).astype(np.float64) - middle
        weight = (numbers * np.asarray(scales, np.float64).reshape(n, blocks, 1)).reshape(n, blocks * block_size)
        y = np.asarray(x, np.float64) @ weight[:, : x.shape[-1]].T
        return (y + np.asarray(others[-1], np.float64) if bias else y,)

    return DialectOp(schema, infer, body, reference, _flops)


def _body(schema: Schema, opset: int, bits: int, zeros: bool, bias: bool) -> ir.Function:
    made = FunctionBody(schema, opset)
    codes, scales = made.values["codes"], made.values["scales"]
    y = product(made, codes, scales, bits, made.values["zeros"] if zeros else None)
    return made.function(made.add("Add", y, made.values["bias"]) if bias else y)


def product(
    made: FunctionBody, codes: ir.Value, scales: ir.Value, bits: int, zeros: ir.Value | None = None
) -> ir.Value:
    """In a body: x wᵀ."""
    x = made.values["x"]
    rows, blocks = made.size(codes, 0), made.size(codes, 1)
    if zeros is not None:
        packed = made.add("Reshape", zeros, made.shape(rows, made.ints(1), made.ints(-1)))
        each = made.add("Transpose", _numbers(made, packed, bits), perm=[0, 2, 1])
        middle = made.cut(each, made.ints(0), blocks)
    else:
        middle = made.add("CastLike", made.floating(float(1 << (bits - 1))), x)
    numbers = made.add("Sub", _numbers(made, codes, bits), middle)
    weight = made.add("Mul", numbers, made.add("Reshape", scales, made.shape(rows, blocks, made.ints(1))))
    flat = made.add("Reshape", weight, made.shape(rows, made.ints(-1)))
    weight = made.cut(flat, made.ints(0), made.add("Shape", x, start=-1))
    return made.add("MatMul", x, made.add("Transpose", weight, perm=[1, 0]))


def _numbers(made: FunctionBody, packed: ir.Value, bits: int) -> ir.Value:
    """Codes (a, b, bytes) one by one, as x's dtype."""
    if bits == 4:
        low, shift = (made.add("CastLike", made.add("Constant", value_int=n), packed) for n in (15, 4))
        halves = made.add("BitwiseAnd", packed, low), made.add("BitShift", packed, shift, direction="RIGHT")
        pairs = made.add("Concat", *(made.add("Unsqueeze", half, made.ints(-1)) for half in halves), axis=-1)
        packed = made.add("Reshape", pairs, made.ints(0, 0, -1))
    return made.add("CastLike", packed, made.values["x"])


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], _: Mapping[str, Any]) -> int:
    x = inputs[0]
    assert x is not None
    return 2 * outputs[0].elements * x.sizes[-1]


QUANTIZED_LINEAR = {
    op.name: op
    for bits in (4, 8)
    for zeros in (False, True)
    for bias in (False, True)
    for op in (_op(bits, zeros, bias),)
}
