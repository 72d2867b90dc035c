"""Normalization with the residual before it, and activations with the bias before them, as ONNX Runtime's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.lowering.weights import is_vector
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_MICROSOFT = "com.microsoft"
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@register
@dataclass(frozen=True)
class LowerCudaNormalization(RewritePass):
    """Writes the bias of a product, the residual and a normalization as SkipLayerNormalization, for the CUDA provider.

    On a GPU each of them is a pass over memory; the operator makes one, which also writes the sum for the next block.
    RMSNormalization becomes SkipSimplifiedLayerNormalization.
    """

    name: ClassVar[str] = "lower-cuda-normalization"
    min_opset: ClassVar[int] = 17
    remove_nodes: ClassVar[bool] = False

    def rules(self) -> Sequence[Rule]:
        # The sum is written only where something else reads it: that is a third of the memory that moves.
        return [
            Rule(f"skip-{label}-{kind}-{end}", _pattern(op_type, shift, total, alone), rewrite, _check, opset, alone)
            for opset in (self.min_opset,)
            for label, total in (("bias", _with_bias), ("plain", _plain))
            for kind, op_type, shift in (("layer", "LayerNormalization", True), ("rms", "RMSNormalization", False))
            for end, alone, rewrite in (("alone", True, _rewrite_alone), ("sum", False, _rewrite))
        ]


@register
@dataclass(frozen=True)
class LowerCudaActivation(RewritePass):
    """Writes the bias of a product and Gelu as BiasGelu or FastGelu, for the CUDA provider: one pass over memory."""

    name: ClassVar[str] = "lower-cuda-activation"
    min_opset: ClassVar[int] = 20

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Gelu(op.Add(x, Var("bias", check=is_vector)), _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        _require_cuda(match)

    def rewrite(self, op: Any, match: Match, x: ir.Value, bias: ir.Value) -> Any:
        tanh = match.root.attributes.get_string("approximate", "none") == "tanh"
        made = (op.FastGelu if tanh else op.BiasGelu)(x, bias, _domain=_MICROSOFT)
        made.type, made.shape = match.output.type, match.output.shape
        return made


def _plain(op: Any) -> Any:
    return op.Add(Var("x"), Var("residual"), _outputs=["total"])


def _with_bias(op: Any) -> Any:
    product = Var("x", check=lambda _, value: is_op(value.producer(), "MatMul"))
    return op.Add(op.Add(product, Var("bias", check=is_vector)), Var("residual"), _outputs=["total"])


def _pattern(op_type: str, shift: bool, total: Callable[[Any], Any], alone: bool) -> Callable[..., Any]:
    def pattern(op: Any) -> Any:
        summed = total(op)
        operands = [summed, Var("scale"), *([Var("shift")] if shift else [])]
        normalized = getattr(op, op_type)(*operands, _allow_other_attributes=True)
        return normalized if alone else (normalized, summed)

    return pattern


def _rewrite_alone(op: Any, match: Match) -> Any:
    return _build(op, match, 1)


def _rewrite(op: Any, match: Match) -> Any:
    normalized, _, _, total = _build(op, match, (None, "", "", None))
    return normalized, total


def _build(op: Any, match: Match, outputs: Any) -> Any:
    x, residual, bias = match["x"], match["residual"], match.values.get("bias")
    dims = [match.shape(value) for value in (x, residual)]
    if dims[0] is None or dims[0] != dims[1] or None in dims[0]:
        raise Decline(f"summands of shapes {dims[0]} and {dims[1]} are not proved to have one shape")
    if len(dims[0]) not in (2, 3):
        raise Decline(f"its input has rank {len(dims[0])}; the operator takes 2 or 3")
    if any(match.is_constant(value) for value in (x, residual)):
        raise Decline("a summand is a constant")
    layer = match.root.op_type == "LayerNormalization"
    made = op.SkipLayerNormalization if layer else op.SkipSimplifiedLayerNormalization
    operands = [
        x,
        residual,
        match["scale"],
        *([match["shift"]] if layer else []),
        *([bias] if bias is not None else []),
    ]
    epsilon = match.root.attributes.get_float("epsilon", 1e-5)
    return made(*operands, epsilon=epsilon, _domain=_MICROSOFT, _outputs=outputs)


def _check(match: Match) -> None:
    _require_cuda(match)
    rank, axis = match.rank(match.output), match.root.attributes.get_int("axis", -1)
    if axis != -1 and axis + 1 != rank:
        raise Decline(f"it normalizes from axis {axis} of rank {rank or 'unknown'} on, not over the last one")
    if len([value for value in match.root.outputs if value.uses() or value.is_graph_output()]) > 1:
        raise Decline("its mean or deviation is used")
    if any(match.rank(match.values[name]) != 1 for name in ("scale", "shift") if match.values.get(name) is not None):
        raise Decline("its scale or bias is no vector")
    if any(match.dtype(match[name]) != match.dtype(match.output) for name in ("scale", "x", "residual")):
        raise Decline("its operands differ in type")


def _require_cuda(match: Match) -> None:
    if match.target.name != "ort-cuda":
        raise Decline(f"target '{match.target}' has no such operator on a GPU; 'ort-cuda' has")
    if match.dtype(match.output) not in _DTYPES:
        raise Decline("it is neither float32 nor float16")
