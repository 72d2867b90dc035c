"""Operators that move elements: shapes, reshapes, transposes, slices, joins and gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, axis_of, emits


def sizes_of(t: Translator, node: ir.Node, operand: Operand | None, what: str) -> list[Any]:
    """The elements of an operand that names sizes or axes."""
    elements = None if operand is None else operand.elements()
    if elements is None:
        t.refuse(node, f"its {what} is not known from the sizes of the inputs")
    assert elements is not None
    return [t.plain(item) for item in elements.reshape(-1)]


def numbers_of(t: Translator, node: ir.Node, operand: Operand | None, what: str) -> list[int]:
    numbers = None if operand is None else operand.numbers()
    if numbers is None:
        t.refuse(node, f"its {what} is not constant")
    assert numbers is not None
    return numbers


@emits("Shape")
def _shape(t: Translator, node: ir.Node) -> Operand:
    (x,) = t.inputs(node)
    assert x is not None
    start, end = int(attribute(node, "start", 0)), attribute(node, "end")
    return Operand.of_sizes(_objects(x.dims[slice(start, end)]))


@emits("Size")
def _size(t: Translator, node: ir.Node) -> Operand:
    (x,) = t.inputs(node)
    assert x is not None
    return Operand.of_sizes(_objects([t.product(x.dims)]).reshape(()))


def _objects(items: Sequence[Any]) -> np.ndarray:
    made = np.empty(len(items), object)
    made[:] = list(items)
    return made


def view(t: Translator, x: Operand, dims: Sequence[Any]) -> Operand:
    """The operand with other sizes."""
    if x.array is not None and all(isinstance(d, int) for d in dims):
        return Operand.constant(x.array.reshape([int(d) for d in dims]), f"{x.name}.view" if x.name else "")
    if x.sizes is not None and len(dims) < 2:
        return Operand.of_sizes(x.sizes.reshape([int(d) for d in dims]), x.dtype)
    return Operand(x.dtype, list(dims), t.reshape(t.tensor(x), dims))


@emits("Reshape")
def _reshape(t: Translator, node: ir.Node) -> Operand:
    x, shape = t.inputs(node)[:2]
    assert x is not None
    wanted = sizes_of(t, node, shape, "shape")
    zero_is_copy = not attribute(node, "allowzero", 0)
    dims = [x.dims[i] if zero_is_copy and isinstance(d, int) and d == 0 else d for i, d in enumerate(wanted)]
    free = [i for i, d in enumerate(dims) if isinstance(d, int) and d == -1]
    if free:
        dims[free[0]] = _rest(t, x.dims, [d for i, d in enumerate(dims) if i != free[0]])
    return view(t, x, dims)


def _rest(t: Translator, have: Sequence[Any], known: Sequence[Any]) -> Any:
    """The size that -1 stands for: sizes that are on both sides cancel."""
    left, below = list(have), []
    for size in known:
        same = next((i for i, other in enumerate(left) if t.equal(size, other)), None)
        if same is None:
            below.append(size)
        else:
            left.pop(same)
    return t.plain(t.tir.floordiv(t.dim(t.product(left)), t.dim(t.product(below)))) if below else t.product(left)


@emits("Flatten")
def _flatten(t: Translator, node: ir.Node) -> Operand:
    (x,) = t.inputs(node)
    assert x is not None
    axis = int(attribute(node, "axis", 1))
    axis = axis + x.rank if axis < 0 else axis
    return view(t, x, [t.product(x.dims[:axis]), t.product(x.dims[axis:])])


@emits("Unsqueeze")
def _unsqueeze(t: Translator, node: ir.Node) -> Operand:
    x, axes = t.inputs(node)
    assert x is not None
    numbers = numbers_of(t, node, axes, "axes")
    rank = x.rank + len(numbers)
    added = {a + rank if a < 0 else a for a in numbers}
    rest = iter(x.dims)
    return view(t, x, [1 if axis in added else next(rest) for axis in range(rank)])


@emits("Squeeze")
def _squeeze(t: Translator, node: ir.Node) -> Operand:
    x, *rest = t.inputs(node)
    assert x is not None
    if rest and rest[0] is not None:
        gone = {a + x.rank if a < 0 else a for a in numbers_of(t, node, rest[0], "axes")}
    else:
        gone = {axis for axis, d in enumerate(x.dims) if isinstance(d, int) and d == 1}
    return view(t, x, [d for axis, d in enumerate(x.dims) if axis not in gone])


@emits("Transpose")
def _transpose(t: Translator, node: ir.Node) -> Operand:
    (x,) = t.inputs(node)
    assert x is not None
    perm = attribute(node, "perm") or list(range(x.rank))[::-1]
    if x.array is not None:
        return Operand.constant(x.array.transpose(perm), f"{x.name}.t" if x.name else "")
    dims = [x.dims[axis] for axis in perm]
    # Where the result's axes lie in memory if nothing is moved.
    order = tuple(perm.index(axis) for axis in (x.order or range(x.rank)))
    lazy = Operand(x.dtype, dims, t.stored(x), order=order)
    if order == tuple(range(x.rank)):
        return Operand(x.dtype, dims, t.stored(x))
    if x.rank == 4 and order == (0, 2, 3, 1):
        return lazy  # images with their channels last are what convolutions want
    return Operand(x.dtype, dims, t.tensor(lazy))


@emits("Expand")
def _expand(t: Translator, node: ir.Node) -> Operand:
    from planish.runtime.relax.elementwise import broadcast

    x, shape = t.inputs(node)
    assert x is not None
    wanted = sizes_of(t, node, shape, "shape")
    dims, (x, _) = broadcast(t, [x, Operand(x.dtype, wanted, t)])
    if len(dims) == x.rank and all(t.equal(a, b) for a, b in zip(dims, x.dims, strict=True)):
        return x
    shift = len(dims) - x.rank
    ones = [isinstance(d, int) and d == 1 for d in map(t.plain, x.dims)]
    number = x.scalar()
    if number is not None:
        constant = t.tir.const(number.item(), x.dtype)
        return Operand(x.dtype, dims, t.compute("fill", [], lambda i: constant, dims, x.dtype))
    var = t.compute(
        "expand",
        [t.tensor(x)],
        lambda i, v: v(*[0 if one else i[axis + shift] for axis, one in enumerate(ones)]),
        dims,
        x.dtype,
    )
    return Operand(x.dtype, dims, var)


@emits("ConstantOfShape")
def _constant_of_shape(t: Translator, node: ir.Node) -> Operand:
    dims = sizes_of(t, node, t.inputs(node)[0], "shape")
    given = attribute(node, "value")
    number = np.zeros((), np.float32) if given is None else given.numpy().reshape(())
    if len(dims) == 1 and isinstance(dims[0], int) and number.dtype.kind == "i":
        return Operand.constant(np.full(dims, number))
    constant = t.tir.const(number.item(), str(number.dtype))
    return Operand(str(number.dtype), dims, t.compute("fill", [], lambda i: constant, dims, str(number.dtype)))


@emits("Range")
def _range(t: Translator, node: ir.Node) -> Operand:
    start, limit, step = (sizes_of(t, node, o, "range")[0] for o in t.inputs(node))
    if not isinstance(step, int) or step < 1:
        t.refuse(node, "its step is not a positive constant")
    count = t.plain(t.tir.floordiv(t.dim(limit) - t.dim(start) + (step - 1), t.dim(step)))
    var = t.compute("range", [], lambda i: t.dim(start) + i[0] * step, [count], "int64")
    return Operand("int64", [count], var)


@emits("Concat")
def _concat(t: Translator, node: ir.Node) -> Operand:
    operands = [o for o in t.inputs(node) if o is not None]
    axis = axis_of(node, operands[0].rank, 0)
    elements = [o.elements() for o in operands]
    if operands[0].rank == 1 and all(e is not None for e in elements):
        return Operand.of_sizes(np.concatenate(elements))  # type: ignore[arg-type]
    dims = list(operands[0].dims)
    operands = [t.match(o, [*dims[:axis], o.dims[axis], *dims[axis + 1 :]]) for o in operands]
    starts = [0]
    for operand in operands:
        starts.append(t.plain(t.dim(starts[-1]) + t.dim(operand.dims[axis])))
    dims[axis] = starts[-1]

    def element(i: Sequence[Any], *parts: Any) -> Any:
        result = None
        for part, start, end in reversed(list(zip(parts, starts, starts[1:], strict=False))):
            value = part(*i[:axis], i[axis] - start, *i[axis + 1 :])
            result = value if result is None else t.tir.if_then_else(i[axis] < end, value, result)
        return result

    var = t.compute("concat", [t.tensor(o) for o in operands], element, dims, operands[0].dtype)
    return Operand(operands[0].dtype, dims, var)


@emits("Split")
def _split(t: Translator, node: ir.Node) -> list[Operand]:
    x, *rest = t.inputs(node)
    assert x is not None
    axis, count = axis_of(node, x.rank, 0), len(node.outputs)
    if rest and rest[0] is not None:
        parts = numbers_of(t, node, rest[0], "split")
    else:
        size = x.dims[axis]
        if not isinstance(size, int):
            t.refuse(node, f"axis {axis} has no fixed size")
        part = -(-size // count)
        parts = [min(part, size - part * i) for i in range(count)]
    made, start = [], 0
    for part in parts:
        made.append(_sliced(t, x, {axis: (start, 1, part)}))
        start += part
    return made


@emits("Slice")
def _slice(t: Translator, node: ir.Node) -> Operand:
    x, starts, ends, *rest = t.inputs(node)
    assert x is not None
    first, last = sizes_of(t, node, starts, "starts"), sizes_of(t, node, ends, "ends")
    axes = numbers_of(t, node, rest[0], "axes") if rest and rest[0] is not None else list(range(len(first)))
    steps = numbers_of(t, node, rest[1], "steps") if len(rest) > 1 and rest[1] is not None else [1] * len(first)
    known = x.elements()
    if known is not None and x.rank == 1 and all(isinstance(v, int) for v in (*first, *last)):
        return Operand.of_sizes(known[slice(first[0], last[0], steps[0])], x.dtype)
    cuts = {}
    for start, end, axis, step in zip(first, last, axes, steps, strict=True):
        axis = axis + x.rank if axis < 0 else axis
        if step < 1:
            t.refuse(node, f"its step is {step}; it takes positive ones")
        size = x.dims[axis]
        begin, stop = (_clamped(t, edge, size) for edge in (start, end))
        count = t.plain(t.tir.max(t.tir.floordiv(t.dim(stop) - t.dim(begin) + (step - 1), t.dim(step)), t.dim(0)))
        cuts[axis] = (begin, step, count)
    return _sliced(t, x, cuts)


def _clamped(t: Translator, edge: Any, size: Any) -> Any:
    if isinstance(edge, int) and edge < 0:
        return t.plain(t.tir.max(t.dim(size) + edge, t.dim(0)))
    return t.plain(t.tir.min(t.dim(edge), t.dim(size)))


def _sliced(t: Translator, x: Operand, cuts: dict[int, tuple[Any, int, Any]]) -> Operand:
    """Axis → (start, step, count)."""
    dims = [cuts[axis][2] if axis in cuts else d for axis, d in enumerate(x.dims)]

    def element(i: Sequence[Any], v: Any) -> Any:
        at = [i[axis] * cuts[axis][1] + cuts[axis][0] if axis in cuts else i[axis] for axis in range(x.rank)]
        return v(*at)

    return Operand(x.dtype, dims, t.compute("slice", [t.tensor(x)], element, dims, x.dtype))


@emits("Pad")
def _pad(t: Translator, node: ir.Node) -> Operand:
    x, pads, *rest = t.inputs(node)
    assert x is not None
    if attribute(node, "mode", "constant") != "constant":
        t.refuse(node, f"mode {attribute(node, 'mode')}")
    numbers = numbers_of(t, node, pads, "pads")
    axes = numbers_of(t, node, rest[1], "axes") if len(rest) > 1 and rest[1] is not None else list(range(x.rank))
    before = {axis: numbers[i] for i, axis in enumerate(axes)}
    after = {axis: numbers[i + len(axes)] for i, axis in enumerate(axes)}
    if any(p < 0 for p in numbers):
        t.refuse(node, "a pad is negative")
    number = rest[0].scalar() if rest and rest[0] is not None else 0
    if number is None:
        t.refuse(node, "its value is not constant")
    fill = t.tir.const(np.asarray(number).item(), x.dtype)
    dims = [t.plain(t.dim(d) + before.get(a, 0) + after.get(a, 0)) for a, d in enumerate(x.dims)]
    padded = [a for a in before if before[a] or after[a]]

    def element(i: Sequence[Any], v: Any) -> Any:
        inside = [t.tir.all(i[a] >= before[a], i[a] < t.dim(x.dims[a]) + before[a]) for a in padded]
        value = v(*[i[a] - before.get(a, 0) for a in range(x.rank)])
        return t.tir.if_then_else(t.tir.all(*inside), value, fill) if inside else value

    return Operand(x.dtype, dims, t.compute("pad", [t.tensor(x)], element, dims, x.dtype))
