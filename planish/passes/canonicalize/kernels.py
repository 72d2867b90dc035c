"""Operators whose result numpy computes bit for bit as every ONNX runtime does, for constant folding.

Left out on purpose: transcendental functions, matrix products and floating sums, whose last bit depends on the
library; folding them could flip a later Floor or Cast. A kernel raises `Decline` where semantics are left open
by the specification (division by zero, a float outside of the range of the integer it is cast to).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline

Array = np.ndarray
Arrays = Sequence[Array | None]
_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NATIVE = _INTEGERS | {"bool", "float16", "bfloat16", "float32", "float64"}


def evaluate(node: ir.Node, inputs: Arrays, limit: int) -> list[Array]:
    """The outputs of `node` for constant `inputs`.

    Args:
        limit: largest total size of the outputs, in bytes; found out before anything is computed.

    Raises:
        Decline: no exact kernel, semantics left open, or the outputs would exceed `limit`.
    """
    kernel = _KERNELS.get(node.op_type)
    if kernel is None:
        raise Decline(f"{node.op_type} has no kernel that is exact to the last bit")
    for array in inputs:
        if array is not None and array.dtype.name not in _NATIVE:
            raise Decline(f"constants of type {array.dtype.name} are not folded")
    half = any(a is not None and a.itemsize == 2 and a.dtype.kind not in "iu" for a in inputs)
    if half and node.op_type in _ROUNDING:
        raise Decline("runtimes may keep arithmetic on half floats in float32")
    size = _output_bytes(node, inputs)
    if size > limit:
        raise Decline(f"the result would take {size} bytes, over the limit of {limit}")
    with np.errstate(all="ignore"):
        result = kernel(node, inputs)
    return result if isinstance(result, list) else [np.asarray(result)]


def has_kernel(op_type: str) -> bool:
    return op_type in _KERNELS


def _output_bytes(node: ir.Node, inputs: Arrays) -> int:
    present = [a for a in inputs if a is not None]
    wide = max((a.itemsize for a in present), default=8)
    if node.op_type in _ELEMENTWISE:
        if node.op_type == "Cast":
            wide = 8
        return math.prod(_broadcast(*(a.shape for a in present))) * wide
    count = _GROWING.get(node.op_type)
    if count is not None:
        item = _fill(node) if node.op_type == "ConstantOfShape" else present[0]
        return count(node, inputs) * item.itemsize
    return sum(a.nbytes for a in present) if node.op_type not in ("Shape", "Size") else 512


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise Decline(f"shapes {shapes} do not broadcast") from error


def _ints(array: Array | None) -> list[int]:
    assert array is not None
    return [int(i) for i in array.ravel()]


def _expand_shape(inputs: Arrays) -> tuple[int, ...]:
    assert inputs[0] is not None
    return _broadcast(inputs[0].shape, tuple(_ints(inputs[1])))


def _tile_count(node: ir.Node, inputs: Arrays) -> int:
    assert inputs[0] is not None
    return inputs[0].size * math.prod(_ints(inputs[1]))


def _range_count(node: ir.Node, inputs: Arrays) -> int:
    start, limit, delta = (a for a in inputs if a is not None)
    if start.dtype.kind not in "iu" or not delta.all():
        raise Decline("Range of floats may be computed step by step or by product")
    return int(max(0, -((start.item() - limit.item()) // delta.item())))


def _gather_count(node: ir.Node, inputs: Arrays) -> int:
    data, index = inputs[0], inputs[1]
    assert data is not None and index is not None
    axis = node.attributes.get_int("axis", 0)
    return data.size // data.shape[axis] * index.size if data.size else 0


def _fill(node: ir.Node) -> Array:
    attribute = node.attributes.get("value")
    return np.zeros(1, np.float32) if attribute is None else np.asarray(attribute.as_tensor().numpy())


def _filled(node: ir.Node, inputs: Arrays) -> Array:
    fill = _fill(node)
    if fill.dtype.name not in _NATIVE:
        raise Decline(f"constants of type {fill.dtype.name} are not folded")
    return np.full(_ints(inputs[0]), fill.ravel()[0], dtype=fill.dtype)


def _cast(node: ir.Node, inputs: Arrays) -> Array:
    source = inputs[0]
    assert source is not None
    target = ir.DataType(node.attributes.get_int("to", 0))
    if target == ir.DataType.STRING or target.numpy().name not in _NATIVE:
        raise Decline(f"Cast to {target.name} is not folded")
    dtype = np.dtype(target.numpy())
    real = source.dtype.kind == "f" or source.dtype == ml_dtypes.bfloat16
    if real and dtype.kind in "iu" and source.size:
        wide = source.astype(np.float64)
        info = np.iinfo(dtype)
        if not np.isfinite(wide).all() or wide.min() <= info.min - 1.0 or wide.max() >= info.max:
            raise Decline(f"a value is outside of the range of {target.name}, where Cast is left open")
    if dtype.itemsize == 2 and dtype.kind not in "iu" and not np.array_equal(source, source.astype(np.float32)):
        raise Decline(f"Cast from {source.dtype.name} to {target.name} may round twice")
    result: Array = source.astype(dtype)
    return result


def _divide(node: ir.Node, inputs: Arrays) -> Array:
    a, b = inputs[0], inputs[1]
    assert a is not None and b is not None
    if a.dtype.kind not in "iu":
        return np.divide(a, b).astype(a.dtype)
    if not b.all() or (a.dtype.kind == "i" and (b == -1).any() and (a == np.iinfo(a.dtype).min).any()):
        raise Decline("division by zero or overflow")
    # numpy rounds down, ONNX towards zero.
    quotient: Array = a // b + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return quotient


def _modulo(node: ir.Node, inputs: Arrays) -> Array:
    a, b = inputs[0], inputs[1]
    assert a is not None and b is not None
    if a.dtype.kind not in "iu" or not b.all():
        raise Decline("only Mod of integers by nonzero integers is folded")
    return np.fmod(a, b) if node.attributes.get_int("fmod", 0) else np.mod(a, b)


def _extreme(operate: np.ufunc) -> Callable[[ir.Node, Arrays], Array]:
    def kernel(node: ir.Node, inputs: Arrays) -> Array:
        arrays = [a for a in inputs if a is not None]
        if any(a.dtype.kind not in "iub" and np.isnan(a.astype(np.float32)).any() for a in arrays):
            raise Decline("an operand is NaN, where Min and Max are left open")
        result = arrays[0]
        for array in arrays[1:]:
            result = operate(result, array)
        return result

    return kernel


def _axes(node: ir.Node, inputs: Arrays, index: int) -> list[int] | None:
    if len(inputs) > index and inputs[index] is not None:
        return _ints(inputs[index])
    listed = node.attributes.get_ints("axes", None)
    return None if listed is None else list(listed)


def _reshape(node: ir.Node, inputs: Arrays) -> Array:
    data, target = inputs[0], _ints(inputs[1])
    assert data is not None
    if not node.attributes.get_int("allowzero", 0):
        target = [data.shape[i] if d == 0 else d for i, d in enumerate(target)]
    return _checked(lambda: data.reshape(target))


def _squeeze(node: ir.Node, inputs: Arrays) -> Array:
    axes = _axes(node, inputs, 1)
    assert inputs[0] is not None
    data = inputs[0]
    return _checked(lambda: np.squeeze(data, tuple(axes) if axes is not None else None))


def _unsqueeze(node: ir.Node, inputs: Arrays) -> Array:
    axes = _axes(node, inputs, 1)
    assert inputs[0] is not None and axes is not None
    data = inputs[0]
    return _checked(lambda: np.expand_dims(data, tuple(axes)))


def _checked(compute: Callable[[], Array]) -> Array:
    try:
        return compute()
    except (ValueError, IndexError) as error:
        raise Decline(f"the node is invalid: {error}") from error


def _flatten(node: ir.Node, inputs: Arrays) -> Array:
    data = inputs[0]
    assert data is not None
    axis = node.attributes.get_int("axis", 1)
    axis += data.ndim if axis < 0 else 0
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


def _transpose(node: ir.Node, inputs: Arrays) -> Array:
    assert inputs[0] is not None
    return np.ascontiguousarray(np.transpose(inputs[0], node.attributes.get_ints("perm", None)))


def _concat(node: ir.Node, inputs: Arrays) -> Array:
    return _checked(lambda: np.concatenate([a for a in inputs if a is not None], node.attributes.get_int("axis", 0)))


def _slice(node: ir.Node, inputs: Arrays) -> Array:
    data = inputs[0]
    if data is None or len(inputs) < 3:
        raise Decline("Slice with attributes (opset below 10) is not folded")
    starts, ends = _ints(inputs[1]), _ints(inputs[2])
    axes = _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = _ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    if any(s < 1 for s in steps):
        raise Decline("Slice with a negative step is not folded")
    index: list[slice] = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return data[tuple(index)].copy()


def _gather(node: ir.Node, inputs: Arrays) -> Array:
    data, index = inputs[0], inputs[1]
    assert data is not None and index is not None
    return _checked(lambda: np.take(data, index, axis=node.attributes.get_int("axis", 0)))


def _split(node: ir.Node, inputs: Arrays) -> list[Array]:
    data = inputs[0]
    assert data is not None
    axis = node.attributes.get_int("axis", 0)
    sizes = _ints(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else None
    if sizes is None or sum(sizes) != data.shape[axis]:
        raise Decline("Split without sizes is not folded")
    return [part.copy() for part in np.split(data, np.cumsum(sizes)[:-1], axis)]


def _reduce(operate: Callable[..., Array]) -> Callable[[ir.Node, Arrays], Array]:
    def kernel(node: ir.Node, inputs: Arrays) -> Array:
        data, axes = inputs[0], _axes(node, inputs, 1)
        assert data is not None
        if data.dtype.kind not in "iu" or not data.size:
            raise Decline("reductions of floats and of nothing are not folded")
        if not axes and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
            return data
        keep = bool(node.attributes.get_int("keepdims", 1))
        return operate(data, axis=tuple(axes) if axes else None, keepdims=keep).astype(data.dtype)

    return kernel


def _shape(node: ir.Node, inputs: Arrays) -> Array:
    assert inputs[0] is not None
    part = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", None))
    return np.array(inputs[0].shape[part], dtype=np.int64)


def _simple(operate: Callable[..., Array]) -> Callable[[ir.Node, Arrays], Array]:
    return lambda node, inputs: operate(*inputs)


def _number(operate: Callable[..., Array]) -> Callable[[ir.Node, Arrays], Array]:
    def kernel(node: ir.Node, inputs: Arrays) -> Array:
        assert inputs[0] is not None
        return np.asarray(operate(*inputs)).astype(inputs[0].dtype)

    return kernel


def _trilu(node: ir.Node, inputs: Arrays) -> Array:
    data = inputs[0]
    assert data is not None
    diagonal = _ints(inputs[1])[0] if len(inputs) > 1 and inputs[1] is not None else 0
    return np.triu(data, diagonal) if node.attributes.get_int("upper", 1) else np.tril(data, diagonal)


_Kernel = Callable[[ir.Node, Arrays], "Array | list[Array]"]
_ELEMENTWISE: dict[str, _Kernel] = {
    "Add": _number(np.add),
    "Sub": _number(np.subtract),
    "Mul": _number(np.multiply),
    "Div": _divide,
    "Mod": _modulo,
    "Neg": _number(np.negative),
    "Abs": _number(np.abs),
    "Sqrt": _number(np.sqrt),
    "Floor": _number(np.floor),
    "Ceil": _number(np.ceil),
    "Min": _extreme(np.minimum),
    "Max": _extreme(np.maximum),
    "Not": _simple(np.logical_not),
    "And": _simple(np.logical_and),
    "Or": _simple(np.logical_or),
    "Xor": _simple(np.logical_xor),
    "Equal": _simple(np.equal),
    "Less": _simple(np.less),
    "LessOrEqual": _simple(np.less_equal),
    "Greater": _simple(np.greater),
    "GreaterOrEqual": _simple(np.greater_equal),
    "Where": _simple(np.where),
    "Cast": _cast,
}
_ROUNDING = frozenset(("Add", "Sub", "Mul", "Div", "Sqrt"))
_GROWING: dict[str, Callable[[ir.Node, Arrays], int]] = {
    "Expand": lambda node, inputs: math.prod(_expand_shape(inputs)),
    "Tile": _tile_count,
    "ConstantOfShape": lambda node, inputs: math.prod(_ints(inputs[0])),
    "Range": _range_count,
    "Gather": _gather_count,
}
_KERNELS: dict[str, _Kernel] = {
    **_ELEMENTWISE,
    "Identity": _simple(np.asarray),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "Split": _split,
    "Shape": _shape,
    "Size": lambda node, inputs: np.array(inputs[0].size, dtype=np.int64),  # type: ignore[union-attr]
    "Expand": lambda node, inputs: np.broadcast_to(inputs[0], _expand_shape(inputs)).copy(),  # type: ignore[arg-type]
    "Tile": lambda node, inputs: np.tile(inputs[0], _ints(inputs[1])),  # type: ignore[arg-type]
    "ConstantOfShape": _filled,
    "Range": _simple(lambda a, b, step: np.arange(a.item(), b.item(), step.item(), dtype=a.dtype)),
    "ReduceSum": _reduce(np.sum),
    "ReduceProd": _reduce(np.prod),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Trilu": _trilu,
}
