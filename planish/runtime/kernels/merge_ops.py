"""The kernel of planish::MergeTokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.runtime.kernels.template import Template

_FLOAT, _INT64 = 1, 7


@dataclass(frozen=True)
class MergeKernel(OpKernel):
    """Merging of any number of tokens, of any width."""

    source: ClassVar[str] = "merge.c"
    setup: ClassVar[str] = "planish_merge"

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> MergeKernel:
        return cls(op)

    def templates(self) -> list[Template]:
        from planish.runtime.kernels.token_matching import TokenDirections, TokenScores
        from planish.runtime.kernels.traversal import Aggregate

        return [TokenDirections(), TokenScores(), Aggregate(reduce="sum", scale="edge")]

    def declaration(self) -> str:
        functions = ", ".join(f"__tvm_ffi_{template.symbol}" for template in self.templates())
        return "\n".join(
            [
                types_declaration(self.op, [_FLOAT, _FLOAT, _FLOAT, _FLOAT, _FLOAT, _INT64]),
                f'static merge_op op_{self.op} = {{{{{{0}}, "{self.op}", 3, 3, types_{self.op}}}, {functions}}};',
            ]
        )
