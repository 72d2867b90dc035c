"""Attention in float16, dense and over lists of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from planish.ir.graphs import dims_of
from planish.runtime.cuda.ort_ops.family import FLOAT16, INT32, Code, types

if TYPE_CHECKING:
    import onnx_ir as ir

#: Sizes of heads that there are kernels for.
SIZES = (64, 128)
_TILE = 64


class Attention:
    """FlashAttention and BlockSparseAttention; a form is the size of heads."""

    native = "cuda_attention"
    operators = frozenset({"FlashAttention", "BlockSparseAttention"})

    def form(self, node: ir.Node) -> int | None:
        """The size of heads, 64 or 128."""
        if any(value is None or value.dtype is None or int(value.dtype) != FLOAT16 for value in node.inputs[:3]):
            return None
        q, k = (dims_of(value) for value in node.inputs[:2])  # type: ignore[arg-type]
        heads = node.attributes.get_int("q_num_heads", 1)
        if q is None or k is None or not isinstance(q[-1], int) or q[-1] % heads:
            return None
        if node.op_type == "FlashAttention" and bool(node.attributes.get_int("is_causal", 0)) and q[1] != k[1]:
            return None
        if node.op_type == "BlockSparseAttention" and node.attributes.get_int("block_size", 64) % _TILE:
            return None
        size = q[-1] // heads
        return size if size in SIZES else None

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """By 64 and by 128 queries of a thread block, and for one query."""
        return [code for size in forms for code in _codes(size)]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As cuda_attention.h has it."""
        lists = int(op == "BlockSparseAttention")
        table, base = types(op, [FLOAT16] * 3 + [INT32] * 3 * lists, [FLOAT16])
        rows = [
            f"  {{{size}, {_entry('one', size, 1)}, {_entry('two', size, 2)}, {_entry('decode', size, 0)}}},"
            for size in forms
        ]
        return [
            table,
            f"static const cuda_attention_form forms_{op}[] = {{", *rows, "  {0}};",
            f"static cuda_attention_op op_{op} = {{{base}, {lists}, forms_{op}}};",
        ]  # fmt: skip


def _codes(size: int) -> list[Code]:
    shared = {"HEAD": size, "ELEMENT_BF16": 0}
    forms = {
        "one": ("attention.cu", shared | {"BIAS": 0, "GROUPS": 1}),
        "two": ("attention.cu", shared | {"BIAS": 0, "GROUPS": 2}),
        "decode": ("attention_decode.cu", shared | {"SHARED": 1}),
    }
    return [Code(f"{name}_{size}", source, tuple(sorted(macros.items()))) for name, (source, macros) in forms.items()]


def _entry(label: str, size: int, groups: int) -> str:
    """A form with the shared memory that it has on Turing, Ampere and Hopper, as its source computes it."""
    name = "attention" if groups else "attention_decode"
    row = 2 * _TILE * size
    shared = [(groups + 2 * n) * row + 64 if groups else 2 * min(n, 2) * row for n in (1, 2, 3)]
    return f'{{"{name}", code_{label}_{size}, {", ".join(map(str, shared))}}}'
