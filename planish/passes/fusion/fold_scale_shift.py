"""Folds constant factors and summands of channels into the weights of the product before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor
from planish.passes.base import Decline
from planish.passes.fusion.affine import channels, fold, linear, per_channel
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_KINDS = {
    "Conv": ("Mul", "Div", "Add", "Sub"),
    "ConvTranspose": ("Mul", "Div", "Add", "Sub"),
    "Gemm": ("Mul", "Div", "Add", "Sub"),
    "MatMul": ("Mul", "Div"),  # its bias stays an Add
}


@register
@dataclass(frozen=True)
class FoldScaleShift(RewritePass):
    """Mul, Div, Add and Sub by constants, per channel or one number, go into Conv, ConvTranspose, Gemm or MatMul.

    Also through the bias of a product: that is LayerScale (Touvron et al., arXiv:2103.17239) of ConvNeXt, CaiT and
    DINOv2, a pass over the whole activation in every block that costs nothing once it is in the weights.
    """

    name: ClassVar[str] = "fold-scale-shift"

    def rules(self) -> Sequence[Rule]:
        scaled_bias = [
            Rule(f"matmul-add-{by.lower()}", _through_bias(by), _fold_through_bias(by), None, 7)
            for by in ("Mul", "Div")
        ]
        plain = [
            Rule(f"{kind.lower()}-{by.lower()}", _pattern(kind, by), _fold(by), None, 7)
            for kind, operators in _KINDS.items()
            for by in operators
        ]
        return [*scaled_bias, *plain]


def _constant(name: str) -> Any:
    # Products that meet no constant are no near miss, so they are not declined but passed over.
    return Var(name, check=_is_constant)


def _is_constant(_: Any, value: ir.Value) -> bool:
    return constant_tensor(value) is not None


def _pattern(kind: str, by: str) -> Callable[..., Any]:
    def pattern(op: Any) -> Any:
        return getattr(op, by)(linear(op, kind), _constant("c"))

    return pattern


def _through_bias(by: str) -> Callable[..., Any]:
    def pattern(op: Any) -> Any:
        return getattr(op, by)(op.Add(linear(op, "MatMul"), _constant("bias")), _constant("c"))

    return pattern


def _numbers(match: Match, name: str) -> np.ndarray:
    found = per_channel(match, match[name])
    if found is None:
        raise Decline(
            f"'{match[name].name}' has shape {list(match.shape(name) or ())}, which is not one number for each of the "
            f"{channels(match)} channels"
        )
    return found


def _factor(match: Match, by: str) -> np.ndarray:
    numbers = _numbers(match, "c")
    if by == "Mul":
        return numbers
    if not numbers.all():
        raise Decline(f"'{match['c'].name}' holds a zero, and divides")
    return np.asarray(1.0 / numbers)


def _fold(by: str) -> Callable[..., Any]:
    def rewrite(op: Any, match: Match) -> Any:
        if by in ("Mul", "Div"):
            return fold(op, match, _factor(match, by), None)
        numbers = _numbers(match, "c")
        return fold(op, match, np.ones(len(numbers)), numbers if by == "Add" else -numbers)

    return rewrite


def _fold_through_bias(by: str) -> Callable[..., Any]:
    def rewrite(op: Any, match: Match) -> Any:
        scale = _factor(match, by)
        return fold(op, match, scale, _numbers(match, "bias") * scale)

    return rewrite
