"""Attention in float16, dense and over lists of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from planish.ir.block_sparsity.overlap import worth_together
from planish.ir.graphs import dims_of
from planish.runtime.cuda.ort_ops.family import FLOAT16, INT32, Code, types

#: Sizes of heads that there are kernels for.
SIZES = (64, 128)
_TILE = 64
#: Label, as cuda_attention.h has them in order → source and macros.
_FORMS: dict[str, tuple[str, dict[str, int]]] = {
    "one": ("attention.cu", {"BIAS": 0, "GROUPS": 1}),
    "two": ("attention.cu", {"BIAS": 0, "GROUPS": 2}),
    "apart": ("attention_hopper.cu", {"BIAS": 0, "LISTS": 0}),
    "decode": ("attention_decode.cu", {"SHARED": 1}),
}
_LISTED: dict[str, tuple[str, dict[str, int]]] = _FORMS | {"apart": ("attention_hopper.cu", {"BIAS": 0, "LISTS": 1})}


class Attention:
    """FlashAttention and BlockSparseAttention; a form is the size of heads, and whether lists are nearly alike."""

    native = "cuda_attention"
    operators = frozenset({"FlashAttention", "BlockSparseAttention"})

    def form(self, node: ir.Node) -> tuple[int, bool] | None:
        """The size of heads, 64 or 128, and whether two tiles of queries are worth walking together."""
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
        return (size, _together(node)) if size in SIZES else None

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """By 64 and by 128 queries of a thread block, by warp groups with tasks of their own, and for one query."""
        sizes = sorted({size for size, _ in forms})
        return [_code(label, size, op == "BlockSparseAttention") for size in sizes for label in _FORMS]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As cuda_attention.h has it."""
        lists = op == "BlockSparseAttention"
        sizes, together = sorted({size for size, _ in forms}), all(alike for _, alike in forms)
        table, base = types(op, [FLOAT16] * 3 + [INT32] * 3 * lists, [FLOAT16])
        rows = [f"  {{{size}, {', '.join(_entry(label, size, lists) for label in _FORMS)}}}," for size in sizes]
        return [
            table,
            f"static const cuda_attention_form forms_{op}[] = {{", *rows, "  {0}};",
            f"static cuda_attention_op op_{op} = {{{base}, {int(lists)}, {int(together)}, forms_{op}}};",
        ]  # fmt: skip


def _together(node: ir.Node) -> bool:
    """Whether neighbouring tiles have nearly the same lists."""
    if node.op_type == "FlashAttention" or node.attributes.get_int("block_size", _TILE) % (2 * _TILE) == 0:
        return True
    indptr, indices = (None if value is None else ir.convenience.get_const_tensor(value) for value in node.inputs[3:5])
    return indptr is not None and indices is not None and worth_together(indptr.numpy(), indices.numpy())


def _code(label: str, size: int, lists: bool) -> Code:
    source, macros = (_LISTED if lists else _FORMS)[label]
    defines = {"HEAD": size, "ELEMENT_BF16": 0} | macros
    return Code(_label(label, size, lists), source, tuple(sorted(defines.items())))


def _label(label: str, size: int, lists: bool) -> str:
    return f"{'lists' if lists and label == 'apart' else label}_{size}"


def _entry(label: str, size: int, lists: bool) -> str:
    """A form with the shared memory that it has on Turing, Ampere and Hopper, as launch_attention.h computes it."""
    row, groups = 2 * _TILE * size, _FORMS[label][1].get("GROUPS", 0)
    shared = [(groups + 2 * n) * row + 64 if groups else 2 * min(n, 2) * row for n in (1, 2, 3)]
    if label == "apart":
        shared = [0, 0, ((3 if size == _TILE and not lists else 2) + 8) * row + 128]
    name = "attention_decode" if label == "decode" else "attention"
    return f'{{"{name}", code_{_label(label, size, lists)}, {", ".join(map(str, shared))}}}'
