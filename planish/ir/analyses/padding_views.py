"""Padding through operators that move elements, and those that make them of sizes and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from planish.ir.analyses.padding_facts import Affine, Fact, Held, Known, Mixes, Size, Span, State
from planish.ir.graphs import constant_array, is_op

if TYPE_CHECKING:
    from planish.ir.analyses.padding import Flow


def permuted(x: Held, order: Sequence[int]) -> Held:
    """A transposition."""
    if x.sizes is None:
        raise Mixes("the rank of its operand is not known")
    place = {axis: k for k, axis in enumerate(order)}
    return Held(
        tuple(x.sizes[axis] for axis in order),
        {place[axis]: span for axis, span in x.spans.items()},
        x.state,
        None if x.affine is None else x.affine.moved(place),
        x.below,
        table=None if x.table is None else x.table.transpose(order),
    )


def widest(sizes: Sequence[Size | None]) -> Size | None:
    """Of sizes that are broadcast."""
    return next((n for n in sizes if n is not None and {*n} != {1}), None if None in sizes else next(iter(sizes), None))


def _transpose(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = first(args)
    given = node.attributes.get("perm")
    return [permuted(x, list(given.value) if given is not None else list(range(x.rank or 0))[::-1])]


def _moved(x: Held, sizes: tuple[Size | None, ...], places: Mapping[int, int]) -> Held:
    """Axes renamed, those of size 1 left out or put in."""
    spans = {places[axis]: span for axis, span in x.spans.items()}
    affine = None
    if x.affine is not None:
        affine = x.affine.moved({**dict.fromkeys(range(x.rank or 0), -1), **places})
        affine = None if affine is None or -1 in affine.steps else affine
    kept = x.diagonal and [places.get((x.rank or 0) - k) for k in (1, 2)] == [len(sizes) - 1, len(sizes) - 2]
    return Held(sizes, spans, x.state, affine, x.below, diagonal=kept)


def _unsqueeze(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x, axes = first(args), _given_axes(node)
    if axes is None or x.sizes is None:
        raise Mixes("its axes are not known")
    rank = len(x.sizes) + len(axes)
    put = {axis % rank for axis in axes}
    left = iter(range(len(x.sizes)))
    source = [None if axis in put else next(left) for axis in range(rank)]
    sizes = tuple(ones(flow) if s is None else x.sizes[s] for s in source)
    return [_moved(x, sizes, {s: axis for axis, s in enumerate(source) if s is not None})]


def _squeeze(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x, axes = first(args), _given_axes(node)
    if axes is None or x.sizes is None:
        raise Mixes("its axes are not known")
    gone = {axis % len(x.sizes) for axis in axes}
    if gone & x.spans.keys():
        raise Mixes(f"takes {flow.dim} for 1")
    kept = [axis for axis in range(len(x.sizes)) if axis not in gone]
    return [_moved(x, tuple(x.sizes[axis] for axis in kept), {axis: k for k, axis in enumerate(kept)})]


def _given_axes(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return [int(axis) for axis in attribute.value]
    array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if array is None else [int(axis) for axis in np.atleast_1d(array)]


def _reshape(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """Reshape and Flatten."""
    x, sizes = first(args), flow.declared(node.outputs[0])
    if sizes is None or x.sizes is None or None in sizes or None in x.sizes:
        if not x.spans and not any(flow.carries(n) for n in sizes or ()):
            return [Held(sizes, state=x.state)]
        raise Mixes("the sizes of its result are not known")
    before, after = [[n for n in s if n is not None] for s in (x.sizes, sizes)]
    solid = [[axis for axis, n in enumerate(s) if {*n} != {1}] for s in (before, after)]
    if [before[a] for a in solid[0]] == [after[a] for a in solid[1]]:
        return [_moved(x, sizes, dict(zip(*solid, strict=True)))]
    spans: dict[int, Span] = {}
    for axis, span in x.spans.items():
        place, moved = _place(before, axis, span, after, flow)
        if place in spans:
            raise Mixes(f"puts {flow.dim} twice into one axis")
        spans[place] = moved
    affine = x.affine if x.constant is not None else None
    return [Held(sizes, spans, x.state, affine)]


def _place(before: Sequence[Size], axis: int, span: Span, after: Sequence[Size], flow: Flow) -> tuple[int, Span]:
    """Where the dimension is in a row-major array of other sizes."""
    samples = range(len(flow.samples))
    if span.plus:
        raise Mixes(f"divides an axis that is longer than {flow.dim}")
    ahead = [prod(n[k] for n in before[:axis]) * span.outer[k] for k in samples]
    behind = [prod(n[k] for n in before[axis + 1 :]) * span.inner[k] for k in samples]
    for place, size in enumerate(after):
        front = [prod(n[k] for n in after[:place]) for k in samples]
        back = [prod(n[k] for n in after[place + 1 :]) for k in samples]
        if any(ahead[k] % front[k] or behind[k] % back[k] for k in samples):
            continue
        outer = tuple(ahead[k] // front[k] for k in samples)
        inner = tuple(behind[k] // back[k] for k in samples)
        dims = [sample[flow.dim] for sample in flow.samples]
        if all(outer[k] * dims[k] * inner[k] == size[k] for k in samples):
            if outer[0] != outer[1] or inner[0] != inner[1]:
                raise Mixes(f"puts {flow.dim} twice into one axis")
            return place, Span(outer, inner, 0, span.fact)
    raise Mixes(f"divides {flow.dim} among axes")


def _expand(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x, sizes = first(args), flow.declared(node.outputs[0])
    if sizes is None or x.sizes is None or None in sizes:
        raise Mixes("the sizes of its result are not known")
    shift = len(sizes) - len(x.sizes)
    spans = {axis + shift: span for axis, span in x.spans.items()}
    for axis, size in enumerate(sizes):
        if axis not in spans and flow.carries(size):
            if axis >= shift and {*(x.sizes[axis - shift] or (0,))} != {1}:
                raise Mixes("repeats an axis whose size is not known")
            assert size is not None
            spans[axis] = flow.span(size, Fact.FREE if x.constant is None else Known(x.constant))
    affine = None if x.affine is None else x.affine.moved({a: a + shift for a in range(len(x.sizes))})
    return [Held(sizes, spans, x.state, affine, x.below, diagonal=x.diagonal)]


def _constant_of_shape(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    attribute = node.attributes.get("value")
    value = 0.0 if attribute is None else float(np.asarray(attribute.value.numpy()).reshape(-1)[0])
    sizes = flow.declared(node.outputs[0])
    if sizes is None or None in sizes:
        raise Mixes("the sizes of its result are not known")
    spans = {k: flow.span(n, Known(value)) for k, n in enumerate(sizes) if n is not None and flow.carries(n)}
    state = State.FINITE if np.isfinite(value) else State.OPEN if value < 0 else State.ANY
    return [Held(sizes, spans, state, Affine(value))]


def _range(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    sizes = flow.declared(node.outputs[0])
    start, step = (None if a is None else a.constant for a in (args[0], args[2]))
    if sizes is None or sizes[0] is None or start is None or step is None:
        raise Mixes("its limits are not known")
    spans = {0: flow.span(sizes[0])} if flow.carries(sizes[0]) else {}
    return [Held(sizes, spans, affine=Affine(start, {0: step} if step else {}))]


def _shape(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = first(args)
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(x.sizes or ()))
    asked = None if x.sizes is None else x.sizes if is_op(node, "Size") else x.sizes[slice(start, end)]
    if asked is None or None in asked or any(flow.carries(n) for n in asked):
        raise Mixes(f"reads the size of {flow.dim}")
    return [Held(flow.declared(node.outputs[0]))]


def _concat(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    parts = [a for a in args if a is not None]
    axis = parts[0].axis_of(node.attributes.get_int("axis", 0))
    rank = parts[0].rank or 0
    spans: dict[int, Span] = {}
    sizes: list[Size | None] = []
    for at in range(rank):
        carried = [a.spans[at] for a in parts if at in a.spans]
        if at == axis:
            every = [a.size(at) for a in parts]
            total = None if None in every else tuple(map(sum, zip(*every, strict=True)))  # type: ignore[arg-type]
            sizes.append(total)
            if carried:
                if len(carried) > 1 or at not in parts[-1].spans or total is None or not carried[0].plain:
                    raise Mixes(f"puts something behind {flow.dim}, where the padding ends")
                spans[at] = replace(carried[0], plus=flow.plus(total))
            continue
        sizes.append(widest([a.size(at) for a in parts]))
        if carried:
            if len(carried) < len(parts) or any(not s.like(carried[0]) for s in carried):
                raise Mixes("its operands carry the dimension in different ways")
            facts = [s.fact for s in carried]
            spans[at] = replace(carried[0], fact=facts[0] if all(f == facts[0] for f in facts) else Fact.ANY)
    columns = None
    if axis == rank - 1 and all({*(a.size(axis) or (0,))} == {1} for a in parts):
        found = [a.affine or a.below for a in parts]
        columns = tuple(c for c in found if c is not None) if None not in found else None
    return [Held(tuple(sizes), spans, max(a.state for a in parts), _joined(parts, axis), columns=columns)]


def _joined(parts: Sequence[Held], axis: int) -> Affine | None:
    """Positions that go on from one part to the next."""
    last = parts[-1].affine
    if last is None:
        return None
    step, at = last.steps.get(axis, 0), 0
    start = last.start - step * sum((a.size(axis) or (0,))[0] for a in parts[:-1])
    for part in parts[:-1]:
        size = part.size(axis)
        if part.affine is None or size is None or len({*size}) > 1:
            return None
        steps = dict(part.affine.steps) | ({axis: step} if step and size[0] == 1 else {})
        if part.affine.start != start + step * at or steps != dict(last.steps):
            return None
        at += size[0]
    return Affine(start, last.steps)


def _split(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = first(args)
    if x.axis_of(node.attributes.get_int("axis", 0)) in x.spans:
        raise Mixes(f"splits {flow.dim}")
    return [Held(flow.declared(value), dict(x.spans), x.state) for value in node.outputs]


def _tile(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x, repeats = first(args), constant_array(node.inputs[1])
    if repeats is None or any(repeats[axis] != 1 for axis in x.spans):
        raise Mixes(f"repeats {flow.dim}")
    return [Held(flow.declared(node.outputs[0]), dict(x.spans), x.state, x.affine if x.constant is not None else None)]


def _pad(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x, pads = first(args), constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if pads is None or x.rank is None or len(node.inputs) > 3 or len(pads) != 2 * x.rank:
        raise Mixes("its widths are not known")
    if any(pads[axis] or pads[axis + x.rank] for axis in x.spans):
        raise Mixes(f"pads {flow.dim} itself")
    return [Held(flow.declared(node.outputs[0]), x.forget().spans, State.ANY if x.state else State.FINITE)]


def _trilu(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = first(args)
    shift = 0.0 if len(args) < 2 or args[1] is None else args[1].constant
    rows, columns = x.axis_of(-2), x.axis_of(-1)
    if shift is None or any(axis in x.spans and (not s.plain or s.plus) for axis, s in x.spans.items()):
        raise Mixes("its diagonal is not known")
    spans = {axis: replace(s, fact=Fact.ANY) for axis, s in x.spans.items()}
    upper = bool(node.attributes.get_int("upper", 1))
    if rows in spans and columns in spans:
        # Beyond the real columns column - row is 1 or more, beyond the real rows -1 or less.
        for axis, outside in ((columns, not upper and shift <= 0), (rows, upper and shift >= 0)):
            inside = (upper and shift <= 1) if axis == columns else (not upper and shift >= -1)
            if outside or (inside and x.constant is not None):
                spans[axis] = replace(spans[axis], fact=Known(0.0 if outside else x.constant or 0.0))
    return [Held(x.sizes, spans, x.state)]


def first(args: Sequence[Held | None]) -> Held:
    assert args and args[0] is not None
    return args[0]


def ones(flow: Flow) -> Size:
    return (1,) * len(flow.samples)


RULES = {
    "Transpose": _transpose, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Reshape": _reshape, "Flatten": _reshape,
    "Expand": _expand, "ConstantOfShape": _constant_of_shape, "Range": _range, "Shape": _shape, "Size": _shape,
    "Concat": _concat, "Split": _split, "Tile": _tile, "Pad": _pad, "Trilu": _trilu,
}  # fmt: skip
