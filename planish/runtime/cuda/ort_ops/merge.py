"""Merging of tokens in float16, alone and between a residual sum and a layer norm; alone in float32 too.

In float32 it is what token merging is measured in before a program becomes float16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from planish.ir.graphs import dims_of
from planish.runtime.cuda.ort_ops.family import FLOAT, FLOAT16, INT64, Code, types
from planish.runtime.cuda.token_merge import DTYPES, MOST_BY_ENERGY, MOST_TOKENS, widest

if TYPE_CHECKING:
    import onnx_ir as ir

_PIECE = 8  # elements that are read at a time
_NAMES, _WIDTHS = {FLOAT16: "float16", FLOAT: "float32"}, {FLOAT16: 2, FLOAT: 4}


class Merge:
    """planish::MergeTokens and its relatives; the form is the type of the tokens, FLOAT16 or FLOAT."""

    native = "cuda_merge"
    operators = frozenset(
        (
            *("MergeTokens", "MergeTokensMaxNorm", "MergeTokensEnergy", "MergeTokensEnergyMaxNorm"),
            *("AddMergeTokensNorm", "AddMergeTokensEnergyNorm"),
        )
    )
    one_form = True

    def form(self, node: ir.Node) -> int | None:
        """The type, where there are not too many tokens, and no too wide ones with a norm."""
        fused = _fused(node.op_type)
        kinds = [None if value is None or value.dtype is None else int(value.dtype) for value in node.inputs]
        dims = dims_of(node.inputs[0]) if node.inputs[0] is not None else None
        half = kinds[0]
        if half not in _NAMES or kinds != _sides(node.op_type, half)[0] or dims is None or len(dims) != 3:
            return None
        if isinstance(dims[1], int) and dims[1] > (MOST_BY_ENERGY if "Energy" in node.op_type else MOST_TOKENS):
            return None
        return half if not fused or (half == FLOAT16 and _fits(node, dims[2])) else None

    def codes(self, op: str, forms: Iterable[Any]) -> list[Code]:
        """One kernel for both ways to combine."""
        (form,) = forms
        macros = {"FUSED": int(_fused(op)), "VALUE": DTYPES.index(_NAMES[form])}
        source = "merge_energy.cu" if "Energy" in op else "merge_tokens.cu"
        return [Code(_label(op, form), source, tuple(macros.items()))]

    def define(self, op: str, forms: Iterable[Any]) -> list[str]:
        """As cuda_merge.h has it."""
        (form,) = forms
        table, base = types(op, *_sides(op, form))
        how = f"{int('Energy' in op)}, {int('MaxNorm' in op)}, {int(_fused(op))}, {_WIDTHS[form]}"
        return [
            table,
            f'static cuda_merge_op op_{op} = {{{base}, {how}, {{"merge_tokens", code_{_label(op, form)}, 0, 0, 0}}}};',
        ]


def _sides(op: str, form: int) -> tuple[list[int], list[int]]:
    """Types of inputs and of outputs."""
    if _fused(op):
        return [form] * 4 + [FLOAT] * 2 + [form] * 2, [form] * 2 + [FLOAT] * 2 + [INT64]
    return [form] * 2 + [FLOAT], [form, FLOAT, INT64]


def _fused(op: str) -> bool:
    return op.startswith("Add")


def _label(op: str, form: int) -> str:
    return f"merge{'_energy' * ('Energy' in op)}{'_fused' * _fused(op)}_{_NAMES[form]}"


def _fits(node: ir.Node, width: int | str | None) -> bool:
    """Whether a warp has room for a token, which depends on whether all can be read in pieces."""
    keys = dims_of(node.inputs[3]) if node.inputs[3] is not None else None
    numbers = [width, keys[-1] if keys else None, *(node.attributes.get_int(name, 0) for name in ("size", "first"))]
    wide = all(isinstance(number, int) and number % _PIECE == 0 for number in numbers)
    return isinstance(width, int) and width <= widest("float16", wide)
