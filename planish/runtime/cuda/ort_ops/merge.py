"""Merging of tokens in float16, alone and between a residual sum and a layer norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from planish.ir.graphs import dims_of
from planish.runtime.cuda.ort_ops.family import FLOAT, FLOAT16, INT64, Code, types
from planish.runtime.cuda.token_merge import DTYPES, MOST_BY_ENERGY, MOST_TOKENS, widest

if TYPE_CHECKING:
    import onnx_ir as ir

_PIECE = 8  # elements that are read at a time


class Merge:
    """planish::MergeTokens and its relatives; an operator has one form."""

    native = "cuda_merge"
    operators = frozenset(
        (
            *("MergeTokens", "MergeTokensMaxNorm", "MergeTokensEnergy", "MergeTokensEnergyMaxNorm"),
            *("AddMergeTokensNorm", "AddMergeTokensEnergyNorm"),
        )
    )

    def form(self, node: ir.Node) -> int | None:
        """0 in float16, of not too many tokens, and not too wide ones with a norm."""
        fused = _fused(node.op_type)
        wanted = [FLOAT16] * 4 + [FLOAT] * 2 + [FLOAT16] * 2 if fused else [FLOAT16] * 2 + [FLOAT]
        kinds = [None if value is None or value.dtype is None else int(value.dtype) for value in node.inputs]
        dims = dims_of(node.inputs[0]) if node.inputs[0] is not None else None
        if kinds != wanted or dims is None or len(dims) != 3:
            return None
        if isinstance(dims[1], int) and dims[1] > (MOST_BY_ENERGY if "Energy" in node.op_type else MOST_TOKENS):
            return None
        return 0 if not fused or _fits(node, dims[2]) else None

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """One kernel for both ways to combine."""
        macros = {"FUSED": int(_fused(op)), "VALUE": DTYPES.index("float16")}
        return [Code(_label(op), "merge_energy.cu" if "Energy" in op else "merge_tokens.cu", tuple(macros.items()))]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As cuda_merge.h has it."""
        if _fused(op):
            sides = [FLOAT16] * 4 + [FLOAT] * 2 + [FLOAT16] * 2, [FLOAT16] * 2 + [FLOAT] * 2 + [INT64]
        else:
            sides = [FLOAT16] * 2 + [FLOAT], [FLOAT16, FLOAT, INT64]
        table, base = types(op, *sides)
        how = f"{int('Energy' in op)}, {int('MaxNorm' in op)}, {int(_fused(op))}"
        return [
            table,
            f'static cuda_merge_op op_{op} = {{{base}, {how}, {{"merge_tokens", code_{_label(op)}, 0, 0, 0}}}};',
        ]


def _fused(op: str) -> bool:
    return op.startswith("Add")


def _label(op: str) -> str:
    return f"merge{'_energy' * ('Energy' in op)}{'_fused' * _fused(op)}"


def _fits(node: ir.Node, width: int | str | None) -> bool:
    """Whether a warp has room for a token, which depends on whether all can be read in pieces."""
    keys = dims_of(node.inputs[3]) if node.inputs[3] is not None else None
    numbers = [width, keys[-1] if keys else None, *(node.attributes.get_int(name, 0) for name in ("size", "first"))]
    wide = all(isinstance(number, int) and number % _PIECE == 0 for number in numbers)
    return isinstance(width, int) and width <= widest("float16", wide)
