"""What the inputs of a graph are used for: the rows of the table they index, the convolution they enter.

Traces an input forward through operators that keep its elements what they are, into model-local functions and
subgraphs too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor

#: Operator → operand positions whose elements pass through to its output 0.
_THROUGH: dict[str, tuple[int, ...]] = {
    "Identity": (0,),
    "Cast": (0,),
    "CastLike": (0,),
    "Reshape": (0,),
    "Flatten": (0,),
    "Squeeze": (0,),
    "Unsqueeze": (0,),
    "Transpose": (0,),
    "Expand": (0,),
    "Tile": (0,),
    "Slice": (0,),
    "Pad": (0,),
    "Clip": (0,),
    "Where": (1, 2),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Split": (0,),
    "Concat": tuple(range(64)),
    "Add": (0, 1),
    "Sub": (0,),
    "Min": (0, 1),
    "Max": (0, 1),
}
#: com.microsoft.EmbedLayerNormalization: operand with ids → operand with the table.
_EMBED_TABLES = {0: 2, 1: 4, 8: 3}
_LIMIT = 4096


@dataclass
class Uses:
    """What tracing one input found.

    Attributes:
        rows: smallest number of rows among the tables that it indexes; None if it indexes none. Dims that are
            symbols are given by `symbols` instead.
        symbols: names of symbolic sizes that it indexes into.
        operators: (operator, operand position) of every use at the end of a trace.
        convolutions: Conv nodes whose data it is.
    """

    rows: int | None = None
    symbols: set[str] = field(default_factory=set)
    operators: set[tuple[str, int]] = field(default_factory=set)
    convolutions: list[ir.Node] = field(default_factory=list)

    def bound(self, sizes: Mapping[str, int]) -> int | None:
        """Largest valid index plus one, with the sizes of symbols known."""
        bounds = [sizes[s] for s in self.symbols if s in sizes]
        if self.rows is not None:
            bounds.append(self.rows)
        return min(bounds, default=None)


def uses_of(value: ir.Value, model: ir.Model) -> Uses:
    """Traces `value`, an input of `model`, to what it is used for."""
    found = Uses()
    # Each item: a value that carries elements of the input, and what was added to them on the way.
    queue: list[tuple[ir.Value, int]] = [(value, 0)]
    seen: set[ir.Value] = {value}
    while queue and len(seen) < _LIMIT:
        current, shift = queue.pop()
        for node, position in current.uses():
            _end(node, position, shift, found)
            for target, offset in _onward(node, position, model):
                if target not in seen:
                    seen.add(target)
                    queue.append((target, shift + offset))
    return found


def _onward(node: ir.Node, position: int, model: ir.Model) -> Iterator[tuple[ir.Value, int]]:
    function = model.functions.get((node.domain, node.op_type, node.overload))
    if function is not None:
        if position < len(function.inputs):
            yield function.inputs[position], 0
        return
    if node.domain or position not in _THROUGH.get(node.op_type, ()):
        return
    offset = 0
    if node.op_type in ("Add", "Sub"):
        constant = _scalar(node.inputs[1 - position])
        if constant is None:
            return  # an index plus something unknown
        offset = constant if node.op_type == "Add" else -constant
    yield from ((v, offset) for v in node.outputs)


def _end(node: ir.Node, position: int, shift: int, found: Uses) -> None:
    found.operators.add((node.op_type, position))
    op = node.op_type
    if node.domain == "com.microsoft":
        if op == "EmbedLayerNormalization" and position in _EMBED_TABLES:
            _index(node.inputs[_EMBED_TABLES[position]], [0], shift, found)
        elif op == "GatherBlockQuantized" and position == 1:
            _index(node.inputs[0], [_int_attribute(node, "gather_axis")], shift, found)
    elif node.domain:
        return
    elif op in ("Gather", "GatherElements", "ScatterElements") and position == 1:
        _index(node.inputs[0], [_int_attribute(node, "axis")], shift, found)
    elif op in ("GatherND", "ScatterND") and position == 1:
        batch = _int_attribute(node, "batch_dims")
        depth = node.inputs[1].shape[-1] if node.inputs[1] is not None and node.inputs[1].shape else 1
        _index(node.inputs[0], list(range(batch, batch + (depth if isinstance(depth, int) else 1))), shift, found)
    elif op == "OneHot" and position == 0:
        depth_value = _scalar(node.inputs[1])
        if depth_value is not None:
            found.rows = min(found.rows or depth_value, depth_value)
    elif op == "Conv" and position == 0:
        found.convolutions.append(node)


def _index(table: ir.Value | None, axes: list[int], shift: int, found: Uses) -> None:
    if table is None or table.shape is None or len(table.shape) == 0:
        return
    for axis in axes:
        dim = table.shape[axis] if axis < len(table.shape) else None
        if isinstance(dim, int):
            rows = max(dim - max(shift, 0), 1)
            found.rows = rows if found.rows is None else min(found.rows, rows)
        elif dim is not None and dim.value is not None:
            found.symbols.add(dim.value)


def patch_image_size(convolution: ir.Node) -> int | None:
    """Side of the image that fits the position embeddings behind a patch convolution; None if there are none.

    A vision transformer adds a constant [1, n, d] to the patches, with up to two class tokens among the n.
    """
    weight = convolution.inputs[1]
    strides = convolution.attributes.get("strides")
    if weight is None or strides is None or strides.value[0] < 4:
        return None
    queue, seen = [convolution.outputs[0]], 0
    while queue and seen < 64:
        value = queue.pop(0)
        for node in value.consumers():
            seen += 1
            if node.op_type == "Add":
                side = _grid_side(node, value)
                if side is not None:
                    return side * int(strides.value[0])
            if node.op_type in ("Reshape", "Transpose", "Concat", "Flatten", "Add", "Identity", "Cast"):
                queue.extend(node.outputs)
    return None


def _grid_side(node: ir.Node, value: ir.Value) -> int | None:
    for other in node.inputs:
        if other is None or other is value or other.shape is None or len(other.shape) not in (2, 3):
            continue
        rows = other.shape[-2]
        if other.producer() is None or other.const_value is not None or not isinstance(rows, int):
            if not isinstance(rows, int):
                continue
            for extra in (0, 1, 2):
                side = math.isqrt(rows - extra) if rows > extra else 0
                if side > 1 and side * side == rows - extra:
                    return side
    return None


def _scalar(value: ir.Value | None) -> int | None:
    """The constant behind a value of one element, as an int."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    number = float(np.asarray(tensor.numpy()).reshape(-1)[0])
    return int(number) if math.isfinite(number) else None


def _int_attribute(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return int(attribute.value) if attribute is not None and not attribute.is_ref() else 0
