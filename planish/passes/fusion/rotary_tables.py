"""The tables of cosines and sines as RotaryEmbedding takes them, (B, S, D/2), from ones that hold each angle twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op
from planish.passes.base import Decline
from planish.passes.fusion.sizes import contents, rank, scalar, size_vector, sizes

_DEPTH = 12
_LARGEST = 1 << 24  # elements of a constant table that is looked at
_UNARY = ("Cos", "Sin", "Cast", "Identity", "Neg")


def build_tables(
    op: Any, tables: tuple[ir.Value, ir.Value], axis: int, interleaved: bool, heads: ir.Value, graph: ir.Graph
) -> list[ir.Value]:
    """Cosines and sines for `heads`, (B, H, S, D) or (B, S, H, D), from tables that broadcast to it.

    Args:
        op: the builder of the rewrite.
        axis: of the heads.
        interleaved: each angle stands twice in a row; False: all stand there, and then all again.
        graph: where the new nodes will be.

    Raises:
        Decline: a table is not proved to hold each angle twice.
    """
    return [_fitted(op, _rows(op, table, axis, interleaved), heads, graph) for table in tables]


def _rows(op: Any, table: ir.Value, axis: int, interleaved: bool) -> ir.Value:
    """The table with each angle once and without the axis of the heads, (B or 1, S, D/2)."""
    node = table.producer()
    inserted = contents(node.inputs[1]) if node is not None and is_op(node, "Unsqueeze") else None
    if rank(table) == 4 and inserted in ((axis,), (axis - 4,)) and node is not None and node.inputs[0] is not None:
        return halved(op, node.inputs[0], interleaved)
    found = halved(op, table, interleaved)
    dims = list(found.shape or ())
    place = axis - (4 - len(dims))
    if place >= 0:
        del dims[place]
        found = _shaped(op.Squeeze(found, [place]), table, dims)
    if len(dims) < 3:
        missing = 3 - len(dims)
        found = _shaped(op.Unsqueeze(found, list(range(missing))), table, [1] * missing + dims)
    return found


def _fitted(op: Any, table: ir.Value, heads: ir.Value, graph: ir.Graph) -> ir.Value:
    """`table`, (B or 1, S, D/2), for each row of the batch of `heads`."""
    batch, own = (sizes(heads) or ())[0], (sizes(table) or ())[0]
    if own == batch:
        return table
    # One table for all rows of the batch.
    count = size_vector(op, batch, heads, 0, graph)
    if isinstance(count, np.ndarray):
        target: Any = np.array([count[0], 1, 1], dtype=np.int64)
    else:
        target = op.Concat(count, np.array([1, 1], dtype=np.int64), axis=0)
    shape = (heads.shape or ir.Shape([None]))[0]
    return _shaped(op.Expand(table, target), table, [shape, *(table.shape or ())[1:]])


def halved(op: Any, value: ir.Value, interleaved: bool, depth: int = _DEPTH) -> ir.Value:
    """`value` with each pair of equal items of its last axis once.

    Raises:
        Decline: that they are equal is not proved.
    """
    refusal = Decline(f"'{value.name}' is not proved to hold each angle twice")
    dims, node = sizes(value), value.producer()
    if not dims or not isinstance(dims[-1], int) or dims[-1] % 2 or not depth:
        raise refusal
    array = constant_array(value, _LARGEST)
    if array is not None:
        return _halved_constant(op, array, interleaved, refusal)
    once = _repeated(op, node, interleaved)
    if once is None:
        once = _through(op, node, interleaved, depth)
    if once is None:
        raise refusal
    return _shaped(once, value, [*(value.shape or ())[:-1], dims[-1] // 2])


def _halved_constant(op: Any, array: np.ndarray, interleaved: bool, refusal: Decline) -> ir.Value:
    half = array.shape[-1] // 2
    first, second = (array[..., ::2], array[..., 1::2]) if interleaved else (array[..., :half], array[..., half:])
    if not np.array_equal(first, second):
        raise refusal
    made: ir.Value = op.initializer(np.ascontiguousarray(first), name="rotary_table")
    return made


def _repeated(op: Any, node: ir.Node | None, interleaved: bool) -> ir.Value | None:
    """What `node` repeats along the last axis, twice."""
    if not interleaved:
        if not is_op(node, "Concat") or node is None or len(node.inputs) != 2:
            return None
        last = node.attributes.get_int("axis", 0) in (-1, (rank(node.outputs[0]) or 0) - 1)
        return node.inputs[0] if last and node.inputs[0] is node.inputs[1] else None
    if not is_op(node, "Reshape") or node is None:
        return None
    middle = node.inputs[0]
    after, dims = sizes(node.outputs[0]), sizes(middle)
    pair = middle.producer() if middle is not None else None
    if after is None or dims is None or dims[-1] != 2 or not isinstance(dims[-2], int):
        return None
    if after != (*dims[:-2], 2 * dims[-2]) or not is_op(pair, "Expand", "Concat") or pair is None:
        return None
    if pair.op_type == "Concat" and (len(pair.inputs) != 2 or pair.inputs[0] is not pair.inputs[1]):
        return None
    up = pair.inputs[0].producer() if pair.inputs[0] is not None else None
    # Only the appended axis may be repeated.
    if not is_op(up, "Unsqueeze") or up is None or sizes(up.outputs[0]) != (*dims[:-1], 1):
        return None
    return _without_last(op, up)


def _without_last(op: Any, up: ir.Node) -> ir.Value | None:
    """What an Unsqueeze gives but for the axis it appends."""
    count, axes = rank(up.outputs[0]), contents(up.inputs[1])
    if count is None or axes is None or not all(isinstance(a, int) for a in axes):
        return None
    kept = sorted(a % count for a in axes if isinstance(a, int))
    if count - 1 not in kept:
        return None
    kept.remove(count - 1)
    return op.Unsqueeze(up.inputs[0], kept) if kept else up.inputs[0]  # type: ignore[no-any-return]


def _through(op: Any, node: ir.Node | None, interleaved: bool, depth: int) -> ir.Value | None:
    """The same operator of a halved input, if it treats the items of the last axis alike."""
    if node is None or node.domain or len(node.outputs) != 1:
        return None
    build = getattr(op, node.op_type)
    index = 0
    if node.op_type in ("Mul", "Div", "Add"):
        index = next((i for i in (0, 1) if scalar(node.inputs[1 - i]) is not None), -1)
        if index < 0:
            return None
    elif node.op_type in ("Unsqueeze", "Squeeze"):
        longer = node.outputs[0] if node.op_type == "Unsqueeze" else node.inputs[0]
        axes = contents(node.inputs[1]) if len(node.inputs) > 1 else None
        count = rank(longer)
        if axes is None or count is None or any(not isinstance(a, int) or a % count == count - 1 for a in axes):
            return None
    elif node.op_type == "Gather":
        axes_of_table = rank(node.inputs[0]) or 1
        if node.attributes.get_int("axis", 0) % axes_of_table == axes_of_table - 1:
            return None
    elif node.op_type not in _UNARY:
        return None
    source = node.inputs[index]
    if source is None:
        return None
    inputs = list(node.inputs)
    inputs[index] = halved(op, source, interleaved, depth - 1)
    made: ir.Value = build(*inputs, **dict(node.attributes))
    return made


def _shaped(value: ir.Value, like: ir.Value, dims: Any) -> ir.Value:
    if value.shape is None:
        value.shape = ir.Shape(list(dims))
    if value.type is None:
        value.type = like.type
    return value
