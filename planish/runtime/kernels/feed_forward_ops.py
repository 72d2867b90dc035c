"""The kernels of planish::FeedForwardGelu and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.ops import dialect_op
from planish.ir.ops.feed_forward import FUSED
from planish.ir.ops.linear import ACTIVATIONS, COMPUTE_TYPE, COMPUTE_TYPES
from planish.runtime.kernels.linear import form_declaration, packer, stored_as
from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    from planish.runtime.kernels.template import Template

_FLOAT, _BFLOAT16 = COMPUTE_TYPES
_FIRST = {name: first for first, name in FUSED.items()}


@dataclass(frozen=True)
class FeedForwardKernel(OpKernel):
    """Both products of a feed-forward network, in bfloat16.

    Attributes:
        stored: dtypes of the weights as they are stored, as ONNX counts dtypes.
    """

    source: ClassVar[str] = "feed_forward.c"
    needs: ClassVar[tuple[str, ...]] = ("linear.c",)
    setup: ClassVar[str] = "planish_feed_forward"

    stored: tuple[int, ...]

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> FeedForwardKernel | None:
        """None where a node computes in float32."""
        if any(node.attributes.get_int(COMPUTE_TYPE, _FLOAT) != _BFLOAT16 for node in nodes):
            return None
        return cls(op, tuple(sorted({stored_as(node) for node in nodes})))

    @property
    def _gated(self) -> bool:
        return self.op == FUSED["LinearSwiGLU"]

    def templates(self) -> list[Template]:
        return [self._product(), *(packer(_BFLOAT16, stored) for stored in self.stored)]

    def _product(self) -> Template:
        from planish.runtime.kernels.amx_feed_forward import FeedForward

        activation = "silu" if self._gated else ACTIVATIONS[_FIRST[self.op]]
        assert activation is not None
        return FeedForward(activation, self._gated)

    def variables(self) -> tuple[str, ...]:
        return tuple(f"op_{self.op}_{stored}" for stored in self.stored)

    def declaration(self) -> str:
        operands = dialect_op(self.op).schema.inputs
        lines = []
        for stored in self.stored:
            name = f"{self.op}_{stored}"
            form = form_declaration(_BFLOAT16, stored, self._product(), packer(_BFLOAT16, stored))
            base = f'{{{{0}}, "{self.op}", {len(operands)}, 1, types_{name}}}'
            lines += [
                types_declaration(name, [*(stored if o.name.endswith("weight") else _FLOAT for o in operands), _FLOAT]),
                f"static const linear_form form_{name} = {form};",
                f"static feed_forward_op op_{name} = {{{base}, {int(self._gated)}, &form_{name}}};",
            ]
        return "\n".join(lines)
