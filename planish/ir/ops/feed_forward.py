"""planish::FeedForwardGelu and its relatives: a feed-forward network with its residual, as one operator.

======================  =============================================================
FeedForwardRelu         max(x W + b, 0) V + c + residual
FeedForwardGelu         gelu(x W + b) V + c + residual, with erf
FeedForwardGeluTanh     gelu(x W + b) V + c + residual, with tanh
FeedForwardSilu         silu(x W + b) V + c + residual
FeedForwardQuickGelu    the same with h sigmoid(1.702 h)
FeedForwardSwiGLU       (silu(x W_gate) * (x W_up)) V + c + residual (arXiv:2002.05202)
======================  =============================================================

With `compute_type` bfloat16 the operands of all products are rounded to it, the hidden layer among them, and sums stay
float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import DialectOp, InferenceError, TensorInfo
from planish.ir.ops.linear import (
    ACTIVATIONS,
    COMPUTE_TYPE,
    COMPUTE_TYPES,
    LINEAR,
    LinearBody,
    linear_schema,
    rounded_operand,
)

#: The product with an activation that an operator begins with → the operator.
FUSED = {
    name: name.replace("Linear", "FeedForward") for name in (*(n for n, a in ACTIVATIONS.items() if a), "LinearSwiGLU")
}
_BEHIND = ("out_weight", "out_bias", "residual")


def _feed_forward(first: str) -> DialectOp:
    op, name = LINEAR[first], FUSED[first]
    front = [operand.name for operand in op.schema.inputs]
    doc = f"{op.schema.doc} That is h; then h out_weight (F, N) plus out_bias (N) plus residual (..., N)."
    schema = linear_schema(name, (*front, *_BEHIND), doc)

    def infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
        hidden = op.infer(inputs[: len(front)], attributes)
        return LINEAR["LinearAdd"].infer([hidden[0], *inputs[len(front) :]], attributes)

    def body(opset: int) -> ir.Function:
        made = LinearBody(name, (*front, *_BEHIND), opset)
        if first == "LinearSwiGLU":
            gate = made.activation("silu", made.product("x", "gate_weight"))
            hidden = made.add("Mul", gate, made.product("x", "up_weight"))
        else:
            hidden = made.add("Add", made.product("x", "weight"), made.values["bias"])
            hidden = made.activation(ACTIVATIONS[first], hidden)
        y = made.add("Add", made.product(hidden, "out_weight"), made.values["out_bias"])
        return made.function(made.add("Add", y, made.values["residual"]))

    def reference(*arrays: np.ndarray, compute_type: int = COMPUTE_TYPES[0]) -> tuple[np.ndarray, ...]:
        (hidden,) = op.reference(*arrays[: len(front)], compute_type=compute_type)
        weight, bias, residual = arrays[len(front) :]
        y = rounded_operand(hidden, compute_type) @ rounded_operand(weight, compute_type)
        return (y + bias.astype(np.float64) + residual.astype(np.float64),)

    def flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
        x, second = inputs[0], inputs[len(front)]
        if x is None or second is None:
            raise InferenceError("x and the weights must be there")
        depth, width = second.sizes
        rows = outputs[0].elements // max(width, 1)
        return 2 * rows * depth * (width + x.sizes[-1] * (2 if first == "LinearSwiGLU" else 1))

    return DialectOp(schema, infer, body, reference, flops, min_opset=20)


#: The family, by name.
FEED_FORWARD: dict[str, DialectOp] = {FUSED[first]: _feed_forward(first) for first in FUSED}

__all__ = ["COMPUTE_TYPE", "FEED_FORWARD", "FUSED"]
