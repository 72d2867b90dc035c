"""Blocks of queries, the prefixes of keys that they can see, and the graphs that compute attention block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.passes.fusion.sizes import rank

#: Blocks are as long as a multiple of this, so that products do not end in odd rows.
ALIGNMENT = 16
_END = np.iinfo(np.int64).max

#: A position: a number, or a vector of one item.
Bound = int | ir.Value


def least_length(count: int) -> int:
    """The fewest queries of which `count` aligned blocks are none empty."""
    return ALIGNMENT * count * (count - 1) + 1


@dataclass(frozen=True)
class Block:
    """Queries from `start` to `end`, and the end of the keys that they can see; None: up to the last."""

    start: Bound
    end: Bound | None
    keys: Bound | None


def blocks(op: Any, length: Bound, count: int, offset: Bound) -> list[Block]:
    """`length` queries in `count` blocks. Query i sees keys up to i + `offset`."""
    step = ALIGNMENT * count
    if isinstance(length, int):
        size = -(-length // step) * ALIGNMENT
        inner: list[Bound] = [size * n for n in range(1, count)]
    else:
        steps = op.Div(op.Add(length, [step - 1]), [step])
        inner = _vectors(op, op.Mul(steps, [ALIGNMENT * n for n in range(1, count)]), count - 1)
    keys = [_sum(op, bound, offset) for bound in inner]
    starts: list[Bound] = [0, *inner]
    return [Block(*item) for item in zip(starts, [*inner, None], [*keys, None], strict=True)]


def _vectors(op: Any, value: ir.Value, count: int) -> list[Bound]:
    if count == 1:
        return [value]
    return list(op.Split(value, axis=0, num_outputs=count, _outputs=count))


def _sum(op: Any, a: Bound, b: Bound) -> Bound:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if b == 0 and isinstance(b, int):
        return a
    total: ir.Value = op.Add(vector(a), vector(b))
    return total


def vector(bound: Bound | None) -> Any:
    if isinstance(bound, ir.Value):
        return bound
    return np.array([_END if bound is None else bound], dtype=np.int64)


def _pair(op: Any, a: Bound | None, b: Bound | None) -> Any:
    if isinstance(a, ir.Value) or isinstance(b, ir.Value):
        return op.Concat(vector(a), vector(b), axis=0)
    return np.concatenate([vector(a), vector(b)])


def mask_parts(op: Any, mask: ir.Value, parts: Sequence[Block]) -> list[ir.Value]:
    """The part of a mask, (…, queries, keys), that each block needs."""
    found = []
    for block in parts:
        starts, ends = _pair(op, block.start, 0), _pair(op, block.end, block.keys)
        part = op.Slice(mask, starts, ends, np.array([-2, -1], dtype=np.int64))
        found.append(like(part, mask, {-2: None, -1: None}))
    return found


def causal_parts(op: Any, parts: Sequence[Block], length: Bound, key_length: Bound) -> list[ir.Value]:
    """The masks of the blocks, (queries, keys) of bool, where query i sees the keys up to i."""
    found = []
    for block in parts:
        queries = _range(op, block.start, length if block.end is None else block.end, 1)
        keys = _range(op, 0, key_length if block.keys is None else _least(op, block.keys, length, key_length), 0)
        part = op.GreaterOrEqual(queries, keys)
        part.shape = ir.Shape([None, None])
        found.append(part)
    return found


def _least(op: Any, keys: Bound, length: Bound, key_length: Bound) -> Bound:
    """`keys`, or all if there are fewer, which can only be where there are not as many keys as queries."""
    if key_length is length:
        return keys
    if isinstance(keys, int) and isinstance(key_length, int):
        return min(keys, key_length)
    return op.Min(vector(keys), vector(key_length))  # type: ignore[no-any-return]


def _range(op: Any, start: Bound, end: Bound, axis: int) -> ir.Value:
    """Positions from `start` to `end`, with another axis of size 1 at `axis`."""
    bounds = [np.int64(b) if isinstance(b, int) else op.Squeeze(b, [0]) for b in (start, end)]
    counted: ir.Value = op.Unsqueeze(op.Range(*bounds, np.int64(1)), [axis])
    return counted


def attend(op: Any, node: ir.Node, masks: Sequence[ir.Value], parts: Sequence[Block]) -> ir.Value:
    """The output of the Attention `node`, block by block; `masks` are the blocks' own."""
    query, key, value = node.inputs[:3]
    axis = 1 if rank(query) == 3 else 2
    attributes = {name: a for name, a in node.attributes.items() if name != "is_causal"}
    outputs = []
    for block, mask in zip(parts, masks, strict=True):
        one = _cut(op, query, block.start, block.end, axis)
        k, v = (other if block.keys is None else _cut(op, other, 0, block.keys, axis) for other in (key, value))
        outputs.append(like(op.Attention(one, k, v, mask, **attributes), node.outputs[0], {axis: None}))
    whole: ir.Value = op.Concat(*outputs, axis=axis)
    return like(whole, node.outputs[0], {})


def _cut(op: Any, value: ir.Value | None, start: Bound, end: Bound | None, axis: int) -> ir.Value:
    assert value is not None
    made = op.Slice(value, vector(start), vector(end), np.array([axis], dtype=np.int64))
    return like(made, value, {axis: None})


def like(made: ir.Value, source: ir.Value, changed: dict[int, int | None]) -> ir.Value:
    """`made` with the type and shape of `source`, but for the sizes of some axes."""
    made.type = source.type
    if source.shape is not None:
        dims = list(source.shape)
        for axis, size in changed.items():
            dims[axis] = ir.SymbolicDim(size) if size is None else size
        made.shape = ir.Shape(dims)
    return made


Make = Callable[[], Sequence[ir.Value]]


def choose(op: Any, condition: ir.Value | None, then: Make, otherwise: Make) -> list[ir.Value]:
    """What `then` makes where the condition holds at run time (None: always), else what `otherwise` makes."""
    if condition is None:
        return list(then())
    one, two = op.graph(then, "then"), op.graph(otherwise, "otherwise")
    made = op.If(condition, then_branch=one, else_branch=two, _outputs=len(one.outputs))
    values = [made] if len(one.outputs) == 1 else list(made)
    for value, a, b in zip(values, one.outputs, two.outputs, strict=True):
        value.type = a.type
        if a.shape is not None and b.shape is not None and len(a.shape) == len(b.shape):
            value.shape = ir.Shape([m if m == n else None for m, n in zip(a.shape, b.shape, strict=True)])
    return values
