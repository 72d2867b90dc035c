"""The kernels of planish::LayerNorm and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.runtime.kernels.template import Template


@dataclass(frozen=True)
class NormKernel(OpKernel):
    """Normalization over the last axis, of any width, with any epsilon."""

    source: ClassVar[str] = "norms.c"
    setup: ClassVar[str] = "planish_norm"

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> NormKernel:
        return cls(op)

    @property
    def _added(self) -> bool:
        return self.op.startswith("Add")

    @property
    def _layer(self) -> bool:
        return "Layer" in self.op

    def templates(self) -> list[Template]:
        from planish.runtime.kernels.norms import LayerNorm, RmsNorm

        return [(LayerNorm if self._layer else RmsNorm)(residual=self._added, keep_sum=self._added)]

    def declaration(self) -> str:
        inputs, outputs = 2 + self._added + self._layer, 1 + self._added
        (kernel,) = self.templates()
        return "\n".join(
            [
                types_declaration(self.op, [1] * (inputs + outputs)),
                f'static norm_op op_{self.op} = {{{{{{0}}, "{self.op}", {inputs}, {outputs}, types_{self.op}}}, '
                f"{int(self._added)}, {int(self._layer)}, __tvm_ffi_{kernel.symbol}}};",
            ]
        )
