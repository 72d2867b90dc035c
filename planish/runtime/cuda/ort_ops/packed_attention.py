"""Attention in float16 that sees every key: over a packed product, and with a number for each key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from planish.ir.graphs import dims_of
from planish.runtime.cuda.ort_ops.attention import SIZES
from planish.runtime.cuda.ort_ops.family import FLOAT, FLOAT16, Code, types

if TYPE_CHECKING:
    import onnx_ir as ir

_TILE = 64
_PACKED = ("PackedAttention", "PackedAttentionKeyBias")


class PackedAttention:
    """Heads that each have their own keys and values; a form is the size of heads."""

    native = "cuda_packed_attention"
    operators = frozenset((*_PACKED, "FlashAttentionKeyBias"))

    def form(self, node: ir.Node) -> int | None:
        """The size of heads, 64 or 128."""
        packed = node.op_type in _PACKED
        if any(v is None or v.dtype is None or int(v.dtype) != FLOAT16 for v in node.inputs[: 2 if packed else 3]):
            return None
        dims = dims_of(node.inputs[0]) if node.inputs[0] is not None else None
        heads = node.attributes.get_int("num_heads" if packed else "q_num_heads", 1)
        thirds = 3 if packed else 1
        if dims is None or not isinstance(dims[-1], int) or dims[-1] % (thirds * heads):
            return None
        size = dims[-1] // (thirds * heads)
        return size if size in SIZES else None

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """By 64 and by 128 queries of a thread block."""
        return [_code(op, size, groups) for size in forms for groups in (1, 2)]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As cuda_packed_attention.h has it."""
        packed, biased = op in _PACKED, "Bias" in op
        table, base = types(op, [FLOAT16] * (2 if packed else 3) + [FLOAT] * biased, [FLOAT16])
        rows = [f"  {{{size}, {_entry(op, size, 1)}, {_entry(op, size, 2)}}}," for size in forms]
        return [
            table,
            f"static const cuda_packed_attention_form forms_{op}[] = {{", *rows, "  {0}};",
            f"static cuda_packed_attention_op op_{op} = {{{base}, {int(packed)}, {int(biased)}, forms_{op}}};",
        ]  # fmt: skip


def _ahead(size: int) -> int:
    """Tiles that are on their way on Hopper: two where a multiprocessor has room for them in each of its blocks."""
    return 2 if size == _TILE else 1


def _code(op: str, size: int, groups: int) -> Code:
    biased, packed = int("Bias" in op), int(op in _PACKED)
    macros = {"BIAS": biased, "ELEMENT_BF16": 0, "GROUPS": groups, "HEAD": size, "SHIFT": packed}
    macros |= {"AHEAD": 2} if _ahead(size) > 1 else {}
    label = f"every{'_shift' * packed}{'_bias' * biased}_{groups}_{size}"
    return Code(label, "attention.cu", tuple(sorted(macros.items())))


def _entry(op: str, size: int, groups: int) -> str:
    """A form with the shared memory that it has on Turing, Ampere and Hopper, as attention_shared computes it."""
    tile = 2 * _TILE * size
    shared = [
        (groups + 2 * stages) * tile + 64 + ("Bias" in op) * stages * _TILE * 4 for stages in (1, 2, _ahead(size) + 2)
    ]
    return f'{{"attention", code_{_code(op, size, groups).label}, {", ".join(map(str, shared))}}}'
