"""bfloat16: a whole program in the other type of 16 bits, for GPUs from Ampere on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, PassContext, PassResult
from planish.passes.precision.float16 import halve
from planish.passes.registry import register

#: What ONNX Runtime 1.31.1's CUDA provider was seen to run in bfloat16. Others stay float32, such as MaxPool,
#: GlobalAveragePool, BatchNormalization, ConvTranspose, Resize, Pad, Clip, LeakyRelu, CumSum and comparisons.
KERNELS = frozenset(
    (
        *(
            "MatMul",
            "Gemm",
            "Conv",
            "Attention",
            "RotaryEmbedding",
            "LayerNormalization",
            "RMSNormalization",
            "Softmax",
        ),
        *("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Neg", "Abs", "Sqrt", "Exp", "Cos", "Sin", "Where"),
        *("Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "Softplus", "HardSwish", "ReduceMean", "ReduceSum", "AveragePool"),
        *("Identity", "Transpose", "Concat", "Split", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Slice", "Gather"),
        *("Tile", "Flatten", "Trilu"),
    )
)
_FIRST = 80


@register
@dataclass(frozen=True)
class Bfloat16(ApproximatePass):
    """Turns values and weights into bfloat16 from the first product on; a target's ``dtype=bfloat16`` asks for it.

    As `float16`, with the range of float32 and three bits less of the mantissa. On ``ort-cuda``, operators that the
    provider has no kernel for in bfloat16 stay float32.
    """

    name: ClassVar[str] = "bfloat16"
    gives_up: ClassVar[str] = "Values keep 8 of the 24 bits of their mantissas."
    order: ClassVar[int] = 58

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        reason = ""
        if ctx.target.device != "cuda":
            reason = f"target '{ctx.target}' has no form in bfloat16; targets on CUDA have"
        elif ctx.target.capability is not None and ctx.target.capability < _FIRST:
            reason = f"{ctx.target.arch} has no bfloat16, which begins with sm_{_FIRST}; float16 is its type of 16 bits"
        if reason:
            return PassResult(False, 0, [Declined(self.name, program.default_entry, reason)], [reason])
        if ctx.target.runtime == "tvm":
            return halve(program, self.name, ir.DataType.BFLOAT16, steps=True)
        return halve(program, self.name, ir.DataType.BFLOAT16, only=KERNELS)
