"""What LayerNorm and RMSNorm share: the mean square and its inverse root in their spellings, axes, scales, epsilon."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.pattern import OrValue, Var
from planish.passes.rewrite import Match


def mean(op: Any, value: Any, name: str) -> Any:
    """Mean over some axes; `name` is bound to the result, from whose node `last_axes` reads the axes."""
    return op.ReduceMean(value, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=[name])


def square(op: Any, value: Any) -> Any:
    return OrValue([op.Pow(value, 2.0), op.Mul(value, value)])


def divided_by_root(op: Any, value: Any, variance: Any) -> Any:
    """`value` / sqrt(`variance` + eps)."""
    return op.Div(value, op.Sqrt(op.Add(variance, Var("eps"))))


def times_inverse_root(op: Any, value: Any, variance: Any) -> Any:
    """`value` * 1 / sqrt(`variance` + eps)."""
    shifted = op.Add(variance, Var("eps"))
    root = op.Sqrt(shifted)
    return op.Mul(value, OrValue([op.Reciprocal(root), op.Div(1.0, root), op.Pow(shifted, -0.5)]))


def over_root(op: Any, value: Any, variance: Any) -> Any:
    """Either of the two; not for the root of a pattern, which must be one operator."""
    return OrValue([divided_by_root(op, value, variance), times_inverse_root(op, value, variance)])


def last_axes(match: Match, x: str, *means: str) -> int:
    """The number of trailing axes of `x` that all the means named are over.

    Raises:
        Decline: they are over other axes, or drop them.
    """
    rank = match.rank(x)
    if rank is None:
        raise Decline("the rank of the input is unknown")
    counts = {_trailing(match, match[name].producer(), rank) for name in means}
    if len(counts) > 1:
        raise Decline("mean and variance are over different axes")
    return counts.pop()


def _trailing(match: Match, node: ir.Node, rank: int) -> int:
    if not node.attributes.get_int("keepdims", 1):
        raise Decline("the mean drops its axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = match.constant(node.inputs[1])
        axes = None if array is None else [int(a) for a in array.ravel()]
    else:
        axes = list(node.attributes.get_ints("axes", ()))
        if not axes and not node.attributes.get_int("noop_with_empty_axes", 0):
            axes = list(range(rank))
    if not axes:
        raise Decline("the axes of the mean are unknown")
    found = sorted(a % rank for a in axes)
    if found != list(range(rank - len(found), rank)):
        raise Decline(f"the mean is over axes {axes} of {rank}, which are not the last ones")
    return len(found)


def epsilon(match: Match) -> float:
    """The constant added to the variance.

    Raises:
        Decline: it is computed, or not positive.
    """
    found = match.scalar("eps")
    if found is None or not found > 0:
        raise Decline("epsilon is not a positive constant")
    return float(found)


def require_scale(match: Match, x: str, name: str, count: int) -> None:
    """Declines unless `name` has exactly the sizes of the last `count` axes of `x`."""
    wanted, given = match.shape(x), match.shape(name)
    assert wanted is not None
    normalized = wanted[len(wanted) - count :]
    if given != normalized or not all(isinstance(d, int) for d in normalized):
        raise Decline(f"{name} has shape {given}, and the normalized axes are {normalized}")


def require_float(match: Match, x: str, dtypes: tuple[ir.DataType, ...]) -> None:
    dtype = match.dtype(x)
    if dtype not in dtypes:
        shown = dtype.name.lower() if dtype else "of unknown dtype"
        raise Decline(f"the input is {shown}, for which the operator rounds otherwise")
