"""The kernels of planish::FlashAttention and its relatives, and of planish::BlockSparseAttention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.graphs import dims_of
from planish.ir.ops.block_sparse_attention import BLOCK
from planish.ir.ops.flash_attention import CAUSAL, Q_HEADS
from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    from planish.runtime.kernels.template import Template

_SPARSE, _PAST, _KEYS = "BlockSparseAttention", "FlashAttentionPast", "FlashAttentionKeyMask"
_MASKS = {"FlashAttentionBias": "float", "FlashAttentionMask": "bool", _KEYS: "bool"}
_BYTES = {"none": 0, "bool": 1, "float": 4}
_FLOAT, _BOOL, _INT = (int(t) for t in (ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT32))


@dataclass(frozen=True)
class AttentionKernel(OpKernel):
    """Attention for the head sizes that the nodes have; all other sizes are free.

    Attributes:
        forms: (head size, causal, block size or 0), one for each template.
    """

    source: ClassVar[str] = "attention.c"
    setup: ClassVar[str] = "planish_attention"

    forms: tuple[tuple[int, bool, int], ...]

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> AttentionKernel | None:
        forms = {cls._form(op, node) for node in nodes}
        found = {form for form in forms if form is not None}
        return cls(op, tuple(sorted(found))) if found == forms else None

    @staticmethod
    def _form(op: str, node: ir.Node) -> tuple[int, bool, int] | None:
        """None where the head size is unknown, or nothing can be compiled for the block size."""
        q = node.inputs[0]
        dims = None if q is None else dims_of(q)
        heads = node.attributes.get_int(Q_HEADS, 0)
        width = dims[-1] if dims else None
        if not isinstance(width, int) or heads < 1 or width < 1 or width % heads:
            return None
        block = node.attributes.get_int(BLOCK, 64) if op == _SPARSE else 0
        if op == _SPARSE and (block < 16 or block % 16):
            return None
        return width // heads, op == _PAST or bool(node.attributes.get_int(CAUSAL, 0)), block

    def templates(self) -> list[Template]:
        return [self._template(*form) for form in self.forms]

    def _template(self, head_size: int, causal: bool, block: int) -> Template:
        from planish.runtime.kernels.attention import BlockSparseFlashAttention, FlashAttention

        if self.op == _SPARSE:
            return BlockSparseFlashAttention(head_size, causal, block)
        return FlashAttention(head_size, causal, _MASKS.get(self.op, "none"))

    def declaration(self) -> str:
        mask, sparse = _MASKS.get(self.op, "none"), self.op == _SPARSE
        masks = {"none": [], "float": [_FLOAT], "bool": [_BOOL]}
        inputs = [_FLOAT] * 3 + masks[mask] + [_INT] * 3 * sparse
        forms = ", ".join(
            f"{{{form[0]}, {int(form[1])}, {form[2]}, __tvm_ffi_{self._template(*form).symbol}}}" for form in self.forms
        )
        return "\n".join(
            [
                types_declaration(self.op, [*inputs, _FLOAT]),
                f"static const attention_form forms_{self.op}[] = {{{forms}, {{0}}}};",
                f'static attention_op op_{self.op} = {{{{{{0}}, "{self.op}", {len(inputs)}, 1, types_{self.op}}}, '
                f"{_BYTES[mask]}, {int(self.op == _KEYS)}, {int(self.op == _PAST)}, {int(sparse)}, forms_{self.op}}};",
            ]
        )
