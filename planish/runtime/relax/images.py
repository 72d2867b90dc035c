"""Convolutions, pooling and reductions. Images keep their channels last from one to the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.runtime.kernels.images import DepthwiseConv, Patches, Pool, Window
from planish.runtime.kernels.reductions import Reduce
from planish.runtime.relax.elementwise import elementwise
from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, emits
from planish.runtime.relax.views import numbers_of

LAST = (0, 2, 3, 1)
#: Grouped convolutions run group by group; more groups than this are refused.
_MOST_GROUPS = 64


def _geometry(t: Translator, node: ir.Node, x: Operand, kernel: list[int]) -> tuple[Window, list[Any]]:
    """The window of a node over images of two axes, and the sizes of its output."""
    axes = len(kernel)
    strides = attribute(node, "strides") or [1] * axes
    dilations = attribute(node, "dilations") or [1] * axes
    pads = attribute(node, "pads") or [0] * (2 * axes)
    how = attribute(node, "auto_pad", "NOTSET")
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if how.startswith("SAME"):
        pads = _same(t, node, x.dims[2:], extents, strides, how == "SAME_UPPER")
    elif how == "VALID":
        pads = [0] * (2 * axes)
    if axes == 1:
        kernel, strides, dilations, pads = [1, *kernel], [1, *strides], [1, *dilations], [0, pads[0], 0, pads[1]]
        extents = [1, *extents]
    up = strides if attribute(node, "ceil_mode", 0) else [1, 1]
    out = []
    for axis in range(2):
        room = t.dim(x.dims[2 + axis]) + pads[axis] + pads[axis + 2] - extents[axis]
        count = t.plain(t.tir.floordiv(room + up[axis] - 1, t.dim(strides[axis])) + 1)
        if attribute(node, "ceil_mode", 0):
            # A window that begins behind the image is left out.
            last = t.tir.floordiv(t.dim(x.dims[2 + axis]) + pads[axis] - 1, t.dim(strides[axis])) + 1
            count = t.plain(t.tir.min(t.dim(count), last))
        out.append(count)
    sizes = [tuple(int(v) for v in part) for part in (kernel, strides, dilations, pads[:2])]
    return Window(*sizes), out  # type: ignore[arg-type]


def _same(
    t: Translator, node: ir.Node, sizes: list[Any], extents: list[int], strides: list[int], upper: bool
) -> list[int]:
    begins, ends = [], []
    for size, extent, stride in zip(sizes, extents, strides, strict=True):
        if not isinstance(size, int):
            t.refuse(node, "auto_pad of a size that is not fixed")
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends


def _image(t: Translator, node: ir.Node, x: Operand) -> Operand:
    """The operand with two axes of pixels."""
    t.require_float(node, x)
    if x.rank == 3:
        dims = [*x.dims[:2], 1, x.dims[2]]
        return Operand(x.dtype, dims, t.reshape(t.tensor(x), dims))
    if x.rank != 4:
        t.refuse(node, f"its input has rank {x.rank}; it takes 3 and 4")
    return x


def _result(t: Translator, var: Any, dims: list[Any], rank: int) -> Operand:
    """The operand of images with channels last, (batch, rows, columns, channels) in memory."""
    dtype = str(t.force(var).ty.dtype)
    whole = Operand(dtype, dims, var, order=LAST)
    if rank == 4:
        return whole
    flat = [*dims[:2], dims[3]]
    return Operand(dtype, flat, t.reshape(t.tensor(whole), flat))


@emits("Conv")
def _conv(t: Translator, node: ir.Node) -> Operand:
    given = [*t.inputs(node), None]
    x, weight, bias = given[:3]
    assert x is not None and weight is not None
    if weight.array is None or (bias is not None and bias.array is None):
        t.refuse(node, "its weights are not constant")
    filters = weight.array
    assert filters is not None
    rank, image = x.rank, _image(t, node, x)
    window, (rows, columns) = _geometry(t, node, image, list(filters.shape[2:]))
    filters = filters.reshape(*filters.shape[:2], *window.kernel)
    groups, channels = int(attribute(node, "group", 1)), image.dims[1]
    count = filters.shape[0]
    dims = [image.dims[0], count, rows, columns]
    name = weight.name or "filters"
    numbers = np.zeros(count, filters.dtype) if bias is None or bias.array is None else bias.array
    pixels = t.force(t.arranged(image, LAST))
    activation, relu = None, _sole_relu(node)
    if groups == channels == count and groups > 1:
        flat = np.ascontiguousarray(filters.reshape(count, -1).T)
        inputs = [pixels, t.parameter(flat, f"{name}.taps"), t.parameter(numbers, f"{name}.bias")]
        shape = [image.dims[0], rows, columns, count]
        return _result(t, t.call(DepthwiseConv(window), inputs, (shape, x.dtype)), dims, rank)
    if relu is not None and rank == 4:
        activation = "relu"
    parts = []
    if groups > _MOST_GROUPS:
        t.refuse(node, f"it has {groups} groups; it takes up to {_MOST_GROUPS}, or one for each channel")
    each, own = count // groups, filters.shape[1]
    for g in range(groups):
        part = pixels if groups == 1 else _channels(t, pixels, g * own, own)
        matrix = filters[g * each : (g + 1) * each].transpose(2, 3, 1, 0).reshape(-1, each)
        operand = Operand.constant(
            np.ascontiguousarray(matrix), f"{name}.matrix{g}" if groups > 1 else f"{name}.matrix"
        )
        added = Operand.constant(
            numbers[g * each : (g + 1) * each], f"{name}.bias{g}" if groups > 1 else f"{name}.bias"
        )
        parts.append(_product(t, part, window, operand, added, rows, columns, activation))
    var = parts[0] if groups == 1 else _joined(t, parts, dims)
    result = _result(t, var, dims, rank)
    if activation is not None and relu is not None:
        t.done.add(relu)
        t.values[relu.outputs[0]] = result
    return result


def _product(
    t: Translator, pixels: Any, window: Window, matrix: Operand, bias: Operand, rows: Any, columns: Any, act: str | None
) -> Any:
    """Images times a matrix of filters: (batch, rows, columns, filters)."""
    batch, depth = pixels.ty.shape[0], int(matrix.dims[0])
    if window != Window((1, 1)):
        height, width, channels = list(pixels.ty.shape)[1:]
        lines = t.reshape(pixels, [batch, height, t.product([width, channels])])
        pixels = t.call(Patches(window), [lines], ([batch, rows, columns, depth], str(pixels.ty.dtype)))
    flat = t.reshape(pixels, [t.product([batch, rows, columns]), depth])
    return t.reshape(t.device.linear(t, flat, matrix, bias, act, None), [batch, rows, columns, matrix.dims[1]])


def _sole_relu(node: ir.Node) -> ir.Node | None:
    """The Relu that alone reads the output of a node."""
    value = node.outputs[0]
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and is_op(users[0], "Relu") and not value.is_graph_output() else None


def _channels(t: Translator, pixels: Any, first: int, count: int) -> Any:
    dims = [*list(pixels.ty.shape)[:3], count]
    return t.force(t.compute("channels", [pixels], lambda i, v: v(*i[:3], i[3] + first), dims, str(pixels.ty.dtype)))


def _joined(t: Translator, parts: list[Any], dims: list[Any]) -> Any:
    each = int(parts[0].ty.shape[3])

    def element(i: Any, *tensors: Any) -> Any:
        result = tensors[-1](*i[:3], i[3] - each * (len(tensors) - 1))
        for g in range(len(tensors) - 2, -1, -1):
            result = t.tir.if_then_else(i[3] < each * (g + 1), tensors[g](*i[:3], i[3] - each * g), result)
        return result

    return t.force(t.compute("join", parts, element, [dims[axis] for axis in LAST], str(parts[0].ty.dtype)))


@emits("MaxPool", "AveragePool")
def _pool(t: Translator, node: ir.Node) -> Operand:
    (x,) = t.inputs(node)
    assert x is not None
    rank, image = x.rank, _image(t, node, x)
    window, (rows, columns) = _geometry(t, node, image, attribute(node, "kernel_shape"))
    kind = "max"
    if node.op_type == "AveragePool":
        kind = "mean_padded" if attribute(node, "count_include_pad", 0) else "mean"
        if kind == "mean_padded" and attribute(node, "ceil_mode", 0):
            t.refuse(node, "count_include_pad together with ceil_mode")
    dims = [image.dims[0], image.dims[1], rows, columns]
    shape = [dims[axis] for axis in LAST]
    made = t.call(Pool(window, kind), [t.arranged(image, LAST)], (shape, x.dtype))
    return _result(t, made, dims, rank)


_REDUCTIONS = {
    "ReduceMean": "mean",
    "ReduceSum": "sum",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceSumSquare": "sum_square",
    "ReduceL2": "sum_square",
}


@emits(*_REDUCTIONS)
def _reduce(t: Translator, node: ir.Node) -> Operand:
    x, *rest = t.inputs(node)
    assert x is not None
    given = attribute(node, "axes")
    if rest and rest[0] is not None:
        given = numbers_of(t, node, rest[0], "axes")
    if not given and attribute(node, "noop_with_empty_axes", 0):
        return x
    axes = sorted({a % x.rank for a in given} if given else range(x.rank))
    made = reduced(t, node, x, axes, _REDUCTIONS[node.op_type], bool(attribute(node, "keepdims", 1)))
    if node.op_type == "ReduceL2":
        return elementwise(t, "sqrt", [made], lambda v: t.tir.sqrt(v), made.dtype)
    return made


@emits("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(t: Translator, node: ir.Node) -> Operand:
    (x,) = t.inputs(node)
    assert x is not None
    kind = "mean" if node.op_type == "GlobalAveragePool" else "max"
    return reduced(t, node, x, list(range(2, x.rank)), kind, True)


def reduced(t: Translator, node: ir.Node, x: Operand, axes: list[int], kind: str, keep: bool) -> Operand:
    """A reduction over some axes."""
    t.require_float(node, x)
    order = list(x.order or range(x.rank))
    places = [order.index(axis) for axis in axes]
    if max(places) - min(places) + 1 == len(places):
        var = t.stored(x)
    else:
        order = [*[a for a in range(x.rank) if a not in axes], *axes]
        var, places = t.arranged(x, tuple(order)), [order.index(axis) for axis in axes]
    first, last = min(places), max(places) + 1
    sizes = [x.dims[axis] for axis in order]
    outer, width, inner = (t.product(part) for part in (sizes[:first], sizes[first:last], sizes[last:]))
    made = t.call(Reduce(kind), [t.reshape(var, [outer, width, inner])], ([outer, inner], x.dtype))
    kept = [axis for axis in order if axis not in axes]
    result = Operand(x.dtype, [x.dims[a] for a in kept], t.reshape(made, [x.dims[a] for a in kept]))
    if kept != sorted(kept):
        result.dims = [x.dims[a] for a in sorted(kept)]
        back = [sorted(kept).index(a) for a in kept]
        result.order = tuple(back)
        result = Operand(x.dtype, result.dims, t.tensor(result))
    if keep:
        dims = [1 if a in axes else d for a, d in enumerate(x.dims)]
        result = Operand(x.dtype, dims, t.reshape(t.tensor(result), dims))
    return result
