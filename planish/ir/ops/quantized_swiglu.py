"""planish::QuantizedSwiGLU4 and 8: the gated unit of Llama's feed-forward blocks over two weights in 4 or 8 bits.

A step of decoding then reads both weights in one kernel, which writes what the last product reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.body import FunctionBody
from planish.ir.ops.quantized_linear import BLOCK, QUANTIZED_LINEAR, product, quantized_linear
from planish.ir.ops.swiglu import SWIGLU

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_UINT8 = frozenset({ir.DataType.UINT8})
_PARTS = ("gate", "up")


def quantized_swiglu(bits: int) -> str:
    """The name of the operator for weights of `bits`."""
    return f"QuantizedSwiGLU{bits}"


def _op(bits: int) -> DialectOp:
    linear = QUANTIZED_LINEAR[quantized_linear(bits, False, False)]
    operands = [Operand("x", _FLOATS)]
    for part in _PARTS:
        operands += [Operand(f"{part}_codes", _UINT8, "C"), Operand(f"{part}_scales", _FLOATS)]
    schema = Schema(
        quantized_swiglu(bits),
        tuple(operands),
        (Operand("y", _FLOATS),),
        (Attribute(BLOCK, ir.AttributeType.INT, required=True),),
        f"y = silu(x gateᵀ) * x upᵀ; both weights as of {linear.name}, of one shape.",
    )

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        (gate,), (up,) = (linear.infer([inputs[0], *inputs[i : i + 2]], attributes) for i in (1, 3))
        if gate.dims is None or up.dims is None:
            return [gate]
        columns = same_dim(gate.dims[-1], up.dims[-1], "rows of the two weights")
        return [TensorInfo(gate.dtype, (*gate.dims[:-1], columns))]

    def body(opset: int) -> ir.Function:
        made = FunctionBody(schema, opset)
        gate, up = (product(made, made.values[f"{p}_codes"], made.values[f"{p}_scales"], bits) for p in _PARTS)
        silu = made.add("Mul", gate, made.add("Sigmoid", gate))
        return made.function(made.add("Mul", silu, up))

    def reference(x: np.ndarray, *weights: np.ndarray, block_size: int) -> tuple[np.ndarray, ...]:
        (gate,), (up,) = (linear.reference(x, *weights[i : i + 2], block_size=block_size) for i in (0, 2))
        return SWIGLU.reference(gate, up)

    def flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], _: Mapping[str, Any]) -> int:
        x = inputs[0]
        assert x is not None
        return outputs[0].elements * (4 * x.sizes[-1] + 5)

    return DialectOp(schema, infer, body, reference, flops)


QUANTIZED_SWIGLU = {op.name: op for op in (_op(4), _op(8))}
