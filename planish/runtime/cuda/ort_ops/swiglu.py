"""The gate of Llama's feed-forward blocks in float16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from planish.runtime.cuda.ort_ops.family import FLOAT16, Code, types

if TYPE_CHECKING:
    import onnx_ir as ir


class SwiGLU:
    """SwiGLU; it has one form."""

    native = "cuda_swiglu"
    operators = frozenset({"SwiGLU"})

    def form(self, node: ir.Node) -> int | None:
        """0 in float16."""
        kinds = {None if value is None or value.dtype is None else int(value.dtype) for value in node.inputs[:2]}
        return 0 if kinds == {FLOAT16} else None

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """Its kernel."""
        return [Code("swiglu", "swiglu.cu", (("ELEMENT_BF16", 0),))]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As cuda_swiglu.h has it."""
        table, base = types(op, [FLOAT16] * 2, [FLOAT16])
        return [table, f'static cuda_swiglu_op op_{op} = {{{base}, {{"swiglu", code_swiglu, 0, 0, 0}}}};']
