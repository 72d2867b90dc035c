"""Gathers. Indices are checked first: TVM's code would read whatever lies there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, axis_of, emits


def checked(t: Translator, node: ir.Node, indices: Operand, limits: list[Any]) -> Any:
    """The variable of indices (count, axes), all of them inside of `limits`."""
    from planish.runtime.kernels.indices import CheckIndices

    if indices.dtype not in ("int64", "int32"):
        t.refuse(node, f"its indices are {indices.dtype}")
    axes = len(limits)
    count = t.product(indices.dims) if axes == 1 else t.product(indices.dims[:-1])
    key = ("checked", id(indices), tuple(map(str, limits)))
    if key not in t.derived:
        flat = t.reshape(t.tensor(indices), [count, axes])
        limit = t.device.sizes(t, limits)
        made = t.call(CheckIndices(indices.dtype), [flat, limit], ((count, axes), "int64"))
        t.derived[key] = (indices, made)
    return t.derived[key][1]


@emits("Gather")
def _gather(t: Translator, node: ir.Node) -> Operand:
    data, indices = t.inputs(node)
    assert data is not None and indices is not None
    axis = axis_of(node, data.rank, 0)
    known, at = data.elements(), indices.numbers()
    if known is not None and data.rank == 1 and at is not None:
        return Operand.of_sizes(np.asarray(known[np.array(at, int).reshape(indices.array.shape)], object), data.dtype)  # type: ignore[union-attr]
    dims = [*data.dims[:axis], *indices.dims, *data.dims[axis + 1 :]]
    rank = indices.rank
    limit = data.dims[axis]
    if at is not None and all(_inside(t, a, limit) for a in at):
        fixed = np.array([a % limit if isinstance(limit, int) else a for a in at], np.int64)
        if fixed.size == 1:
            number = t.tir.IntImm("int64", int(fixed[0]))
            var = t.compute(
                "select", [t.tensor(data)], lambda i, v: v(*i[:axis], number, *i[axis + rank :]), dims, data.dtype
            )
            return Operand(data.dtype, dims, var)
        flat = Operand.constant(fixed)
        chosen = t.tensor(flat)
    else:
        chosen = t.reshape(checked(t, node, indices, [limit]), [t.product(indices.dims)])
    places = t.reshape(chosen, indices.dims or [1])
    var = t.compute(
        "gather",
        [t.tensor(data), places],
        lambda i, v, p: v(*i[:axis], p(*(i[axis : axis + rank] or [0])), *i[axis + rank :]),
        dims,
        data.dtype,
    )
    return Operand(data.dtype, dims, var)


def _inside(t: Translator, index: int, limit: Any) -> bool:
    """Whether an index is inside of an axis, whatever the inputs."""
    if isinstance(limit, int):
        return -limit <= index < limit
    return index >= 0 and bool(t.analyzer.can_prove(t.dim(limit) > index))


@emits("GatherElements")
def _gather_elements(t: Translator, node: ir.Node) -> Operand:
    data, indices = t.inputs(node)
    assert data is not None and indices is not None
    axis = axis_of(node, data.rank, 0)
    places = t.reshape(checked(t, node, indices, [data.dims[axis]]), indices.dims)
    for at, (a, b) in enumerate(zip(indices.dims, data.dims, strict=True)):
        if at != axis and isinstance(a, int) and isinstance(b, int) and a > b:
            t.refuse(node, f"its indices have size {a} in dimension {at} and its data {b}")
    # Along the other axes the data is at least as long; where that can not be proved, the sizes must be equal.
    data = t.match(
        data, [d if at == axis or isinstance(d, int) else indices.dims[at] for at, d in enumerate(data.dims)]
    )
    var = t.compute(
        "gather_elements",
        [t.tensor(data), places],
        lambda i, v, p: v(*i[:axis], p(*i), *i[axis + 1 :]),
        indices.dims,
        data.dtype,
    )
    return Operand(data.dtype, indices.dims, var)


@emits("GatherND")
def _gather_nd(t: Translator, node: ir.Node) -> Operand:
    data, indices = t.inputs(node)
    assert data is not None and indices is not None
    depth = indices.dims[-1]
    if attribute(node, "batch_dims", 0) or not isinstance(depth, int):
        t.refuse(node, "batch_dims, or a depth that is not fixed")
    places = t.reshape(checked(t, node, indices, list(data.dims[:depth])), indices.dims)
    outer = indices.rank - 1
    dims = [*indices.dims[:-1], *data.dims[depth:]]
    var = t.compute(
        "gather_nd",
        [t.tensor(data), places],
        lambda i, v, p: v(*[p(*i[:outer], axis) for axis in range(depth)], *i[outer:]),
        dims,
        data.dtype,
    )
    return Operand(data.dtype, dims, var)


def rows_at(t: Translator, table: Operand, positions: Operand) -> Operand:
    """The rows of a matrix at positions (batch, length)."""
    from planish.runtime.kernels.indices import CheckIndices

    count = t.product(positions.dims)
    limit = t.device.sizes(t, [table.dims[0]])
    flat = t.reshape(t.tensor(positions), [count, 1])
    places = t.reshape(t.call(CheckIndices(positions.dtype), [flat, limit], ((count, 1), "int64")), positions.dims)
    dims = [*positions.dims, table.dims[1]]
    var = t.compute("gather", [t.tensor(table), places], lambda i, v, p: v(p(*i[:-1]), i[-1]), dims, table.dtype)
    return Operand(table.dtype, dims, var)
