"""Which dialect operators have kernels, and how the library for ONNX Runtime is told of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.ir.schemas import DIALECT_DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.runtime.kernels.template import Template


@dataclass(frozen=True)
class OpKernel(ABC):
    """The kernel of an operator: all compiled code that the nodes of a program need.

    Class attributes:
        source: its glue, a C file of ``native/`` with a header of the same name.
        needs: further C files that the glue calls.
        setup: the C function that completes a declaration before it is registered.

    Attributes:
        op: name of the dialect operator.
    """

    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    setup: ClassVar[str]
    op: str

    @classmethod
    @abstractmethod
    def of(cls, op: str, nodes: Sequence[ir.Node]) -> OpKernel | None:
        """The kernel for nodes of one operator, or None if a node has attributes that there is none for."""

    @abstractmethod
    def templates(self) -> list[Template]:
        """What is compiled for it."""

    @abstractmethod
    def declaration(self) -> str:
        """C: the definitions of `variables`."""

    def variables(self) -> tuple[str, ...]:
        """The C variables that describe it: one, or one for each combination of dtypes."""
        return (f"op_{self.op}",)


def types_declaration(op: str, types: Iterable[int]) -> str:
    """C: the element types of inputs and outputs, as ``types_<operator>``."""
    return f"static const int types_{op}[] = {{{', '.join(map(str, types))}}};"


def kernels_for(nodes: Iterable[ir.Node]) -> tuple[OpKernel, ...]:
    """The kernels for all dialect operators among `nodes` that have one, by name."""
    families = _families()
    grouped: dict[str, list[ir.Node]] = {}
    for node in nodes:
        if node.domain == DIALECT_DOMAIN and node.op_type in families:
            grouped.setdefault(node.op_type, []).append(node)
    found = [families[op].of(op, grouped[op]) for op in sorted(grouped)]
    return tuple(kernel for kernel in found if kernel is not None)


def _families() -> dict[str, type[OpKernel]]:
    """Operator → the class of its kernels."""
    from planish.ir.ops.bf16_attention import BF16_ATTENTION
    from planish.ir.ops.block_sparse_attention import BLOCK_SPARSE
    from planish.ir.ops.cache_attention import CACHE_STEPS, QUANTIZE_CACHE
    from planish.ir.ops.feed_forward import FEED_FORWARD
    from planish.ir.ops.flash_attention import FLASH_ATTENTION
    from planish.ir.ops.key_mask_attention import KEY_MASK_ATTENTION
    from planish.ir.ops.linear import LINEAR, TRANSPOSED
    from planish.ir.ops.norms import NORMS
    from planish.ir.ops.window_attention import WINDOW_ATTENTION
    from planish.runtime.kernels.attention_ops import AttentionKernel
    from planish.runtime.kernels.bf16_attention_ops import Bf16AttentionKernel
    from planish.runtime.kernels.cache_attention_ops import CacheAttentionKernel, QuantizeCacheKernel
    from planish.runtime.kernels.feed_forward_ops import FeedForwardKernel
    from planish.runtime.kernels.linear import LinearKernel
    from planish.runtime.kernels.merge_ops import MergeKernel
    from planish.runtime.kernels.norm_ops import NormKernel

    attention = (*FLASH_ATTENTION, KEY_MASK_ATTENTION.name, *BLOCK_SPARSE, *WINDOW_ATTENTION)
    return {
        **dict.fromkeys((*LINEAR, TRANSPOSED), LinearKernel),
        **dict.fromkeys(NORMS, NormKernel),
        **dict.fromkeys(attention, AttentionKernel),
        **dict.fromkeys(BF16_ATTENTION, Bf16AttentionKernel),
        **dict.fromkeys(FEED_FORWARD, FeedForwardKernel),
        **dict.fromkeys(CACHE_STEPS, CacheAttentionKernel),
        QUANTIZE_CACHE.name: QuantizeCacheKernel,
        "MergeTokens": MergeKernel,  # its relatives run as their functions
    }
