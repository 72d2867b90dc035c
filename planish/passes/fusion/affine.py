"""Products with constant weights (Conv, ConvTranspose, Gemm, MatMul), and what scales and shifts their output channels.

For output channel c, ``scale[c] * (W x + b)[c] + shift[c]`` is the same product with weights ``scale[c] W[c]`` and
bias ``scale[c] b[c] + shift[c]``. Folding computes in float64 and rounds once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import dims_of
from planish.passes.base import Decline
from planish.passes.pattern import Var
from planish.passes.rewrite import Match

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_SLACK = 4.0  # roundings that a folded weight may be away from its float64 value, by channel


def linear(op: Any, op_type: str) -> Any:
    """The pattern of a product: variables ``x``, ``w``, and for all but MatMul ``b``; its output is ``product``."""
    w = Var("w", check=lambda match, value: match.is_constant(value))
    if op_type == "MatMul":
        return op.MatMul(Var("x"), w, _outputs=["product"])
    b = Var("b", optional=True)
    return getattr(op, op_type)(Var("x"), w, b, _allow_other_attributes=True, _outputs=["product"])


def channels(match: Match) -> int:
    """The number of output channels of the product.

    Raises:
        Decline: its weights are not a matrix or kernels, or have a dtype that is not folded.
    """
    node, dims = match["product"].producer(), match.shape("w")
    if match.dtype("w") not in _DTYPES:
        raise Decline(f"the weights are {match['w'].dtype.name.lower()}, which is not folded")
    if dims is None or len(dims) < 2 or (node.op_type == "MatMul" and len(dims) != 2):
        raise Decline(f"the weights have shape {dims}, so not one column for each channel")
    if node.op_type == "ConvTranspose":
        return int(dims[1]) * int(node.attributes.get_int("group", 1))  # type: ignore[arg-type]
    return int(dims[_axis(node)])  # type: ignore[arg-type]


def _axis(node: ir.Node) -> int:
    """The axis of the weights that counts output channels (of ConvTranspose: within its group)."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 0 if node.op_type == "Conv" else 1


def per_channel(match: Match, value: ir.Value) -> np.ndarray | None:
    """A constant operand beside the product as one float64 number for each channel, else None."""
    node, array = match["product"].producer(), match.constant(value)
    if array is None or array.dtype.kind != "f":
        return None
    weight_rank = len(match.shape("w") or ())
    rank = weight_rank if node.op_type != "MatMul" else max(match.rank("product") or 1, 1)
    if array.ndim > rank:
        return None  # it would give the result another rank
    axis = rank - 1 if node.op_type == "MatMul" else 1
    dims = (1,) * (rank - array.ndim) + array.shape
    count = channels(match)
    if any(d != 1 for k, d in enumerate(dims) if k != axis) or dims[axis] not in (1, count):
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (count,))


def fold(op: Any, match: Match, scale: np.ndarray, shift: np.ndarray | None) -> Any:
    """Builds the product with `scale` and `shift`, float64 of shape [channels], in its weights and bias.

    Raises:
        Decline: the weights are shared, or the folded ones do not fit their dtype.
    """
    node = match["product"].producer()
    weight = _weight(match, op, node, scale)
    if node.op_type == "MatMul":
        product = op.MatMul(match["x"], weight)
        if shift is None:
            return product
        return op.Add(product, op.initializer(_rounded(match, shift, match.dtype("w")), name="folded_bias"))
    bias = _bias(match, node, scale, shift)
    b = match["b"] if bias is None else op.initializer(bias, name=_stem(match["b"], "folded_bias"))
    attributes = dict(node.attributes)
    if bias is not None and node.op_type == "Gemm":
        attributes.pop("beta", None)
    operands = [match["x"], weight, *([] if b is None else [b])]
    return getattr(op, node.op_type)(*operands, **attributes)


def _weight(match: Match, op: Any, node: ir.Node, scale: np.ndarray) -> ir.Value:
    value: ir.Value = match["w"]
    if (scale == 1.0).all():
        return value
    others = [u for u in value.consumers() if u is not node]
    if others:
        raise Decline(
            f"'{value.name}' is also read by {others[0].op_type} '{others[0].name}', and would be stored twice"
        )
    array = match.constant("w")
    assert array is not None
    wide = array.astype(np.float64)
    if node.op_type == "ConvTranspose":
        group, rest = int(node.attributes.get_int("group", 1)), array.shape[2:]
        parts = wide.reshape(group, array.shape[0] // group, array.shape[1], *rest)
        wide = (parts * scale.reshape(group, 1, array.shape[1], *(1 for _ in rest))).reshape(array.shape)
    else:
        shape = [1] * array.ndim
        shape[_axis(node)] = -1
        wide = wide * scale.reshape(shape)
    folded: ir.Value = op.initializer(_rounded(match, wide, match.dtype("w")), name=_stem(value, "folded"))
    return folded


def _bias(match: Match, node: ir.Node, scale: np.ndarray, shift: np.ndarray | None) -> np.ndarray | None:
    """The new bias; None: as it is. Gemm's factor of it goes in too."""
    if match["b"] is None and shift is None:
        return None
    old = np.zeros(len(scale))
    if match["b"] is not None:
        array = match.constant("b")
        if array is None:
            if (scale == 1.0).all() and shift is None:
                return None
            raise Decline(f"the bias '{match['b'].name}' is not constant")
        if array.size != 1 and (array.size != len(scale) or array.shape[-1] != len(scale)):
            raise Decline(f"the bias has shape {list(array.shape)}; expected [{len(scale)}]")
        old = np.broadcast_to(array.astype(np.float64).reshape(-1), (len(scale),))
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    return _rounded(match, beta * old * scale + (0.0 if shift is None else shift), match.dtype("w"), exact=False)


def _rounded(match: Match, wide: np.ndarray, dtype: ir.DataType | None, exact: bool = True) -> np.ndarray:
    assert dtype is not None
    kind = dtype.numpy()
    with np.errstate(over="ignore", under="ignore"):
        found = wide.astype(kind)
    # What underflows is lost: a layer scale of 1e-6 in float16, say.
    lost = np.abs(found.astype(np.float64) - wide).max(initial=0.0)
    limit = _SLACK * float(np.finfo(kind).eps) * np.abs(wide).max(initial=0.0)
    if not np.isfinite(found).all() or not (lost <= limit) or (exact and _vanishes(found, wide, kind)):
        raise Decline(f"folded weights do not fit {dtype.name.lower()}: up to {np.abs(wide).max(initial=0.0):.3g}")
    return found


def _vanishes(found: np.ndarray, wide: np.ndarray, kind: Any) -> bool:
    """Whether more than stray elements of the weights fell below what the dtype holds in full precision."""
    tiny = (np.abs(wide) < float(np.finfo(kind).tiny)) & (wide != 0.0)
    return bool(tiny.sum() > 0.01 * found.size)


def _stem(value: ir.Value | None, default: str) -> str:
    return default if value is None or not value.name else f"{value.name}_folded"


def no_padding(node: ir.Node) -> bool:
    """Whether a convolution reads its input only, and no zeros around it."""
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    return not any(node.attributes.get_ints("pads", ()))


def weight_dims(node: ir.Node) -> tuple[int | str | None, ...] | None:
    return dims_of(node.inputs[1])
