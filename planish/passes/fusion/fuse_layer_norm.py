"""Recovers LayerNormalization (opset 17) from means, differences and roots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.norms import (
    divided_by_root,
    epsilon,
    last_axes,
    mean,
    over_root,
    require_float,
    require_scale,
    square,
    times_inverse_root,
)
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

# LayerNormalization computes in float32 inside: less precise than float64 parts, and more than float16 ones.
_DTYPES = (ir.DataType.FLOAT,)


@register
@dataclass(frozen=True)
class FuseLayerNorm(RewritePass):
    """Replaces (x - mean) / sqrt(var + eps) * scale + bias by LayerNormalization (Ba et al., arXiv:1607.06450).

    With both, with scale only, or with neither; the square as a power or a product; the division as itself or as a
    product with the inverse root.
    """

    name: ClassVar[str] = "fuse-layer-norm"
    min_opset: ClassVar[int] = 17
    anchors: ClassVar[tuple[str, ...]] = ("ReduceMean",)

    def rules(self) -> Sequence[Rule]:
        # The longest first: the driver tries them in this order, and starts from the end of the graph.
        return (
            Rule("layer-norm-scale-bias", _scale_bias, _rewrite, _check, self.min_opset),
            Rule("layer-norm-scale", _scale, _rewrite, _check, self.min_opset),
            Rule("layer-norm-divided", _plain(divided_by_root), _rewrite_plain, _check, self.min_opset),
            Rule("layer-norm-inverse", _plain(times_inverse_root), _rewrite_plain, _check, self.min_opset),
        )


def _normalized(op: Any, x: Any, over: Callable[..., Any]) -> Any:
    difference = op.Sub(x, mean(op, x, "mu"))
    return over(op, difference, mean(op, square(op, difference), "variance"))


def _plain(over: Callable[..., Any]) -> Callable[..., Any]:
    def pattern(op: Any, x: Any) -> Any:
        return _normalized(op, x, over)

    return pattern


def _scale(op: Any, x: Any, scale: Any) -> Any:
    return op.Mul(_normalized(op, x, over_root), scale)


def _scale_bias(op: Any, x: Any, scale: Any, bias: Any) -> Any:
    return op.Add(_scale(op, x, scale), bias)


def _check(match: Match) -> None:
    require_float(match, "x", _DTYPES)
    count = last_axes(match, "x", "mu", "variance")
    epsilon(match)
    for name in ("scale", "bias"):
        if name in match.values:
            require_scale(match, "x", name, count)


def _rewrite(op: Any, match: Match, x: ir.Value) -> Any:
    count = last_axes(match, "x", "mu", "variance")
    parameters = [match[name] for name in ("scale", "bias") if name in match.values]
    return op.LayerNormalization(x, *parameters, axis=-count, epsilon=epsilon(match))


def _rewrite_plain(op: Any, match: Match, x: ir.Value) -> Any:
    count = last_axes(match, "x", "mu", "variance")
    dims = (match.shape("x") or ())[-count:]
    sizes = [d for d in dims if isinstance(d, int)]
    if len(sizes) < count or x.dtype is None:
        raise Decline(f"the normalized axes {dims} have no fixed size, so there is no scale of ones for them")
    ones = op.initializer(np.ones(sizes, dtype=x.dtype.numpy()), name="layer_norm_ones")
    return op.LayerNormalization(x, ones, axis=-count, epsilon=epsilon(match))
