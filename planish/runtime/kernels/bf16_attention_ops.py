"""The kernels of planish::FlashAttentionBf16 and FlashAttentionKeyMaskBf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.graphs import dims_of
from planish.ir.ops.flash_attention import CAUSAL, Q_HEADS
from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    from planish.runtime.kernels.template import Template

_FLOAT, _BOOL = int(ir.DataType.FLOAT), int(ir.DataType.BOOL)


@dataclass(frozen=True)
class Bf16AttentionKernel(OpKernel):
    """Attention for the head sizes that the nodes have; all other sizes are free.

    Attributes:
        forms: (head size, causal), one for each template.
    """

    source: ClassVar[str] = "attention.c"
    setup: ClassVar[str] = "planish_attention"

    forms: tuple[tuple[int, bool], ...]

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> Bf16AttentionKernel | None:
        forms = {_form(node) for node in nodes}
        found = {form for form in forms if form is not None}
        return cls(op, tuple(sorted(found))) if found == forms else None

    def templates(self) -> list[Template]:
        from planish.runtime.kernels.amx_attention import FlashAttention

        return [FlashAttention(*form, "bool" if self._masked else "none") for form in self.forms]

    @property
    def _masked(self) -> bool:
        return "KeyMask" in self.op

    def declaration(self) -> str:
        mask = int(self._masked)
        types = [*[_FLOAT] * 3, *[_BOOL] * mask, _FLOAT]
        forms = ", ".join(
            f"{{.head_size = {size}, .causal = {int(causal)}, .call = __tvm_ffi_{template.symbol}}}"
            for (size, causal), template in zip(self.forms, self.templates(), strict=True)
        )
        name = f'{{{{0}}, "{self.op}", {3 + mask}, 1, types_{self.op}}}'
        return "\n".join(
            [
                types_declaration(self.op, types),
                f"static const attention_form forms_{self.op}[] = {{{forms}, {{0}}}};",
                f"static attention_op op_{self.op} = {{.base = {name}, .mask = {mask}, .keys = {mask}, "
                f".forms = forms_{self.op}}};",
            ]
        )


def _form(node: ir.Node) -> tuple[int, bool] | None:
    """None where the head size is unknown."""
    q = node.inputs[0]
    dims = None if q is None else dims_of(q)
    heads = node.attributes.get_int(Q_HEADS, 0)
    width = dims[-1] if dims else None
    if not isinstance(width, int) or heads < 1 or width < 1 or width % heads:
        return None
    return width // heads, bool(node.attributes.get_int(CAUSAL, 0))
