"""The kernels of planish::FlashAttention, BlockSparseAttention, WindowAttention and their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.graphs import dims_of
from planish.ir.ops.block_sparse_attention import BLOCK, BLOCK_SPARSE
from planish.ir.ops.flash_attention import CAUSAL, Q_HEADS
from planish.ir.ops.window_attention import WINDOW_ATTENTION
from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    from planish.runtime.kernels.template import Template

_PAST, _KEYS = "FlashAttentionPast", "KeyMask"
_MASKS = {"FlashAttentionBias": "float", "FlashAttentionMask": "bool"}
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
        block = node.attributes.get_int(BLOCK, 64) if op in BLOCK_SPARSE else 0
        if op in BLOCK_SPARSE and (block < 16 or block % 16):
            return None
        causal = op == _PAST or bool(node.attributes.get_int(CAUSAL, 0))
        return width // heads, causal and op not in WINDOW_ATTENTION, block

    @property
    def _mask(self) -> str:
        return _MASKS.get(self.op, "bool" if self.op.endswith(_KEYS) else "none")

    def templates(self) -> list[Template]:
        return [self._template(*form) for form in self.forms]

    def _template(self, head_size: int, causal: bool, block: int) -> Template:
        from planish.runtime.kernels.attention import FlashAttention
        from planish.runtime.kernels.attention_sparse import BlockSparseFlashAttention
        from planish.runtime.kernels.attention_window import WindowFlashAttention

        keys = self.op.endswith(_KEYS)
        if self.op in BLOCK_SPARSE:
            lse = keys or "Lse" in self.op
            return BlockSparseFlashAttention(head_size, causal, block, keys, "Tiles" in self.op, lse)
        if self.op in WINDOW_ATTENTION:
            return WindowFlashAttention(head_size, keys, lse=keys)
        return FlashAttention(head_size, causal, self._mask)

    def declaration(self) -> str:
        mask, lists, window = self._mask, self.op in BLOCK_SPARSE, self.op in WINDOW_ATTENTION
        tiles, two = lists and "Tiles" in self.op, "Lse" in self.op
        masks = {"none": [], "float": [_FLOAT], "bool": [_BOOL]}
        inputs = [_FLOAT] * 3 + masks[mask] + [_INT] * 3 * lists + [_INT, _BOOL] * tiles
        outputs = [_FLOAT] * (1 + two)
        forms = ", ".join(
            f"{{{form[0]}, {int(form[1])}, {form[2]}, __tvm_ffi_{self._template(*form).symbol}}}" for form in self.forms
        )
        keys = self.op.endswith(_KEYS)
        flags = (keys, self.op == _PAST, lists, tiles, window, two or (keys and (lists or window)))
        return "\n".join(
            [
                types_declaration(self.op, [*inputs, *outputs]),
                f"static const attention_form forms_{self.op}[] = {{{forms}, {{0}}}};",
                f'static attention_op op_{self.op} = {{{{{{0}}, "{self.op}", {len(inputs)}, {len(outputs)}, '
                f"types_{self.op}}}, {_BYTES[mask]}, {', '.join(str(int(f)) for f in flags)}, forms_{self.op}}};",
            ]
        )
