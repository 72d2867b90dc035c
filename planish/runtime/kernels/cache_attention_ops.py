"""The kernels of planish::CacheAttention, CacheAttentionFloat16 and QuantizeCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.graphs import dims_of
from planish.ir.ops.cache_attention import CACHE_ATTENTION, CACHE_STEPS, QUANTIZE_CACHE
from planish.ir.ops.flash_attention import KV_HEADS, Q_HEADS
from planish.runtime.kernels.op_kernels import OpKernel, types_declaration

if TYPE_CHECKING:
    from planish.runtime.kernels.template import Template

#: Heads of a multiple of this size have a kernel.
_MULTIPLE = 8


@dataclass(frozen=True)
class CacheAttentionKernel(OpKernel):
    """A step over a cache for the heads that the nodes have; all other sizes are free.

    Attributes:
        forms: (head size, query heads of each key-value head), one for each template.
    """

    source: ClassVar[str] = "cache_attention.c"
    setup: ClassVar[str] = "planish_cache_attention"

    forms: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> CacheAttentionKernel | None:
        forms = {_form(node) for node in nodes}
        found = {form for form in forms if form is not None}
        return cls(op, tuple(sorted(found))) if found == forms else None

    def templates(self) -> list[Template]:
        from planish.runtime.kernels.cache_attention import CacheAttention

        return [CacheAttention(*form, "int8" if self._scales else "float16") for form in self.forms]

    @property
    def _scales(self) -> bool:
        return self.op == CACHE_ATTENTION.name

    def declaration(self) -> str:
        schema = CACHE_STEPS[self.op].schema
        types = [int(next(iter(operand.dtypes))) for operand in (*schema.inputs, *schema.outputs)]
        forms = ", ".join(
            f"{{{size}, {group}, __tvm_ffi_{template.symbol}}}"
            for (size, group), template in zip(self.forms, self.templates(), strict=True)
        )
        name = f'{{{{0}}, "{self.op}", {len(schema.inputs)}, {len(schema.outputs)}, types_{self.op}}}'
        return "\n".join(
            [
                types_declaration(self.op, types),
                f"static const cache_attention_form forms_{self.op}[] = {{{forms}, {{0}}}};",
                f"static cache_attention_op op_{self.op} = {{{name}, {int(self._scales)}, forms_{self.op}}};",
            ]
        )


@dataclass(frozen=True)
class QuantizeCacheKernel(OpKernel):
    """Rounding of the caches of prompts, for the head sizes that the nodes have.

    Attributes:
        sizes: one for each template.
    """

    source: ClassVar[str] = "cache_quantize.c"
    setup: ClassVar[str] = "planish_cache_quantize"

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> QuantizeCacheKernel | None:
        found = {_size(node.inputs[0]) for node in nodes}
        sizes = {size for size in found if size is not None}
        return cls(op, tuple(sorted(sizes))) if sizes == found else None

    def templates(self) -> list[Template]:
        from planish.runtime.kernels.cache_quantize import QuantizeCache

        return [QuantizeCache(size) for size in self.sizes]

    def declaration(self) -> str:
        schema = QUANTIZE_CACHE.schema
        types = [int(next(iter(operand.dtypes))) for operand in (*schema.inputs, *schema.outputs)]
        forms = ", ".join(
            f"{{{size}, __tvm_ffi_{template.symbol}}}"
            for size, template in zip(self.sizes, self.templates(), strict=True)
        )
        name = f'{{{{0}}, "{self.op}", 2, 2, types_{self.op}}}'
        return "\n".join(
            [
                types_declaration(self.op, types),
                f"static const cache_quantize_form forms_{self.op}[] = {{{forms}, {{0}}}};",
                f"static cache_quantize_op op_{self.op} = {{{name}, forms_{self.op}}};",
            ]
        )


def _size(cache: ir.Value | None) -> int | None:
    """Of its heads; None if it is unknown, or one that there is no kernel for."""
    dims = None if cache is None else dims_of(cache)
    size = dims[3] if dims is not None and len(dims) == 4 else None
    return size if isinstance(size, int) and size >= _MULTIPLE and size % _MULTIPLE == 0 else None


def _form(node: ir.Node) -> tuple[int, int] | None:
    """None where the head size is unknown, or none that there is a kernel for."""
    size = _size(node.inputs[3])
    heads, kv_heads = (node.attributes.get_int(name, 0) for name in (Q_HEADS, KV_HEADS))
    known = size is not None and kv_heads > 0 and heads > 0 and heads % kv_heads == 0
    return (size, heads // kv_heads) if size is not None and known else None
