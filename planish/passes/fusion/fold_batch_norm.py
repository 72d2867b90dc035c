"""Folds BatchNormalization of a trained net into the weights beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.affine import LINEAR, channels, fold, linear, no_padding, weight_dims
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_STATISTICS = ("gamma", "beta", "mean", "var")


@register
@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """BatchNormalization in inference goes into the product before it (Conv, Gemm, ...) or into a Conv behind.

    With running statistics it is ``scale x + shift`` for each channel (Ioffe & Szegedy, arXiv:1502.03167). Into a
    Conv behind it goes only where that has no padding, or the shift is zero: padding is zeros after the shift.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def rules(self) -> Sequence[Rule]:
        before = [Rule(f"{kind.lower()}-batch-norm", _behind(kind), _fold_before, _inference, 7) for kind in LINEAR]
        return [*before, Rule("batch-norm-conv", _in_front, _fold_behind, _inference, 7)]


def _batch_norm(op: Any, x: Any) -> Any:
    parameters = [Var(name) for name in _STATISTICS]
    return op.BatchNormalization(x, *parameters, _allow_other_attributes=True, _outputs=["normalized"])


def _behind(kind: str) -> Callable[..., Any]:
    def pattern(op: Any) -> Any:
        return _batch_norm(op, linear(op, kind))

    return pattern


def _in_front(op: Any, x: Any, w: Any) -> Any:
    b = Var("b", optional=True)
    return op.Conv(_batch_norm(op, x), w, b, _allow_other_attributes=True, _outputs=["product"])


def _inference(match: Match) -> None:
    node = match["normalized"].producer()
    if node.attributes.get_int("training_mode", 0) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Decline("BatchNormalization computes statistics of the batch (training)")
    if not node.attributes.get_int("spatial", 1):
        raise Decline("BatchNormalization is over every place apart (spatial = 0)")
    for name in _STATISTICS:
        if not match.is_constant(name):
            raise Decline(f"{name} '{match[name].name}' is not constant")


def _scale_and_shift(match: Match) -> tuple[np.ndarray, np.ndarray]:
    found = [match.constant(name) for name in _STATISTICS]
    gamma, beta, mean, var = (np.asarray(a, dtype=np.float64).reshape(-1) for a in found)
    epsilon = match["normalized"].producer().attributes.get_float("epsilon", 1e-5)
    if not (var + epsilon > 0).all():
        raise Decline("a variance is not positive")
    scale = gamma / np.sqrt(var + epsilon)
    return scale, beta - mean * scale


def _fold_before(op: Any, match: Match) -> Any:
    node = match["product"].producer()
    scale, shift = _scale_and_shift(match)
    if len(scale) != channels(match):
        raise Decline(f"{len(scale)} statistics for {channels(match)} channels")
    if node.op_type == "MatMul" and match.rank("x") != 2:
        raise Decline(f"channels are axis 1 and columns of the product are not: x has rank {match.rank('x')}")
    return fold(op, match, scale, shift)


def _fold_behind(op: Any, match: Match) -> Any:
    conv, weight = match["product"].producer(), match.constant("w")
    if weight is None:
        raise Decline(f"the weights '{match['w'].name}' are not constant")
    scale, shift = _scale_and_shift(match)
    if shift.any() and not no_padding(conv):
        raise Decline("the convolution pads with zeros, which the shift would not reach")
    group = int(conv.attributes.get_int("group", 1))
    dims = weight_dims(conv) or ()
    if len(scale) != group * int(dims[1]):  # type: ignore[arg-type]
        raise Decline(f"{len(scale)} statistics for {group} groups of {dims[1]} channels")
    # Input channel c of the weights [M, C / group, ...] is channel g C / group + c in group g.
    parts = weight.astype(np.float64).reshape(group, weight.shape[0] // group, *weight.shape[1:])
    ones = (1,) * (weight.ndim - 2)
    added = (parts * shift.reshape(group, 1, -1, *ones)).reshape(weight.shape).sum(axis=tuple(range(1, weight.ndim)))
    scaled = (parts * scale.reshape(group, 1, -1, *ones)).reshape(weight.shape)
    return _rebuilt(op, match, conv, scaled, added)


def _rebuilt(op: Any, match: Match, conv: ir.Node, weight: np.ndarray, added: np.ndarray) -> Any:
    """The convolution with other weights, and `added` to its bias; through `fold` for its checks."""
    old = match["w"]
    if [u for u in old.consumers() if u is not conv]:
        raise Decline(f"'{old.name}' is read elsewhere too, and would be stored twice")
    dtype = old.dtype.numpy()
    bias = match.constant("b") if match["b"] is not None else np.zeros(len(added))
    if bias is None:
        raise Decline(f"the bias '{match['b'].name}' is not constant")
    arrays = [weight.astype(dtype), (bias.astype(np.float64) + added).astype(dtype)]
    if not all(np.isfinite(a).all() for a in arrays):
        raise Decline(f"folded weights do not fit {old.dtype.name.lower()}")
    w = op.initializer(arrays[0], name=f"{old.name}_folded")
    b = None if match["b"] is None and not added.any() else op.initializer(arrays[1], name="folded_bias")
    return op.Conv(match["x"], w, *([] if b is None else [b]), **dict(conv.attributes))
