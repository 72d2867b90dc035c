"""Products of a few rows with weights in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from planish.ir.errors import UnsupportedError
from planish.ir.graphs import dims_of
from planish.ir.ops.quantized_linear import BLOCK, QUANTIZED_LINEAR
from planish.ir.ops.quantized_swiglu import QUANTIZED_SWIGLU
from planish.runtime.cuda.ort_ops.family import FLOAT16, Code, types
from planish.runtime.cuda.quantized_gemv import kernel_macros, launch_plan

if TYPE_CHECKING:
    import onnx_ir as ir

_UINT8 = 2


class QuantizedLinear:
    """planish::QuantizedLinear4, QuantizedSwiGLU4 and relatives: one form, a kernel for few rows and one for more."""

    native = "cuda_gemv"
    operators = frozenset((*QUANTIZED_LINEAR, *QUANTIZED_SWIGLU))

    def form(self, node: ir.Node) -> int | None:
        """0 in float16, of sizes that are read 16 bytes at a time."""
        kinds = [None if value is None or value.dtype is None else int(value.dtype) for value in node.inputs]
        dims = dims_of(node.inputs[0]) if node.inputs[0] is not None else None
        if kinds != _kinds(node.op_type) or not dims or not isinstance(dims[-1], int):
            return None
        try:
            launch_plan(1, 1, dims[-1], _bits(node.op_type), node.attributes.get_int(BLOCK, 0))
        except UnsupportedError:
            return None
        return 0

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """For one or two rows, and for up to eight."""
        return [Code(_label(op, few), "quantized_gemv.cu", _macros(op, few)) for few in (True, False)]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As cuda_gemv.h has it."""
        table, base = types(op, _kinds(op), [FLOAT16])
        codes = ", ".join(f'{{"quantized_gemv", code_{_label(op, few)}, 0, 0, 0}}' for few in (True, False))
        how = f"{_bits(op)}, {int(_zeros(op))}, {int(_bias(op))}, {int(_gated(op))}"
        return [table, f"static cuda_gemv_op op_{op} = {{{base}, {how}, {codes}}};"]


def _bits(op: str) -> int:
    return 4 if "4" in op else 8


def _zeros(op: str) -> bool:
    return "Zeros" in op


def _bias(op: str) -> bool:
    return op.endswith("Bias")


def _gated(op: str) -> bool:
    return op in QUANTIZED_SWIGLU


def _macros(op: str, few: bool) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(kernel_macros(_bits(op), few, zeros=_zeros(op), gated=_gated(op)).items()))


def _kinds(op: str) -> list[int]:
    if _gated(op):
        return [FLOAT16, *(_UINT8, FLOAT16) * 2]
    return [FLOAT16, _UINT8, FLOAT16, *[_UINT8] * _zeros(op), *[FLOAT16] * _bias(op)]


def _label(op: str, few: bool) -> str:
    return f"gemv{_bits(op)}{'_zeros' * _zeros(op)}{'_gated' * _gated(op)}_{'few' if few else 'many'}"
