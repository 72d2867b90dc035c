"""Computes attention over a sliding window in blocks of queries, each on the keys around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.ops import DIALECT_DOMAIN
from planish.ir.ops.flash_attention import CAUSAL
from planish.ir.ops.key_mask_attention import HIDDEN
from planish.ir.ops.window_attention import GLOBAL_KEYS, GLOBAL_QUERIES, LEFT, RIGHT, WINDOW_ATTENTION
from planish.passes.base import Decline
from planish.passes.fusion.sizes import size_vector, sizes
from planish.passes.lowering.causal_buckets import Bound, choose, like, vector
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass
from planish.passes.rule import Rule

#: Queries from which on blocks pay.
FROM_LENGTH = 193
_SHORTEST, _LONGEST = 64, 256
_LOWEST = float(np.finfo(np.float32).min)


def limits(read: Callable[[str, int], int | None]) -> tuple[int, int]:
    """How many keys before a query it sees, and after it, by the attributes of a WindowAttention.

    Raises:
        Decline: blocks of queries do not see ranges of keys of one length.
    """
    if read(GLOBAL_QUERIES, 0) or read(GLOBAL_KEYS, 0):
        raise Decline("it has positions that all others see, which without kernels is no gain")
    left, right = int(read(LEFT, -1) or 0), 0 if read(CAUSAL, 0) else int(read(RIGHT, -1) or 0)
    if left < 0 or right < 0:
        raise Decline("its window is open on one side, which without kernels is no gain")
    return left, right


@register
@dataclass(frozen=True)
class LowerWindowAttention(RewritePass):
    """Replaces planish::WindowAttention by a Scan over blocks of queries: Attention of each on the keys that they see.

    For targets without generated kernels. A symbolic length is compared at run time, and below `from_length` queries
    the attention is one operator with a mask; so it is where padding leaves a query without keys, which then gives
    the mean of all values. Layers share masks.

    Attributes:
        from_length: the fewest queries that are split.
        block: queries in a block; 0: an eighth of the window, in 64 to 256.
    """

    name: ClassVar[str] = "lower-window-attention"
    min_opset: ClassVar[int] = 23

    from_length: int = FROM_LENGTH
    block: int = 0

    def rules(self) -> tuple[Rule, ...]:
        return tuple(self._rule(name) for name in WINDOW_ATTENTION)

    def _rule(self, name: str) -> Rule:
        def pattern(op: Any, q: Any, k: Any, v: Any) -> Any:
            options = {"_allow_other_inputs": True, "_allow_other_attributes": True}
            return getattr(op, name)(q, k, v, _domain=DIALECT_DOMAIN, **options)

        return Rule(self.name, pattern, self.rewrite, self.check, self.min_opset, self.remove_nodes)

    def check(self, match: Match) -> None:
        if match.target.name != "ort-cpu" or match.target.kernels:
            raise Decline(f"target '{match.target}' has a kernel for it, or none of these operators")
        if match.graph is not match.model.graph:
            raise Decline("it is inside of a branch, which chose it already")
        limits(match.root.attributes.get_int)

    def rewrite(self, op: Any, match: Match, q: ir.Value, k: ir.Value) -> ir.Value:
        queries, keys = (sizes(value) for value in (q, k))
        if queries is None or keys is None or queries[1] != keys[1]:
            raise Decline("its queries and keys are not known to be as many")
        if not isinstance(queries[2], int):
            raise Decline("the size of its heads is unknown")
        term = queries[1]
        length: Bound = term if isinstance(term, int) else size_vector(op, term, q, 1, match.graph)
        lowered = _Windowed(op, match.root, length, self.block)
        if isinstance(length, int) and length < self.from_length:
            return lowered.whole(lowered.mask())
        conditions = lowered.no_query_is_blind()
        if isinstance(length, ir.Value):
            conditions.append(op.GreaterOrEqual(length, np.array([self.from_length], dtype=np.int64)))
        if not conditions:
            return lowered.blocked()
        condition = functools.reduce(op.And, conditions)
        # The mask is chosen apart from the attention, once for all layers.
        (mask,) = choose(
            op, condition, lambda: [op.initializer(np.zeros((0,) * 4, np.float32))], lambda: [lowered.mask()]
        )
        made = choose(op, condition, lambda: [lowered.blocked()], lambda: [lowered.whole(mask)])
        return like(made[0], match.output, {})


class _Windowed:
    """The WindowAttention `node` of `length` queries and keys, by blocks."""

    def __init__(self, op: Any, node: ir.Node, length: Bound, block: int) -> None:
        self.op, self.node, self.length = op, node, length
        self.left, self.right = limits(node.attributes.get_int)
        self.key_mask = node.inputs[3] if len(node.inputs) > 3 else None
        self.hidden = max(node.attributes.get_float(HIDDEN, _LOWEST), _LOWEST)
        eighth = (self.left + self.right + 1) // 8 // 16 * 16
        self.block = block or min(max(eighth, _SHORTEST), _LONGEST)

    def _ints(self, *numbers: int) -> np.ndarray:
        return np.array(numbers, dtype=np.int64)

    def _range(self, end: Bound) -> ir.Value:
        last = np.int64(end) if isinstance(end, int) else self.op.Squeeze(end, [0])
        counted: ir.Value = self.op.Range(np.int64(0), last, np.int64(1))
        return counted

    def _scores(self, seen: ir.Value) -> ir.Value:
        made: ir.Value = self.op.Where(seen, np.float32(0), np.float32(self.hidden))
        return made

    def mask(self) -> ir.Value:
        """(batch or 1, 1, queries, keys), float: 0 where a key is seen."""
        op = self.op
        j = self._range(self.length)
        i = op.Unsqueeze(j, [1])
        seen = op.GreaterOrEqual(j, op.Sub(i, np.int64(self.left)))
        seen = op.Unsqueeze(op.And(seen, op.LessOrEqual(j, op.Add(i, np.int64(self.right)))), [0, 1])
        if self.key_mask is not None:
            seen = op.And(seen, self.key_mask)
        made = self._scores(seen)
        made.shape = ir.Shape([None, 1, None, None])
        return made

    def whole(self, mask: ir.Value) -> ir.Value:
        q, k, v = self.node.inputs[:3]
        return self._attention(q, k, v, mask, {})

    def _attention(self, q: Any, k: Any, v: Any, mask: ir.Value, changed: dict[int, int | None]) -> ir.Value:
        names = ("q_num_heads", "kv_num_heads", "scale")
        attributes = {name: self.node.attributes[name] for name in names}
        return like(self.op.Attention(q, k, v, mask, **attributes), self.node.outputs[0], changed)

    def blocked(self) -> ir.Value:
        """All blocks, one after the other; the last one is filled up with queries that are cut off again."""
        op, block, ints = self.op, self.block, self._ints
        length = vector(self.length)
        missing = op.Mod(op.Sub(ints(0), length), ints(block))
        if isinstance(self.length, int):
            missing = ints(-self.length % block)
        q = op.Pad(self.node.inputs[0], op.Concat(ints(0), missing, axis=0), None, ints(1))
        q.shape = like(q, self.node.inputs[0], {1: None}).shape  # type: ignore[arg-type]
        # Of a block's query a, key b is at b - left from its first query on.
        reach = self.left + self.right + block
        a, b = op.Unsqueeze(self._range(block), [1]), self._range(reach)
        near = op.And(op.GreaterOrEqual(b, a), op.LessOrEqual(b, op.Add(a, np.int64(self.left + self.right))))
        near = self._scores(op.Unsqueeze(near, [0, 1]))
        padding = None
        if self.key_mask is not None:
            wide = op.Expand(self.key_mask, op.Concat(ints(1, 1, 1), length, axis=0))
            padding = self._scores(wide)
        starts = op.Mul(self._range(op.Div(op.Add(length, ints(block - 1)), ints(block))), np.int64(block))
        name = f"{self.node.outputs[0].name}_from"
        start = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        body = op.graph(lambda: [self._one(start, q, near, padding)], "block")
        body.inputs.append(start)
        stacked = op.Scan(starts, body=body, num_scan_inputs=1)
        width = self.node.outputs[0].shape[2]  # type: ignore[index]
        rows = op.Reshape(op.Transpose(stacked, perm=[1, 0, 2, 3]), ints(0, -1, int(width)))  # type: ignore[arg-type]
        made: ir.Value = op.Slice(rows, ints(0), length, ints(1))
        return like(made, self.node.outputs[0], {})

    def _one(self, start: ir.Value, q: ir.Value, near: ir.Value, padding: ir.Value | None) -> ir.Value:
        """The block of queries from `start` on."""
        op, ints = self.op, self._ints
        at = op.Unsqueeze(start, [0])
        early = op.Sub(at, ints(self.left))
        first = op.Max(early, ints(0))
        last = op.Min(op.Add(at, ints(self.block + self.right)), vector(self.length))

        def cut(value: Any, a: Any, b: Any, axis: int) -> ir.Value:
            made: ir.Value = op.Slice(value, a, b, ints(axis))
            return like(made, value, {axis: None}) if value.shape is not None else made

        one = cut(q, at, op.Add(at, ints(self.block)), 1)
        k, v = (cut(value, first, last, 1) for value in self.node.inputs[1:3])
        mask = cut(near, op.Sub(first, early), op.Sub(last, early), 3)
        if padding is not None:
            mask = op.Add(mask, cut(padding, first, last, 3))
        return self._attention(one, k, v, mask, {1: self.block})

    def no_query_is_blind(self) -> list[ir.Value]:
        """Whether each query has a key in its window that the key mask lets pass: sums up to its ends are counted."""
        if self.key_mask is None or np.float32(self.hidden) <= _LOWEST:  # else it gives zeros, in blocks too
            return []
        op, length = self.op, vector(self.length)
        wide = op.Expand(self.key_mask, op.Concat(np.ones(3, np.int64), length, axis=0))
        flat = op.Reshape(wide, op.Concat(np.array([-1], np.int64), length, axis=0))
        count = op.CumSum(op.Cast(flat, to=ir.DataType.INT32), np.int64(1))
        sums = op.Pad(count, np.array([0, 1, 0, 0], np.int64))  # of the first n keys, from none on
        i = self._range(self.length)
        end = op.Add(i, np.int64(1))
        if self.right:
            end = op.Min(op.Add(end, np.int64(self.right)), length)
        before = op.Gather(sums, op.Max(op.Sub(i, np.int64(self.left)), np.int64(0)), axis=1)
        seen = op.Sub(op.Gather(sums, end, axis=1), before)
        least = op.ReduceMin(op.Reshape(seen, np.array([-1], np.int64)), keepdims=1)
        return [op.Greater(least, np.int32(0))]
