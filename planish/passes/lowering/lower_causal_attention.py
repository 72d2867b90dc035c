"""Computes causal attention in blocks of queries, each on the keys that it can see."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
        lengths = _lengths(node)
        causal = _bound(node, *lengths)
        cases = self._cases(lengths[0])
        bounds = [_read_length(op, node, index, term, graph) for index, term in enumerate(lengths)]
        offset = _offset(op, causal.offset, node, graph)
        conditions = _conditions(op, node, causal, bounds)
        plans: list[tuple[ir.Value | None, list[Block]]] = []
        for count, least in cases:
            needed = list(conditions)
            if isinstance(bounds[0], ir.Value):
                needed.append(op.GreaterOrEqual(bounds[0], np.array([least], dtype=np.int64)))
            condition = functools.reduce(op.And, needed) if needed else None
            plans.append((condition, blocks(op, bounds[0], count, offset)))
        return _assemble(op, node, plans, bounds)

    def _cases(self, length: Term) -> list[tuple[int, int]]:
        """(number of blocks, fewest queries), most first; of a known length only the one for it."""
        many = max(self.from_length, _MANY_FROM)
        counts = [(self.buckets, self.from_length)] if self.buckets else [(_MANY, many), (_FEW, self.from_length)]
        if any(count < 2 for count, _ in counts):
            raise Decline(f"buckets is {self.buckets}; it takes 2 or more, or 0")
        cases = [(count, max(least, least_length(count))) for count, least in counts]
        if not isinstance(length, int):
            return cases
        fitting = [case for case in cases if case[1] <= length]
        if not fitting:
            raise Decline(f"it has {length} queries, and blocks pay from {cases[-1][1]} on")
        return fitting[:1]


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


def _assemble(
    op: Any, node: ir.Node, plans: Sequence[tuple[ir.Value | None, list[Block]]], lengths: Sequence[Bound]
) -> ir.Value:
    """One Attention, or blocks, by the conditions. Masks of blocks are chosen apart, once for all layers."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None

    def masks_of(part: list[Block]) -> list[ir.Value]:
        return causal_parts(op, part, *lengths) if mask is None else mask_parts(op, mask, part)

    if plans[0][0] is None:
        return attend(op, node, masks_of(plans[0][1]), plans[0][1])
    most = max(len(part) for _, part in plans)
    dims, dtype = ((0, 0), np.bool_) if mask is None else ((0,) * (rank(mask) or 0), mask.dtype.numpy())  # type: ignore
    unused = op.initializer(np.zeros(dims, dtype=dtype))

    def padded(part: list[Block]) -> list[ir.Value]:
        return [*masks_of(part), *[unused] * (most - len(part))]

    def whole() -> list[ir.Value]:
        again = op.Attention(*node.inputs, **dict(node.attributes))
        again.type, again.shape = node.outputs[0].type, node.outputs[0].shape
        return [again]

    masks = choose(op, [*((c, lambda p=p: padded(p)) for c, p in plans), (None, lambda: [unused] * most)], most)
    blocked = [(c, lambda p=p: [attend(op, node, masks[: len(p)], p)]) for c, p in plans]
    return choose(op, [*blocked, (None, whole)], 1)[0]
