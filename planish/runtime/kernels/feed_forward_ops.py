"""The kernels of planish::FeedForwardGelu and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.ops.feed_forward import FUSED
from planish.ir.ops.linear import ACTIVATIONS, COMPUTE_TYPE
from planish.runtime.kernels.linear import form_declaration
from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    from planish.runtime.kernels.template import Template

_BFLOAT16 = int(ir.DataType.BFLOAT16)
_FIRST = {name: first for first, name in FUSED.items()}


@dataclass(frozen=True)
class FeedForwardKernel(OpKernel):
    """Both products of a feed-forward network, in bfloat16."""

    source: ClassVar[str] = "feed_forward.c"
    needs: ClassVar[tuple[str, ...]] = ("linear.c",)
    setup: ClassVar[str] = "planish_feed_forward"

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> FeedForwardKernel | None:
        """None where a node computes in float32."""
        return cls(op) if all(n.attributes.get_int(COMPUTE_TYPE, 1) == _BFLOAT16 for n in nodes) else None

    @property
    def _gated(self) -> bool:
        return self.op == FUSED["LinearSwiGLU"]

    def templates(self) -> list[Template]:
        from planish.runtime.kernels.amx_feed_forward import FeedForward
        from planish.runtime.kernels.amx_gemm import PackWeight

        activation = "silu" if self._gated else ACTIVATIONS[_FIRST[self.op]]
        assert activation is not None
        return [FeedForward(activation, self._gated), PackWeight()]

    def declaration(self) -> str:
        inputs = 6
        name = f'{{{{0}}, "{self.op}", {inputs}, 1, types_{self.op}}}'
        product, pack = self.templates()
        return "\n".join(
            [
                types_declaration(self.op, [1] * (inputs + 1)),
                f"static const linear_form form_{self.op} = {form_declaration(_BFLOAT16, product, pack)};",
                f"static feed_forward_op op_{self.op} = {{{name}, {int(self._gated)}, &form_{self.op}}};",
            ]
        )
