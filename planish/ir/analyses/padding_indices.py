"""Padding through operators that pick elements: slices by their bounds, gathers by positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from planish.ir.analyses.padding_facts import Affine, Fact, Held, Known, Mixes, Size, Span
from planish.ir.analyses.padding_views import first
from planish.ir.graphs import constant_array

if TYPE_CHECKING:
    from planish.ir.analyses.padding import Flow

_TABLE = 1 << 24  # elements of a constant mask that is compared


def _slice(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = first(args)
    if x.sizes is None:
        raise Mixes("the rank of its operand is not known")
    rank = len(x.sizes)
    sizes = flow.declared(node.outputs[0]) or (None,) * rank
    starts, ends, axes, steps = (constant_array(v) for v in (*node.inputs[1:], None, None)[:4])
    if len(node.inputs) < 3:
        raise Mixes("has the form of an old opset")
    count = len(starts) if starts is not None else len(axes) if axes is not None else None
    if count is None or (len(node.inputs) > 3 and node.inputs[3] is not None and axes is None):
        raise Mixes("its axes are not known")
    at = range(count) if axes is None else [int(axis) % rank for axis in axes]
    spans, affine, table = dict(x.spans), x.affine, x.table
    made = list(x.sizes)
    for k, axis in enumerate(at):
        start = None if starts is None else int(starts[k])
        step = 1 if len(node.inputs) <= 4 or node.inputs[4] is None else None if steps is None else int(steps[k])
        end = None if ends is None else int(ends[k])
        size = sizes[axis] or _length(flow, node.inputs[2], k, x.size(axis), start, step)
        made[axis] = size
        concerned = axis in spans or flow.carries(size) or size is None
        if (start is None or step != 1 or start < 0) and concerned:
            raise Mixes(f"takes a part of {flow.dim} that does not begin at its start")
        if concerned:
            assert start is not None
            _cut(flow, x, spans, axis, start, end, size)
        if start is None or step != 1 or start < 0:
            affine = affine if affine is not None and axis not in affine.steps else None
            table = None
            continue
        if affine is not None:
            affine = Affine(affine.start + affine.steps.get(axis, 0) * start, affine.steps)
        if table is not None:
            part = slice(start, end if not flow.carries(size) else None)
            table = table[(slice(None),) * axis + (part,)]
    result = Held(tuple(made), spans, x.state, affine, table=table)
    return [_masked(result)]


def _length(
    flow: Flow, ends: ir.Value | None, k: int, whole: Size | None, start: int | None, step: int | None
) -> Size | None:
    """How many elements a slice has whose end is a size."""
    numbers = flow.numbers(ends)
    if numbers is None or whole is None or start is None or step is None:
        return None
    made = []
    for array, n in zip(numbers, whole, strict=True):
        end = int(array.reshape(-1)[k])
        # A table that is shorter than the size at this sample bounds the dimension; see `_cut`.
        fits = len({*whole}) > 1 or len({int(a.reshape(-1)[k]) for a in numbers}) == 1
        made.append(len(range(n)[start:end:step]) if fits else max(0, end - start))
    return tuple(made)


def _cut(
    flow: Flow, x: Held, spans: dict[int, Span], axis: int, start: int, end: int | None, size: Size | None
) -> None:
    """What becomes of an axis of which a slice is taken."""
    span = spans.get(axis)
    if span is not None and not span.plain:
        raise Mixes(f"takes a part of an axis with more than {flow.dim}")
    if size is None:
        raise Mixes("the sizes of its result are not known")
    if flow.carries(size):
        plus = flow.plus(size)
        if span is not None:
            if start + plus > span.plus:
                raise Mixes(f"reaches behind the end of {flow.dim}")
            fact = span.fact if start + plus == span.plus else Fact.ANY
            spans[axis] = replace(span, plus=plus, fact=fact)
            return
        whole = x.size(axis)
        if whole is None or len({*whole}) > 1 or plus:
            raise Mixes("takes a part of something whose size is not known")
        flow.bound(whole[0] - start)
        spans[axis] = flow.span(size)
        return
    if span is not None:
        if end is None or end < 0 or end > span.plus + flow.least:
            raise Mixes(f"takes so many of {flow.dim} that there may be fewer")
        del spans[axis]


def _masked(x: Held) -> Held:
    """What a corner of a constant has beyond the diagonal: causal masks."""
    rank = x.rank or 0
    table = x.table
    if table is None or rank < 2 or not {rank - 1, rank - 2} <= x.spans.keys() or table.size > _TABLE:
        return x
    spans = dict(x.spans)
    if spans[rank - 1].plus or spans[rank - 2].plus:
        return x
    column, row = np.arange(table.shape[-1]), np.arange(table.shape[-2])[:, None]
    for axis, where in ((rank - 1, column > row), (rank - 2, row > column)):
        part = table[..., where]
        if part.size and (part == part.flat[0]).all():
            spans[axis] = replace(spans[axis], fact=Known(float(part.flat[0])))
    return replace(x, spans=spans)


def _gather(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    data, index = args[0], args[1]
    assert data is not None and index is not None
    axis = data.axis_of(node.attributes.get_int("axis", 0))
    if index.rank is None or data.sizes is None:
        raise Mixes("the rank of an operand is not known")
    sizes = (*data.sizes[:axis], *(index.sizes or ()), *data.sizes[axis + 1 :])
    if axis in data.spans:
        return [_picked(flow, data, index, axis, sizes)]
    require_inside(flow, index, data.size(axis))
    spans = {a if a < axis else a + index.rank - 1: s for a, s in data.spans.items()}
    for at, span in index.spans.items():
        spans[axis + at] = replace(span, fact=Fact.ANY if data.constant is None else Known(data.constant))
    affine = None if data.constant is None else Affine(data.constant)
    return [Held(sizes, spans, data.state, affine)]


def _picked(flow: Flow, data: Held, index: Held, axis: int, sizes: tuple[Size | None, ...]) -> Held:
    """Entries of the dimension by their positions."""
    span, at = data.spans[axis], index.affine
    rank = index.rank or 0
    others = {a if a < axis else a + rank - 1: s for a, s in data.spans.items() if a != axis}
    affine = Affine(data.constant) if data.constant is not None else None
    if at is not None and span.plain and not index.spans and index.sizes is not None and None not in index.sizes:
        ends = [step * (size[0] - 1) for a, step in at.steps.items() if (size := index.sizes[a]) is not None]
        low, high = at.start + sum(min(0, e) for e in ends), at.start + sum(max(0, e) for e in ends)
        if low >= 0 and high < span.plus + flow.least:
            return Held(sizes, others, data.state, affine)
    if at is not None and span.plain and at.start == 0 and len(at.steps) == 1:
        ((own, step),) = at.steps.items()
        inner = index.spans.get(own)
        if step == 1 and inner is not None and inner.plain and inner.plus <= span.plus and len(index.spans) == 1:
            fact = span.fact if inner.plus == span.plus else Fact.ANY
            return Held(sizes, others | {axis + own: replace(inner, fact=fact)}, data.state, affine)
    raise Mixes(f"picks entries of {flow.dim} that may be padding")


def require_inside(flow: Flow, index: Held, size: Size | None) -> None:
    """Raises Mixes unless padded elements of an index point into an axis of this size."""
    if not index.spans:
        return
    if size is None or len({*size}) > 1:
        raise Mixes("picks from an axis whose size is not known, by what may be padding")
    at = index.affine
    grown = [] if at is None else [axis for axis in at.steps if axis in index.spans]
    if at is not None and at.start >= 0 and min(at.steps.values(), default=0) >= 0:
        highest = at.start
        for axis in at.steps.keys() - {*grown}:
            highest += at.steps[axis] * ((index.size(axis) or size)[0] - 1)
        if not grown and highest < size[0]:
            return
        if len(grown) == 1 and index.spans[grown[0]].plain and at.steps[grown[0]] == 1:
            flow.bound(size[0] - index.spans[grown[0]].plus - int(highest))
            return
    if index.below is not None and index.below == size:
        return
    facts = [span.fact for span in index.spans.values()]
    if not all(isinstance(f, Known) and 0 <= f.value < size[0] for f in facts):
        raise Mixes("picks by an index that is not known in the padding, and may lie outside")


def _gather_elements(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    data, index = args[0], args[1]
    assert data is not None and index is not None
    axis = data.axis_of(node.attributes.get_int("axis", 0))
    if axis in data.spans:
        raise Mixes(f"picks entries of {flow.dim} that may be padding")
    require_inside(flow, index, data.size(axis))
    spans = {}
    for at, span in index.spans.items():
        other = data.spans.get(at)
        if at != axis and (other is None or not other.like(span)):
            raise Mixes("its operands carry the dimension in different ways")
        spans[at] = replace(span, fact=Fact.ANY if data.constant is None else Known(data.constant))
    return [Held(index.sizes, spans, data.state, None if data.constant is None else Affine(data.constant))]


def _gather_nd(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """Where the index is made of positions along axes of the result, it puts axes of the data there."""
    data, index = args[0], args[1]
    assert data is not None and index is not None
    columns = index.columns
    if columns is None or bool(node.attributes.get_int("batch_dims", 0)) or index.sizes is None or data.sizes is None:
        raise Mixes("picks by an index that is not known to be made of positions")
    out = index.sizes[:-1]
    spans: dict[int, Span] = {}
    places: dict[int, int] = {}
    for axis, column in enumerate(columns):
        if not isinstance(column, Affine):
            if axis in data.spans or column != data.sizes[axis]:
                raise Mixes(f"picks entries of {flow.dim} that may be padding, or lie outside")
            continue
        if column.start or len(column.steps) != 1 or next(iter(column.steps.values())) != 1:
            raise Mixes("picks by an index that is not made of positions alone")
        places[axis] = at = next(iter(column.steps))
        if axis in data.spans:
            inner = index.spans.get(at)
            if inner is None or not inner.like(data.spans[axis]) or at in spans:
                raise Mixes("its operands carry the dimension in different ways")
            spans[at] = data.spans[axis]
        elif out[at] != data.sizes[axis]:
            raise Mixes("picks by positions that the data may not have")
    if len({*places.values()}) < len(places):
        raise Mixes("picks a diagonal")
    free = Fact.FREE if len(places) == len(columns) else Fact.ANY
    for at, span in index.spans.items():
        if at not in spans and at < len(out):
            spans[at] = replace(span, fact=free if data.constant is None else Known(data.constant))
    rest = range(len(columns), len(data.sizes))
    places |= {axis: len(out) + k for k, axis in enumerate(rest)}
    spans |= {places[axis]: s for axis, s in data.spans.items() if axis in rest}
    affine = None if data.affine is None else data.affine.moved(places)
    affine = affine if len(places) == len(data.sizes) or data.constant is not None else None
    return [Held((*out, *(data.sizes[axis] for axis in rest)), spans, data.state, affine)]


RULES = {"Slice": _slice, "Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd}
