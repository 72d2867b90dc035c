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

_FLOAT, _BFLOAT16 = COMPUTE_TYPES
_DL_UINT, _DL_FLOAT = 1, 2  # DLPack's type codes


@dataclass(frozen=True)
class LinearKernel(OpKernel):
    """A packed product with its epilogue, in all dtypes of the product and of the weight that nodes ask for.

    Attributes:
        dtypes: of the product's operands and of the weight as it is stored, as ONNX counts dtypes.
    """

    source: ClassVar[str] = "linear.c"
    setup: ClassVar[str] = "planish_linear"

    dtypes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> LinearKernel | None:
        found = {(node.attributes.get_int(COMPUTE_TYPE, _FLOAT), stored_as(node)) for node in nodes}
        known = {(_FLOAT, _FLOAT), (_BFLOAT16, _FLOAT), (_BFLOAT16, _BFLOAT16)}
        return cls(op, tuple(sorted(found))) if found <= known else None

    def templates(self) -> list[Template]:
        return list(dict.fromkeys(template for kinds in self.dtypes for template in self._templates(*kinds)))

    def _templates(self, compute: int, stored: int) -> tuple[Template, Template]:
        """The product, and what packs its weight."""
        if self.op == "LinearSwiGLU":
            return _module(compute).GatedGemm("silu"), packer(compute, stored)
        product = _module(compute).Gemm(ACTIVATIONS.get(self.op), residual=self.op == "LinearAdd")
        return product, packer(compute, stored, transposed=self.op == TRANSPOSED)

    def variables(self) -> tuple[str, ...]:
        return tuple(f"op_{self.op}_{stored}" for stored in self._stored())

    def _stored(self) -> list[int]:
        """A graph's operator takes weights of one dtype each."""
        return sorted({stored for _, stored in self.dtypes})

    def declaration(self) -> str:
        gated, residual = self.op == "LinearSwiGLU", self.op == "LinearAdd"
        weights, inputs = 1 + gated, 3 + residual
        lines = []
        for stored in self._stored():
            name = f"{self.op}_{stored}"
            kinds = [(compute, kept) for compute, kept in self.dtypes if kept == stored]
            forms = ", ".join(form_declaration(*kind, *self._templates(*kind)) for kind in kinds)
            types = [_FLOAT, *[stored] * weights, *[_FLOAT] * (inputs - weights)]
            lines += [
                types_declaration(name, types),
                f"static const linear_form forms_{name}[] = {{{forms}, {{0}}}};",
                f'static linear_op op_{name} = {{{{{{0}}, "{self.op}", {inputs}, 1, types_{name}}}, '
                f"{weights}, {int(not gated)}, {int(residual)}, {int(self.op == TRANSPOSED)}, forms_{name}}};",
            ]
        return "\n".join(lines)


def stored_as(node: ir.Node) -> int:
    """The dtype of a node's weights; float32 where that is unknown."""
    weight = node.inputs[1]
    if weight is None:
        return _FLOAT
    dtype = weight.dtype if weight.const_value is None else weight.const_value.dtype
    return _BFLOAT16 if dtype == ir.DataType.BFLOAT16 else _FLOAT


def packer(compute: int, stored: int, *, transposed: bool = False) -> Template:
    """What packs a weight for products of one dtype that is stored in another one."""
    more = {"bits": True} if stored == _BFLOAT16 else {}
    made: Template = _module(compute).PackWeight(transposed, **more)
    return made


def form_declaration(compute: int, stored: int, product: Template, pack: Template) -> str:
    """C: a ``linear_form``, of a product and of what packs its weights."""
    module = _module(compute)
    symbols = f"__tvm_ffi_{product.symbol}, __tvm_ffi_{pack.symbol}"
    width, bits = module.panel_width(product.cpu()), 16 if stored == _BFLOAT16 else 32
    if compute == _BFLOAT16:
        return f"{{{compute}, {symbols}, {width}, {module.STEP}, {_DL_UINT}, 16, {bits}}}"
    return f"{{{compute}, {symbols}, {width}, 1, {_DL_FLOAT}, 32, {bits}}}"


def _module(compute: int) -> Any:
    """Where the templates for a dtype of the product are; they share their names."""
    name = "amx_gemm" if compute == _BFLOAT16 else "gemm"
    return importlib.import_module(f"planish.runtime.kernels.{name}")
