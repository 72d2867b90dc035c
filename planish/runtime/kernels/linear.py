"""The kernels of planish::Linear and its relatives."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from planish.ir.ops.linear import ACTIVATIONS, COMPUTE_TYPE, COMPUTE_TYPES, TRANSPOSED
from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    from planish.runtime.kernels.template import Template

_BFLOAT16 = int(ir.DataType.BFLOAT16)
_DL_UINT, _DL_FLOAT = 1, 2  # DLPack's type codes


@dataclass(frozen=True)
class LinearKernel(OpKernel):
    """A packed product with its epilogue, in all dtypes of the product that nodes ask for.

    Attributes:
        compute_types: of the operands, as ONNX counts dtypes.
    """

    source: ClassVar[str] = "linear.c"
    setup: ClassVar[str] = "planish_linear"

    compute_types: tuple[int, ...]

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> LinearKernel | None:
        found = {node.attributes.get_int(COMPUTE_TYPE, COMPUTE_TYPES[0]) for node in nodes}
        return cls(op, tuple(sorted(found))) if found <= set(COMPUTE_TYPES) else None

    def templates(self) -> list[Template]:
        return [template for kind in self.compute_types for template in self._templates(kind)]

    def _templates(self, compute_type: int) -> tuple[Template, Template]:
        """The product, and what packs its weight."""
        module = _module(compute_type)
        if self.op == "LinearSwiGLU":
            return module.GatedGemm("silu"), module.PackWeight()
        product = module.Gemm(ACTIVATIONS.get(self.op), residual=self.op == "LinearAdd")
        return product, module.PackWeight(self.op == TRANSPOSED)

    def declaration(self) -> str:
        gated, residual = self.op == "LinearSwiGLU", self.op == "LinearAdd"
        inputs = 3 + residual
        forms = ", ".join(map(self._form, self.compute_types))
        return "\n".join(
            [
                types_declaration(self.op, [1] * (inputs + 1)),
                f"static const linear_form forms_{self.op}[] = {{{forms}, {{0}}}};",
                f'static linear_op op_{self.op} = {{{{{{0}}, "{self.op}", {inputs}, 1, types_{self.op}}}, '
                f"{2 if gated else 1}, {int(not gated)}, {int(residual)}, {int(self.op == TRANSPOSED)}, "
                f"forms_{self.op}}};",
            ]
        )

    def _form(self, compute_type: int) -> str:
        return form_declaration(compute_type, *self._templates(compute_type))


def form_declaration(compute_type: int, product: Template, pack: Template) -> str:
    """C: a ``linear_form``, of a product and of what packs its weights."""
    module = _module(compute_type)
    symbols = f"__tvm_ffi_{product.symbol}, __tvm_ffi_{pack.symbol}"
    width = module.panel_width(product.cpu())
    if compute_type == _BFLOAT16:
        return f"{{{compute_type}, {symbols}, {width}, {module.STEP}, {_DL_UINT}, 16}}"
    return f"{{{compute_type}, {symbols}, {width}, 1, {_DL_FLOAT}, 32}}"


def _module(compute_type: int) -> Any:
    """Where the templates for a dtype of the product are; they share their names."""
    name = "amx_gemm" if compute_type == _BFLOAT16 else "gemm"
    return importlib.import_module(f"planish.runtime.kernels.{name}")
