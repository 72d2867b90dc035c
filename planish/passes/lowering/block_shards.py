"""Graphs that compute block-sparse attention by attention over the keys that groups of heads see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.passes.lowering.causal_buckets import Bound, vector
from planish.passes.lowering.layout_forms import LocalForm, Run

_LOWEST = float(np.finfo(np.float32).min)


def _ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@dataclass
class Operands:
    """A BlockSparseAttention `node` of `length` queries and keys.

    Attributes:
        groups: all heads.
        key_mask: (batch or 1, 1, 1, keys or 1), bool.
        hidden: score of keys that are not seen.
        covered: positions that have a row in the lists.
    """

    op: Any
    node: ir.Node
    length: Bound
    block: int
    groups: list[Run]
    key_mask: ir.Value | None
    hidden: float
    covered: int

    @property
    def heads(self) -> tuple[int, int]:
        return self.groups[-1].heads[1], self.groups[-1].kv_heads[1]

    @property
    def size(self) -> int:
        """Of one head."""
        width: Any = self.node.inputs[0].shape[2]  # type: ignore[union-attr,index]
        return int(width) // self.heads[0]

    def by_heads(self, value: ir.Value, keys: bool) -> list[ir.Value]:
        """(batch, length, heads · size) by groups: the heads of each, of keys and values or of queries.

        One Split: ONNX Runtime's Slice takes several times as long on the last axis.
        """
        ranges = [group.kv_heads if keys else group.heads for group in self.groups]
        parts = sorted(set(ranges))
        if len(parts) == 1:
            return [value] * len(ranges)
        sizes = _ints(*((b - a) * self.size for a, b in parts))
        made = self.op.Split(value, sizes, axis=2, _outputs=len(parts))
        typed = {part: self.typed(one, None, part[1] - part[0]) for part, one in zip(parts, made, strict=True)}
        return [typed[part] for part in ranges]

    def attend(self, group: Run, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None) -> ir.Value:
        counts = [b - a for a, b in (group.heads, group.kv_heads)]
        for value, count in ((q, counts[0]), (k, counts[1]), (v, counts[1])):
            self.typed(value, None, count)
        scale = self.node.attributes["scale"]
        if mask is None and counts[0] == counts[1]:  # the flash kernel
            made = self.op.MultiHeadAttention(q, k, v, num_heads=counts[0], scale=scale, _domain="com.microsoft")
        else:
            made = self.op.Attention(q, k, v, mask, q_num_heads=counts[0], kv_num_heads=counts[1], scale=scale)
        return self.typed(made, None, counts[0])

    def typed(self, value: ir.Value, length: int | None, heads: int) -> ir.Value:
        """(batch, length, heads · size), said where ONNX Runtime would have to infer it in a body."""
        if value.shape is not None:
            return value
        value.type = self.node.inputs[0].type  # type: ignore[union-attr]
        batch: Any = self.node.inputs[0].shape[0]  # type: ignore[union-attr,index]
        value.shape = ir.Shape([batch, length, heads * self.size])
        return value

    def tokens(self, blocks: np.ndarray, end: int) -> np.ndarray:
        """The positions before `end` in these blocks."""
        found = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
        return found[found < end].astype(np.int64)


def shards(given: Operands, columns: Mapping[int, np.ndarray]) -> ir.Value:
    """All rows of a layout see the same `columns`: one dense attention for each group of heads."""
    op = given.op
    q, k, v = (value for value in given.node.inputs[:3] if value is not None)
    assert isinstance(given.length, int)
    outputs = []
    for group, one, *pair in zip(
        given.groups, given.by_heads(q, False), given.by_heads(k, True), given.by_heads(v, True), strict=True
    ):
        positions = given.tokens(np.sort(columns[group.layout]), given.length)
        shard = [op.Gather(value, positions, axis=1) for value in pair]
        outputs.append(given.attend(group, one, shard[0], shard[1], None))
    made: ir.Value = op.Concat(*outputs, axis=2) if len(outputs) > 1 else outputs[0]
    return made


def causal_scan(given: Operands, forms: Mapping[int, LocalForm], rows: int) -> ir.Value:
    """Local and fixed blocks: a Scan over blocks of queries, the last of which is filled up."""
    return _Scan(given, forms, rows).output()


class _Scan:
    def __init__(self, given: Operands, forms: Mapping[int, LocalForm], rows: int) -> None:
        self.given, self.forms, self.op = given, forms, given.op
        self.local = max(form.local for form in forms.values())
        rows = rows or min(max(self.local // 8, 1), 4)
        #: Queries of a step.
        self.step = rows * given.block
        self.q, self.k, self.v = (value for value in given.node.inputs[:3] if value is not None)

    def output(self) -> ir.Value:
        op, given, length = self.op, self.given, vector(self.given.length)
        missing = op.Mod(op.Sub(_ints(0), length), _ints(self.step))
        q = op.Pad(self.q, op.Concat(_ints(0), missing, axis=0), None, _ints(1))
        padding = None
        if given.key_mask is not None:
            wide = op.Expand(given.key_mask, op.Concat(_ints(1, 1, 1), length, axis=0))
            padding = op.Where(wide, np.float32(0), np.float32(given.hidden))
        whole = zip(given.groups, given.by_heads(self.k, True), given.by_heads(self.v, True), strict=True)
        fixed = [self._fixed(group, pair, padding) for group, *pair in whole]
        mean = self._mean() if given.hidden > _LOWEST else None
        steps = op.Div(op.Add(length, _ints(self.step - 1)), _ints(self.step))
        count = op.Range(np.int64(0), op.Squeeze(steps, [0]), np.int64(1))
        name = f"{given.node.outputs[0].name}_step"
        number = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        body = op.graph(lambda: [self._one(number, q, padding, fixed, mean)], "block")
        body.inputs.append(number)
        stacked = op.Scan(count, body=body, num_scan_inputs=1)
        width = given.heads[0] * given.size
        flat = op.Reshape(op.Transpose(stacked, perm=[1, 0, 2, 3]), _ints(0, -1, width))
        made: ir.Value = op.Slice(flat, _ints(0), length, _ints(1))
        return made

    def _fixed(self, group: Run, pair: list[ir.Value], padding: ir.Value | None) -> list[ir.Value]:
        """Keys, values and padding of the blocks that all later rows see, in order; none of a form without them."""
        op, given = self.op, self.given
        positions = given.tokens(np.flatnonzero(self.forms[group.layout].fixed), given.covered)
        if not len(positions):
            return []
        here = op.initializer(positions)
        if isinstance(given.length, int):
            here = op.initializer(positions[positions < given.length])
        else:
            before = op.ReduceSum(op.Cast(op.Less(here, given.length), to=ir.DataType.INT64), keepdims=1)
            here = op.Slice(here, _ints(0), before)
        found = [op.Gather(value, here, axis=1) for value in pair]
        return found if padding is None else [*found, op.Gather(padding, here, axis=3)]

    def _mean(self) -> ir.Value:
        """What a query gives that sees no key, (batch, 1, heads · size)."""
        op, (heads, kv_heads), size = self.op, self.given.heads, self.given.size
        mean = op.ReduceMean(self.v, _ints(1), keepdims=1)
        shared = op.Expand(op.Reshape(mean, _ints(0, kv_heads, 1, size)), _ints(1, 1, heads // kv_heads, 1))
        made: ir.Value = op.Reshape(shared, _ints(0, 1, heads * size))
        return made

    def _one(self, number: ir.Value, q: ir.Value, padding: ir.Value | None, fixed: Any, mean: Any) -> ir.Value:
        op, given, step, block = self.op, self.given, self.step, self.given.block
        at = op.Mul(op.Unsqueeze(number, [0]), _ints(step))
        first = op.Max(op.Sub(at, _ints((self.local - 1) * block)), _ints(0))
        last = op.Min(op.Add(at, _ints(step)), vector(given.length))
        one = op.Slice(q, at, op.Add(at, _ints(step)), _ints(1))
        near = [op.Slice(value, first, last, _ints(1)) for value in (self.k, self.v)]
        if padding is not None:
            near.append(op.Slice(padding, first, last, _ints(3)))
        i = op.Unsqueeze(op.Add(op.Range(np.int64(0), np.int64(step), np.int64(1)), at), [1])
        j = op.Range(op.Squeeze(first, [0]), op.Squeeze(last, [0]), np.int64(1))
        earlier = op.LessOrEqual(j, i)
        inside = None if isinstance(given.length, int) else op.Less(i, _ints(given.covered))
        distance = op.Sub(op.Div(i, np.int64(block)), op.Div(j, np.int64(block)))
        masks = {
            layout: self._mask(form, number, j, (earlier, distance, inside)) for layout, form in self.forms.items()
        }
        means = [None] * len(given.groups) if mean is None else given.by_heads(mean, False)
        sides = (given.by_heads(one, False), given.by_heads(near[0], True), given.by_heads(near[1], True))
        outputs = []
        for n, (group, *operands) in enumerate(zip(given.groups, *sides, strict=True)):
            operands += near[2:]
            outputs.append(self._group(group, number, operands, fixed[n], masks[group.layout], means[n]))
        made: ir.Value = op.Concat(*outputs, axis=2) if len(outputs) > 1 else outputs[0]
        return given.typed(made, step, given.heads[0])

    def _inside(self, index: ir.Value, count: int) -> ir.Value:
        """`index`, or the last one: positions without a row see nothing, whatever is read for them."""
        if isinstance(self.given.length, int):
            return index
        least: ir.Value = self.op.Min(index, np.int64(count - 1))
        return least

    def _before(self, form: LocalForm, number: ir.Value) -> ir.Value:
        """How many fixed keys lie before the near ones in a step, a vector of one."""
        starts = np.arange(-(-self.given.covered // self.step)) * (self.step // self.given.block)
        blocks = np.concatenate([[0], np.cumsum(form.fixed)])[np.maximum(starts - self.local + 1, 0)]
        table = self.op.initializer(np.asarray(blocks * self.given.block, np.int64))
        at = self.op.Unsqueeze(self._inside(number, len(starts)), [0])
        found: ir.Value = self.op.Gather(table, at, axis=0)
        return found

    def _mask(self, form: LocalForm, number: ir.Value, j: ir.Value, pairs: tuple[Any, Any, Any]) -> ir.Value:
        """(1, 1, queries, keys), float, of fixed keys and near ones."""
        op, (earlier, distance, inside) = self.op, pairs
        seen = op.Less(distance, np.int64(form.local))
        if form.fixed.any():
            place = self._inside(op.Div(j, np.int64(self.given.block)), len(form.fixed))
            seen = op.Or(seen, op.Gather(op.initializer(form.fixed), place, axis=0))
        scores = op.Where(op.And(earlier, seen), np.float32(0), np.float32(self.given.hidden))
        if form.fixed.any():
            before = self._before(form, number)
            scores = op.Pad(scores, op.Concat(before, _ints(0), axis=0), None, _ints(1))
        if inside is not None:
            scores = op.Where(inside, scores, np.float32(self.given.hidden))
        made: ir.Value = op.Unsqueeze(scores, [0, 1])
        return made

    def _group(
        self, group: Run, number: ir.Value, operands: list[ir.Value], fixed: list[ir.Value], mask: ir.Value, mean: Any
    ) -> ir.Value:  # fmt: skip
        op, given = self.op, self.given
        q, *parts = operands
        if fixed:
            before = self._before(self.forms[group.layout], number)
            parts = [
                op.Concat(op.Slice(value, _ints(0), before, _ints(axis)), part, axis=axis)
                for value, part, axis in zip(fixed, parts, (1, 1, 3), strict=False)
            ]
        if len(parts) > 2:
            mask = op.Add(mask, parts[2])
        made = given.attend(group, q, parts[0], parts[1], mask)
        if mean is None:
            return made
        best = op.Squeeze(op.ReduceMax(mask, _ints(-1), keepdims=1), [1])
        kept = op.Where(op.Greater(best, np.float32(given.hidden / 2)), made, mean)
        return given.typed(kept, self.step, group.heads[1] - group.heads[0])
