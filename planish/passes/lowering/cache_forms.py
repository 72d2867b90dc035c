"""Attention over a cache that tokens are written to, in operators of ONNX: one token a row, or a chunk of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import dims_of, is_op
from planish.passes.base import Decline
from planish.passes.precision.cache_sites import BIAS, KEY_SCALE

_ALMOST_ALL = 1 << 62
#: Inputs of GroupQueryAttention.
_PAST_KEY = 3


@dataclass(frozen=True)
class Step:
    """com.microsoft's GroupQueryAttention of one token a row.

    Attributes:
        node: GroupQueryAttention.
        heads, groups, size: of queries, of keys and values, and the numbers of each.
        window: tokens that a token sees, its own included.
        slopes: (1, heads, 1, 1) of a bias that grows with the position of a key.
    """

    node: ir.Node
    heads: int
    groups: int
    size: int
    scale: float
    softcap: float
    window: int
    slopes: ir.Value | None

    @classmethod
    def of(cls, node: ir.Node) -> Self:
        """Reads a node.

        Raises:
            Decline: it does more than this form can.
        """
        get = node.attributes.get_int
        if any(v is None for v in node.inputs[:3]):
            raise Decline("its queries, keys and values are one value")
        if get("do_rotary", 0) or get("smooth_softmax", 0) or any(v is not None for v in node.inputs[KEY_SCALE - 1 :]):
            raise Decline("it does more than attend over the cache")
        if len(node.inputs) > 7 and any(v is not None for v in node.inputs[7:BIAS]):
            raise Decline("it rotates positions")
        dims: Any = dims_of(node.inputs[_PAST_KEY])  # type: ignore[arg-type]
        if dims is None or not isinstance(dims[3], int):
            raise Decline("the sizes of its cache are unknown")
        bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
        return cls(
            node, get("num_heads", 0), get("kv_num_heads", 0), dims[3],
            node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(dims[3]),
            node.attributes.get_float("softcap", 0.0),
            get("local_window_size", -1) if get("local_window_size", -1) >= 0 else _ALMOST_ALL,
            None if bias is None else _slopes(bias),
        )  # fmt: skip

    @property
    def share(self) -> int:
        """Query heads that read the same keys."""
        return self.heads // self.groups

    def build(self, op: Any) -> Sequence[ir.Value]:
        """What is attended to, and the caches with the tokens."""
        q, k, v, past_key, past_value, held = self.node.inputs[:6]
        held = op.Cast(held, to=int(ir.DataType.INT64))
        keys, values = (self._written(op, *pair, held) for pair in ((past_key, k), (past_value, v)))
        rows = op.Reshape(self._scaled(op, q), [0, self.groups, self.share, self.size])
        scores = op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2]))
        weights = self._weights(op, scores, op.Unsqueeze(held, [1, 2, 3]), [1, self.groups, self.share, 1])
        return [op.Reshape(op.MatMul(weights, values), [0, 1, self.heads * self.size]), keys, values]

    def _scaled(self, op: Any, q: ir.Value | None) -> Any:
        return op.Mul(q, self._kind.type(self.scale))

    @property
    def _kind(self) -> np.dtype[Any]:
        q = self.node.inputs[0]
        assert q is not None and q.dtype is not None
        return q.dtype.numpy()

    def _weights(self, op: Any, scores: Any, last: Any, shape: list[int]) -> Any:
        """The softmax of scores over the keys, which are the last axis.

        Args:
            last: the position of each token, as axes of scores, of length 1 for the keys.
            shape: of the slopes as axes of scores.
        """
        q, past_key = self.node.inputs[0], self.node.inputs[_PAST_KEY]
        assert q is not None and q.dtype is not None
        at = _counted(op, past_key, 2)
        if self.softcap:
            cap = self._kind.type(self.softcap)
            scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
        if self.slopes is not None:
            added = op.Mul(op.Reshape(self.slopes, shape), op.Cast(at, to=int(self.slopes.dtype or q.dtype)))
            scores = op.Add(scores, added if self.slopes.dtype in (None, q.dtype) else op.Cast(added, to=int(q.dtype)))
        seen = op.LessOrEqual(at, last)
        if self.window != _ALMOST_ALL:
            seen = op.And(seen, op.Greater(at, op.Sub(last, np.int64(self.window))))
        lowest = self._kind.type(-65504.0 if q.dtype == ir.DataType.FLOAT16 else -3e38)
        return op.Softmax(op.Where(seen, scores, lowest), axis=-1)

    def _written(self, op: Any, past: ir.Value | None, new: ir.Value | None, held: Any) -> Any:
        """The cache with the token of each row where the row ends."""
        rows = _counted(op, held, 0)
        shape = op.Concat(op.Shape(held), np.array([self.groups, 1], np.int64), axis=0)
        groups = np.arange(self.groups)[None, :, None]
        places = [op.Expand(part, shape) for part in (op.Unsqueeze(rows, [1, 2]), groups, op.Unsqueeze(held, [1, 2]))]
        return op.ScatterND(past, op.Concat(*places, axis=2), op.Reshape(new, [0, self.groups, self.size]))


class Chunk(Step):
    """The same of several tokens, as many in each row: the last of them is where `held` says."""

    def build(self, op: Any) -> Sequence[ir.Value]:
        """What is attended to, and the caches with the tokens."""
        q, k, v, past_key, past_value, held = self.node.inputs[:6]
        first = op.Sub(op.Cast(held, to=int(ir.DataType.INT64)), op.Sub(_size(op, q, 1), np.int64(1)))
        positions = op.Add(op.Unsqueeze(first, [1]), _counted(op, q, 1))  # (batch, tokens)
        keys, values = (self._written(op, *pair, positions) for pair in ((past_key, k), (past_value, v)))
        # Heads that share keys are rows beside each other: for a product that repeats keys ONNX Runtime keeps pointers
        # in pinned memory, which it gives back too late where a session goes.
        apart, flat = [self.groups, self.share, -1], [self.groups, -1]
        batch, tokens, capacity = self._sizes()
        many = None if tokens is None else tokens * self.share
        split = [batch, self.groups, self.share, tokens]
        rows = op.Reshape(self._scaled(op, q), [0, 0, self.groups, self.share, self.size])
        rows = op.Reshape(op.Transpose(rows, perm=[0, 2, 3, 1, 4]), [0, *flat, self.size])
        self._shaped(rows, [batch, self.groups, many, self.size])
        scores = op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2]))
        room = op.Shape(past_key, start=2, end=3)
        scores = op.Reshape(scores, op.Concat(np.array([0, *apart], np.int64), room, axis=0))
        self._shaped(scores, [*split, capacity])
        weights = self._weights(op, scores, op.Unsqueeze(positions, [1, 2, 4]), [1, self.groups, self.share, 1, 1])
        weights = op.Reshape(weights, op.Concat(np.array([0, *flat], np.int64), room, axis=0))
        self._shaped(weights, [batch, self.groups, many, capacity])
        mixed = op.Reshape(op.MatMul(weights, values), [0, *apart, self.size])
        self._shaped(mixed, [*split, self.size])
        y = op.Reshape(op.Transpose(mixed, perm=[0, 3, 1, 2, 4]), [0, 0, self.heads * self.size])
        return [y, keys, values]

    def _sizes(self) -> tuple[Any, Any, Any]:
        """Batch, tokens and capacity, as shapes have them."""
        q, past = self.node.inputs[0], self.node.inputs[_PAST_KEY]
        if q is None or q.shape is None or past is None or past.shape is None:
            return None, None, None
        return q.shape[0], q.shape[1], past.shape[2]

    def _shaped(self, value: ir.Value, dims: list[Any]) -> None:
        """Writes a shape down that what infers shapes does not find, where all of it is known."""
        q = self.node.inputs[0]
        if None not in dims and q is not None:
            value.shape, value.type = ir.Shape(dims), q.type

    def _written(self, op: Any, past: ir.Value | None, new: ir.Value | None, positions: Any) -> Any:
        """The cache with tokens (batch, tokens, groups · size) at their positions (batch, tokens)."""
        shape = op.Concat(
            op.Shape(new, end=1), np.array([self.groups], np.int64), op.Shape(new, start=1, end=2), [1], axis=0
        )
        groups = np.arange(self.groups)[None, :, None, None]
        parts = (op.Unsqueeze(_counted(op, new, 0), [1, 2, 3]), groups, op.Unsqueeze(positions, [1, 3]))
        new = op.Transpose(op.Reshape(new, [0, 0, self.groups, self.size]), perm=[0, 2, 1, 3])
        return op.ScatterND(past, op.Concat(*(op.Expand(part, shape) for part in parts), axis=3), new)


def _size(op: Any, value: ir.Value | None, axis: int) -> Any:
    return op.Squeeze(op.Shape(value, start=axis, end=axis + 1), [0])


def _counted(op: Any, value: ir.Value | None, axis: int) -> Any:
    """0, 1, 2, … along an axis; its length is written down, since what infers shapes does not follow it."""
    made = op.Range(np.int64(0), _size(op, value, axis), np.int64(1))
    assert value is not None
    if value.shape is not None:
        made.shape, made.type = ir.Shape([value.shape[axis]]), ir.TensorType(ir.DataType.INT64)
    return made


def _slopes(bias: ir.Value) -> ir.Value:
    """What positions 0, 1, 2, … are multiplied by in a bias.

    Raises:
        Decline: it is no such bias.
    """
    node = bias.producer()
    if is_op(node, "Cast") and node is not None and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if is_op(node, "Mul") and node is not None:
        for slopes, positions in (node.inputs, node.inputs[::-1]):
            if positions is None or slopes is None:
                continue
            source = positions.producer()
            while is_op(source, "Unsqueeze", "Reshape", "Cast") and source is not None and source.inputs[0] is not None:
                source = source.inputs[0].producer()
            if is_op(source, "Range"):
                return slopes
    raise Decline("a bias is added to its scores that is not one by position")
