"""Bodies of token merging in standard operators; see `planish.ir.ops.merge_reference` for what they compute."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from planish.ir.ops.base import Schema
from planish.ir.ops.body import FunctionBody
from planish.ir.ops.merge_reference import TINY


@dataclass(frozen=True)
class _Matched:
    """Values of a matching: tokens that stay and that go, (batch, kept) and (batch, r), and positions these go to."""

    kept: ir.Value
    sources: ir.Value
    targets: ir.Value


def merge_body(schema: Schema, opset: int, energy: bool, max_norm: bool) -> ir.Function:
    """The function of an operator of the family."""
    made = FunctionBody(schema, opset)
    x, keys, sizes = made.values.values()
    y, *more = merged(made, _float(made, x), keys, sizes, energy, max_norm)
    return made.function(made.add("CastLike", y, x), *more)


def merged(
    made: FunctionBody,
    x: ir.Value,
    keys: ir.Value,
    sizes: ir.Value,
    energy: bool,
    max_norm: bool,
    shift: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Tokens x in float32 merged by keys of any precision, their sizes, and where each went.

    Args:
        shift: (size,) float32, added to the means of keys over heads.
    """
    unit = _directions(made, _float(made, keys), shift)
    matched = (_by_energy if energy else _bipartite)(made, unit)
    return _merge(made, x, sizes, matched, max_norm)


def _float(made: FunctionBody, value: ir.Value) -> ir.Value:
    return made.add("Cast", value, to=ir.DataType.FLOAT)


def _directions(made: FunctionBody, keys: ir.Value, shift: ir.Value | None) -> ir.Value:
    heads = made.number("heads")
    size = made.add("Div", made.size(keys, 2), heads)
    shape = made.shape(made.size(keys, 0), made.size(keys, 1), heads, size)
    by_head = made.add("Reshape", keys, shape, allowzero=1)
    mean = made.add("ReduceMean", by_head, made.ints(2), keepdims=0)
    if shift is not None:
        mean = made.add("Add", mean, shift)
    norm = made.add("ReduceL2", mean, made.ints(2), keepdims=1)
    return made.add("Div", mean, made.add("Max", norm, made.floating(TINY)))


def _count(made: FunctionBody, tokens: ir.Value) -> ir.Value:
    """How many tokens go, of shape (1)."""
    share = made.add("Mul", made.add("Cast", tokens, to=ir.DataType.FLOAT), made.number("ratio"))
    whole = made.add("Cast", made.add("Floor", share), to=ir.DataType.INT64)
    free = made.add("Max", made.add("Sub", tokens, made.number("protected")), made.ints(0))
    most = made.add("Div", free, made.ints(2))
    return made.add("Min", made.add("Add", made.number("r"), whole), most)


def _best(made: FunctionBody, scores: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The highest score of each row, and the first place that has it; rows of no score are none to reduce."""
    lowest = made.floating(float("-inf"))
    padded = made.add("Pad", scores, made.ints(0, 0, 0, 0, 0, 1), lowest)
    best = made.add("ReduceMax", padded, made.ints(2), keepdims=0)
    return best, made.add("ArgMax", padded, axis=2, keepdims=0)


def _bipartite(made: FunctionBody, unit: ir.Value) -> _Matched:
    tokens, protected, two = made.size(unit, 1), made.number("protected"), made.ints(2)
    odd = made.add("Mod", protected, two)
    first_a = made.add("Add", protected, odd)
    first_b = made.add("Sub", made.add("Add", protected, made.ints(1)), odd)
    a, b = (made.cut(unit, first, step=2) for first in (first_a, first_b))
    best, chosen = _best(made, made.add("MatMul", a, made.add("Transpose", b, perm=[0, 2, 1])))
    count, total = _count(made, tokens), made.size(best, 1)
    order = made.outputs("TopK", 2, best, total, axis=1)[1]
    going, staying = made.cut(order, made.ints(0), count), made.cut(order, count)
    staying = made.outputs("TopK", 2, staying, made.size(staying, 1), axis=1, largest=0)[0]
    batch, front = made.size(unit, 0), made.add("Min", protected, tokens)

    def everywhere(span: ir.Value) -> ir.Value:
        return made.add("Expand", span, made.shape(batch, made.size(span, 0)))

    kept = made.add(
        "Concat",
        everywhere(made.span(made.ints(0), front)),
        made.add("Add", made.add("Mul", staying, two), first_a),
        everywhere(made.span(first_b, tokens, 2)),
        axis=1,
    )
    before_b = made.add("Add", front, made.size(staying, 1))
    targets = made.add("Add", made.add("GatherElements", chosen, going, axis=1), before_b)
    return _Matched(kept, made.add("Add", made.add("Mul", going, two), first_a), targets)


def _by_energy(made: FunctionBody, unit: ir.Value) -> _Matched:
    tokens, protected = made.size(unit, 1), made.number("protected")
    free = made.cut(unit, protected)
    scores = made.add("MatMul", free, made.add("Transpose", free, perm=[0, 2, 1]))
    away = made.add("Elu", made.add("Sub", scores, made.number("margin")), refs={"alpha": "alpha"})
    energy = made.add("ReduceSum", away, made.ints(2), keepdims=0)  # their number is the same for all
    count = _count(made, tokens)
    order = made.outputs("TopK", 2, energy, made.size(energy, 1), axis=1)[1]
    pairs = made.add("Mul", count, made.ints(2))
    a, b = (made.cut(order, made.ints(start), pairs, step=2) for start in (0, 1))
    rows = made.add("GatherND", scores, made.add("Unsqueeze", a, made.ints(2)), batch_dims=1)
    across = made.add("Expand", made.add("Unsqueeze", b, made.ints(1)), made.shape(made.size(b, 0), count, count))
    chosen = _best(made, made.add("GatherElements", rows, across, axis=2))[1]
    sources, goals = (made.add("Add", v, protected) for v in (a, made.add("GatherElements", b, chosen, axis=1)))
    both = made.shape(made.size(unit, 0), tokens)
    stays = made.add(
        "ScatterElements",
        made.add("Expand", made.ints(1), both),
        sources,
        made.add("Expand", made.ints(0), made.add("Shape", sources)),
        axis=1,
    )
    # Of ids that grow by the number of tokens where a token goes, the lowest are those that stay, in order.
    late = made.add("Mul", made.add("Sub", made.ints(1), stays), tokens)
    ids = made.add("Add", late, made.span(made.ints(0), tokens))
    kept = made.outputs("TopK", 2, ids, made.add("Sub", tokens, count), axis=1, largest=0)[0]
    position = made.add("Sub", made.add("CumSum", stays, made.ints(1)), made.ints(1))
    return _Matched(kept, sources, made.add("GatherElements", position, goals, axis=1))


def _merge(
    made: FunctionBody, x: ir.Value, sizes: ir.Value, matched: _Matched, max_norm: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    kept, sources, targets = matched.kept, matched.sources, matched.targets
    last = made.ints(2)

    def column(value: ir.Value) -> ir.Value:
        return made.add("Unsqueeze", value, last)

    def rows(of: ir.Value) -> ir.Value:
        return made.add("GatherND", x, column(of), batch_dims=1)

    old, gone = (made.add("GatherElements", sizes, of, axis=1) for of in (kept, sources))
    total = made.add("ScatterElements", old, targets, gone, axis=1, reduction="add")
    share = made.add("Div", gone, made.add("GatherElements", total, targets, axis=1))
    whole, parts = rows(kept), rows(sources)
    batch, count = made.size(sources, 0), made.size(sources, 1)
    number = made.add("Unsqueeze", made.span(made.ints(0), batch), made.ints(1))
    places = made.add("Concat", column(made.add("Expand", number, made.shape(batch, count))), column(targets), axis=2)
    y = made.add(
        "ScatterND",
        made.add("Mul", whole, column(made.add("Div", old, total))),
        places,
        made.add("Mul", parts, column(share)),
        reduction="add",
    )
    if max_norm:
        norms = [made.add("ReduceL2", value, last, keepdims=0) for value in (whole, parts)]
        longest = made.add("ScatterElements", norms[0], targets, norms[1], axis=1, reduction="max")
        norm = made.add("Max", made.add("ReduceL2", y, last, keepdims=0), made.floating(TINY))
        y = made.add("Mul", y, column(made.add("Div", longest, norm)))
    tokens = made.size(x, 1)
    ids = made.add("Expand", made.span(made.ints(0), made.size(kept, 1)), made.add("Shape", kept))
    empty = made.add("Expand", made.ints(0), made.shape(batch, tokens))
    where = made.add("ScatterElements", empty, kept, ids, axis=1)
    return y, total, made.add("ScatterElements", where, sources, targets, axis=1)
