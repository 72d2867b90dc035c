"""Computes causal attention in blocks of queries, each on the keys that it can see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.passes.base import Decline
from planish.passes.fusion.index_vectors import Offset
from planish.passes.fusion.mask_allows import KEPT, Causal, mask_allows
from planish.passes.fusion.sizes import Term, contents, rank, size_vector, sizes
from planish.passes.lowering.causal_buckets import (
    Block,
    Bound,
    Make,
    attend,
    blocks,
    causal_parts,
    choose,
    least_length,
    mask_parts,
    vector,
)
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass

_FEW, _MANY, _MANY_FROM = 4, 8, 1024


@register
@dataclass(frozen=True)
class LowerCausalAttention(RewritePass):
    """Replaces causal Attention by one for each of 4 blocks of queries (8 from 1024 tokens on), on a prefix of keys.

    ONNX Runtime's CPU kernels compute all scores and mask half of them. Blocks skip what no query of theirs sees:
    1.4 times as fast at 512 tokens, 1.6 times at 1024, twice at 2048 (`benchmarks/fusion.py`).
    A symbolic length is compared at run time. So are rows of a float mask in which every key may be masked: there
    the softmax is over all keys, which blocks do not see, and with such a row the attention is computed as it was.

    Attributes:
        from_length: the fewest queries that are split.
        buckets: number of blocks; 0: by the length.
    """

    from_length: int = 193
    buckets: int = 0

    name: ClassVar[str] = "lower-causal-attention"
    min_opset: ClassVar[int] = 23

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        node = match.root
        if match.target.name != "ort-cpu":
            raise Decline(f"target {match.target.name} has its own attention kernels")
        if any(match.dtype(name) != ir.DataType.FLOAT for name in "qkv"):
            raise Decline("it is not float32, for which this was measured")
        if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
            raise Decline("it reads or writes a cache, or gives its scores")
        if node.attributes.get_float("softcap", 0.0):
            raise Decline("its scores are capped after the mask is added")
        if match.graph is not match.model.graph:
            raise Decline("it is inside of a branch, which may be a block already")
        if any(match.rank(name) not in (3, 4) or match.rank(name) != match.rank("q") for name in "qkv"):
            raise Decline("the rank of queries, keys or values is unknown")

    def rewrite(self, op: Any, match: Match) -> ir.Value:
        node, graph = match.root, match.graph
        terms = _lengths(node)
        causal = _bound(node, *terms)
        cases = self._cases(terms[0])
        lengths = [_read_length(op, node, 0, terms[0], graph)]
        lengths.append(lengths[0] if terms[0] == terms[1] else _read_length(op, node, 1, terms[1], graph))
        offset = _offset(op, causal.offset, node, graph)
        needed = _conditions(op, node, causal, lengths)
        by_length: list[ir.Value] = []
        if isinstance(lengths[0], ir.Value):
            by_length = [op.GreaterOrEqual(lengths[0], np.array([least], dtype=np.int64)) for _, least in cases]
            needed.append(by_length[0])
        condition = functools.reduce(op.And, needed) if needed else None
        counts = [count for count, _ in cases]
        many = by_length[-1] if len(counts) > 1 else None
        return _Blocked(op, node, lengths, offset, counts, condition, many).output()

    def _cases(self, length: Term) -> list[tuple[int, int]]:
        """(number of blocks, fewest queries), fewest first; of a known length only the one for it."""
        many = max(self.from_length, _MANY_FROM)
        counts = [(self.buckets, self.from_length)] if self.buckets else [(_FEW, self.from_length), (_MANY, many)]
        if any(count < 2 for count, _ in counts):
            raise Decline(f"buckets is {self.buckets}; it takes 2 or more, or 0")
        cases = [(count, max(least, least_length(count))) for count, least in counts]
        if not isinstance(length, int):
            return cases
        fitting = [case for case in cases if case[1] <= length]
        if not fitting:
            raise Decline(f"it has {length} queries, and blocks pay from {cases[0][1]} on")
        return fitting[-1:]


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _axis(node: ir.Node) -> int:
    return 1 if rank(node.inputs[0]) == 3 else 2


def _lengths(node: ir.Node) -> tuple[Term, Term]:
    axis = _axis(node)
    query, key = sizes(node.inputs[0]), sizes(node.inputs[1])
    assert query is not None and key is not None
    maker = _operand(node, 0).producer()
    if is_op(maker, "Slice"):
        raise Decline("its queries are a part of others, so it may be a block already")
    return query[axis], key[axis]


def _bound(node: ir.Node, length: Term, key_length: Term) -> Causal:
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if node.attributes.get_int("is_causal", 0):
        if mask is not None:
            raise Decline("it is causal and has a mask too")
        return Causal(Offset(), first=True)
    if mask is None:
        raise Decline("every query sees every key")
    dims = _mask_sizes(mask)
    if dims is None or len(dims) < 2:
        raise Decline("the rank of its mask is unknown or below 2")
    # The kernel does not broadcast these, so they can only differ where nothing can run.
    if dims[-2:] != (length, key_length):
        raise Decline(f"its mask is {_shown(dims[-2:])} and queries and keys are {_shown((length, key_length))}")
    found = mask_allows(mask)
    if found is None:
        raise Decline(f"nothing says that its mask '{mask.name}' hides the keys after a query")
    if not found.offset.never_negative:
        raise Decline(f"its mask '{mask.name}' may hide all keys from the first queries")
    return found


def _mask_sizes(mask: ir.Value) -> tuple[Term, ...] | None:
    """The sizes of a mask; of one that is expanded, those it is expanded to, which are all above 1 in blocks."""
    node = mask.producer()
    told = contents(node.inputs[1]) if is_op(node, "Expand") else None  # type: ignore[union-attr]
    dims = sizes(mask)
    if dims is None or told is None or len(told) != len(dims):
        return dims
    return tuple(dim if item in (None, 1) else item for item, dim in zip(told, dims, strict=True))  # type: ignore[misc]


def _shown(terms: Sequence[Term]) -> str:
    return " by ".join("?" if isinstance(term, tuple) else str(term) for term in terms)


def _offset(op: Any, offset: Offset, node: ir.Node, graph: ir.Graph) -> Bound:
    if not offset.lengths:
        return offset.number
    total: Any = np.array([offset.number], dtype=np.int64) if offset.number else None
    for term, count in sorted(offset.lengths, key=str):
        if isinstance(term, tuple):
            part = op.Shape(term[0], start=term[1], end=term[1] + 1)
        elif any(term in (sizes(v) or ()) for v in graph.inputs):
            part = size_vector(op, term, _operand(node, 0), 0, graph)
        else:
            raise Decline(f"the mask is shifted by '{term}', which is the size of no input")
        part = part if count == 1 else op.Mul(part, np.array([count], dtype=np.int64))
        total = part if total is None else op.Add(part, total)
    result: ir.Value = total
    return result


def _read_length(op: Any, node: ir.Node, index: int, length: Term, graph: ir.Graph) -> Bound:
    if isinstance(length, int):
        return length
    read: ir.Value = size_vector(op, length, _operand(node, index), _axis(node), graph)
    return read


def _conditions(op: Any, node: ir.Node, causal: Causal, lengths: Sequence[Bound]) -> list[ir.Value]:
    """What must hold at run time, besides the length, for blocks to compute the same."""
    needed = []
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None and mask.dtype != ir.DataType.BOOL and not causal.first:
        needed.append(_every_row_keeps_a_key(op, mask))
    for value, axis in causal.same:
        at = (rank(value) or 0) + axis
        needed.append(op.Equal(op.Shape(value, start=at, end=at + 1), vector(lengths[axis + 2])))
    return needed


def _every_row_keeps_a_key(op: Any, mask: ir.Value) -> ir.Value:
    """Whether each row of a float mask has a key that is not masked; true of no rows."""
    highest = op.ReduceMax(mask, np.array([-1], dtype=np.int64), keepdims=0)
    rows = op.Reshape(highest, np.array([-1], dtype=np.int64))
    lowest = op.ReduceMin(op.Concat(rows, np.zeros(1, dtype=np.float32), axis=0), keepdims=1)
    kept: ir.Value = op.Greater(lowest, np.float32(KEPT))
    return kept


@dataclass
class _Blocked:
    """Attention `node` in blocks where `condition` holds (None: always), in the more of them where `many` does."""

    op: Any
    node: ir.Node
    lengths: Sequence[Bound]
    offset: Bound
    counts: Sequence[int]
    condition: ir.Value | None
    many: ir.Value | None

    def output(self) -> ir.Value:
        # Masks of blocks are chosen apart from the attention, once for all layers.
        masks = self._choose(self._masks, self._no_masks)
        return self._choose(lambda count: [self._attend(count, masks)], self._whole)[0]

    def _choose(self, make: Callable[[int], list[ir.Value]], otherwise: Make) -> list[ir.Value]:
        few, many = self.counts[0], self.counts[-1]
        split = lambda: choose(self.op, self.many, lambda: make(many), lambda: make(few))  # noqa: E731
        return choose(self.op, self.condition, split, otherwise)

    def _parts(self, count: int) -> list[Block]:
        return blocks(self.op, self.lengths[0], count, self.offset)

    @property
    def _mask(self) -> ir.Value | None:
        return self.node.inputs[3] if len(self.node.inputs) > 3 else None

    def _masks(self, count: int) -> list[ir.Value]:
        parts = self._parts(count)
        if self._mask is None:
            made = causal_parts(self.op, parts, *self.lengths)
        else:
            made = mask_parts(self.op, self._mask, parts)
        return [*made, *self._no_masks()[count:]]

    def _no_masks(self) -> list[ir.Value]:
        mask = self._mask
        dims, dtype = ((0, 0), ir.DataType.BOOL) if mask is None else ((0,) * (rank(mask) or 0), mask.dtype)
        assert dtype is not None
        return [self.op.initializer(np.zeros(dims, dtype=dtype.numpy()))] * max(self.counts)

    def _attend(self, count: int, masks: list[ir.Value]) -> ir.Value:
        return attend(self.op, self.node, masks[:count], self._parts(count))

    def _whole(self) -> list[ir.Value]:
        again = self.op.Attention(*self.node.inputs, **dict(self.node.attributes))
        again.type, again.shape = self.node.outputs[0].type, self.node.outputs[0].shape
        return [again]
