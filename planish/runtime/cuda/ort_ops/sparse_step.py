"""Steps over a cache in float16 that read the blocks of a list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from planish.ir.graphs import dims_of
from planish.runtime.cuda.ort_ops.family import FLOAT16, INT32, Code, types

if TYPE_CHECKING:
    import onnx_ir as ir

_SIZES = (64, 128)
_TILE = 64


class SparseStep:
    """BlockSparseStep; a form is the size of heads."""

    native = "cuda_sparse_step"
    operators = frozenset({"BlockSparseStep"})

    def form(self, node: ir.Node) -> int | None:
        """The size of heads, 64 or 128."""
        if any(value is None or value.dtype is None or int(value.dtype) != FLOAT16 for value in node.inputs[:5]):
            return None
        past = dims_of(node.inputs[3])
        if past is None or past[-1] not in _SIZES or node.attributes.get_int("block_size", _TILE) % _TILE:
            return None
        return int(past[-1] or 0)

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """What writes a token, and what attends."""
        macros = {"ELEMENT_BF16": 0, "SHARED": 1, "BEYOND": 1}
        decode = [
            Code(f"step_{size}", "attention_decode.cu", tuple(sorted((macros | {"HEAD": size}).items())))
            for size in forms
        ]
        return [Code("step_append", "step_append.cu", ()), *decode]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As cuda_sparse_step.h has it; shared memory as attention_decode.cu computes it."""
        table, base = types(op, [FLOAT16] * 5 + [INT32] * 4, [FLOAT16] * 3)
        rows = []
        for size in forms:
            shared = [2 * stages * 2 * _TILE * size for stages in (1, 2, 2)]
            rows.append(f'  {{{size}, {{"attention_decode", code_step_{size}, {", ".join(map(str, shared))}}}}},')
        return [
            table,
            f"static const cuda_sparse_step_form forms_{op}[] = {{", *rows, "  {0}};",
            f"static cuda_sparse_step_op op_{op} = {{{base}, forms_{op}, "
            '{"step_append", code_step_append, 0, 0, 0}};',
        ]  # fmt: skip
