"""Caches that keep only what some later query sees: `prefill` gives them, `decode` reads them and writes into them.

See :mod:`planish.ir.block_sparsity.slots` for what is where in a cache of slots.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.block_sparsity import SLOTS, SlotPlan
from planish.ir.causal_lm import cache_layer
from planish.passes.fusion.sizes import sizes
from planish.passes.sparsity.sites import Site, caches_of, lengths_of
from planish.passes.sparsity.splice import Splicer

_INT = int(ir.DataType.INT64)


@dataclass(frozen=True)
class _Held:
    """What slots hold.

    Attributes:
        block: the block of each slot, (batch, key-value heads or 1, slots).
        at: its position, of the same shape.
        seen: whether it holds a token that is still needed.
    """

    block: ir.Value
    at: ir.Value
    seen: ir.Value


def _held(op: Any, plan: SlotPlan, last: ir.Value, slots: ir.Value) -> _Held:
    """Of caches whose rows have their newest token at `last`, (batch, 1); slots is a vector of one."""
    slot = op.Range(np.int64(0), op.Squeeze(slots, [0]), np.int64(1))
    at, inside = op.Div(slot, np.int64(plan.block)), op.Mod(slot, np.int64(plan.block))
    row = op.Div(last, np.int64(plan.block))
    ring = op.Unsqueeze(op.Sub(row, op.Mod(op.Sub(row, at), np.int64(plan.local))), [1])
    kept = op.Unsqueeze(op.Sub(at, np.int64(plan.local)), [0])
    if plan.stride:
        index = op.Sub(at, np.int64(plan.fixed))
        first = (-np.array(plan.shifts, np.int64)) % plan.stride
        shard = op.Gather(first, op.Mod(index, np.int64(plan.shards)), axis=1)
        beyond = op.Add(shard, op.Mul(op.Div(index, np.int64(plan.shards)), np.int64(plan.stride)))
        kept = op.Where(op.Less(at, np.int64(plan.fixed)), kept, beyond)
    in_ring = op.Less(at, np.int64(plan.local))
    block = op.Where(in_ring, ring, op.Unsqueeze(kept, [0]))
    position = op.Add(op.Mul(block, np.int64(plan.block)), inside)
    there = op.And(op.GreaterOrEqual(block, np.int64(0)), op.LessOrEqual(position, op.Unsqueeze(last, [1])))
    stays = _stays(op, plan, block)
    if stays is not None:
        there = op.And(there, op.Not(op.And(in_ring, stays)))
    return _Held(block, position, there)


def _stays(op: Any, plan: SlotPlan, block: ir.Value) -> ir.Value | None:
    """Whether blocks, (batch, heads or 1, slots), are kept at any distance."""
    found = [op.Less(block, np.int64(plan.sinks))] if plan.sinks else []
    found += [_on(op, plan, block, column) for column in range(plan.shards)]
    return functools.reduce(op.Or, found) if found else None


def _on(op: Any, plan: SlotPlan, block: ir.Value, column: int) -> ir.Value:
    shift = np.array(plan.shifts, np.int64)[:, column : column + 1]
    found: ir.Value = op.Equal(op.Mod(op.Add(block, shift), np.int64(plan.stride)), np.int64(0))
    return found


def evict_step(op: Any, site: Site, plan: SlotPlan, shifts: tuple[int, ...]) -> list[ir.Value]:
    """The outputs of a step over caches of slots: (batch, 1, hidden), and both caches with the new token.

    Args:
        shifts: of each query head; looked at where a key-value head keeps the shards of several.
    """
    node, heads = site.node, site.heads
    group = heads.query // heads.kv
    past = [site.operand(3), site.operand(4)]
    last = op.Unsqueeze(op.Cast(site.operand(5), to=_INT), [1])
    where = _place(op, plan, last, heads.kv)
    caches = []
    for value, cache in zip((site.operand(1), site.operand(2)), past, strict=True):
        new = op.Reshape(value, [0, heads.kv, site.size])
        caches.append(op.ScatterND(cache, where, new))
        caches[-1].type, caches[-1].shape = cache.type, cache.shape
    held = _held(op, plan, last, op.Shape(past[0], start=2, end=3))
    seen = op.Unsqueeze(held.seen, [2])
    if plan.shards > 1:
        seen = op.And(seen, _own(op, plan, held.block, last, np.array(shifts, np.int64).reshape(heads.kv, group, 1)))
    batch = op.Shape(past[0], start=0, end=1)
    shape = op.Concat(batch, np.array([heads.kv, group], np.int64), op.Shape(past[0], start=2, end=3), axis=0)
    mask = op.Expand(seen, shape)
    query = op.Reshape(site.operand(0), [0, heads.kv, group, site.size])
    y = op.Attention(query, *caches, mask, scale=site.scale)
    y = op.Reshape(y, [0, 1, heads.query * site.size])
    y.type = node.outputs[0].type
    return [y, *caches]


def _own(op: Any, plan: SlotPlan, block: ir.Value, last: ir.Value, shifts: np.ndarray) -> ir.Value:
    """Which slots the query heads of a group see: (batch, key-value heads, group, slots)."""
    block = op.Unsqueeze(block, [2])
    row = op.Unsqueeze(op.Div(last, np.int64(plan.block)), [2, 3])
    near = op.Less(op.Sub(row, block), np.int64(plan.local))
    shard = op.Equal(op.Mod(op.Add(block, shifts), np.int64(plan.stride)), np.int64(0))
    found: ir.Value = op.Or(near, shard)
    return found


def _place(op: Any, plan: SlotPlan, last: ir.Value, heads: int) -> ir.Value:
    """Where the token at `last` is written: (batch, heads, 3), the indices of row, head and slot."""
    row = op.Div(last, np.int64(plan.block))
    block = op.Mod(row, np.int64(plan.local))
    if plan.sinks:
        block = op.Where(op.Less(row, np.int64(plan.sinks)), op.Add(row, np.int64(plan.local)), block)
    if plan.stride:
        first = op.Add(op.Mul(op.Div(row, np.int64(plan.stride)), np.int64(plan.shards)), np.int64(plan.fixed))
        for column in range(plan.shards):
            shift = np.array(plan.shifts, np.int64)[:, column]
            hit = op.Equal(op.Mod(op.Add(row, shift), np.int64(plan.stride)), np.int64(0))
            block = op.Where(hit, op.Add(first, np.int64(column)), block)
    slot = op.Add(op.Mul(block, np.int64(plan.block)), op.Mod(last, np.int64(plan.block)))
    batch = op.Shape(last, start=0, end=1)
    shape = op.Concat(batch, np.array([heads], np.int64), axis=0)
    rows = op.Unsqueeze(op.Range(np.int64(0), op.Squeeze(batch, [0]), np.int64(1)), [1])
    parts = [op.Expand(x, shape) for x in (rows, np.arange(heads, dtype=np.int64), slot)]
    found: ir.Value = op.Concat(*[op.Unsqueeze(x, [2]) for x in parts], axis=2)
    return found


def evict_prompt(op: Any, cache: ir.Value, lengths: ir.Value, plan: SlotPlan, heads: int) -> ir.Value:
    """The cache of slots, (batch, heads, slots, size), from that of all positions of a prompt."""
    tokens = op.Shape(cache, start=2, end=3)
    slots: Any = np.array([plan.capacity(1)], np.int64)
    if plan.stride:
        blocks = op.Div(op.Add(tokens, np.int64(plan.block - 1)), np.int64(plan.block))
        grown = op.Div(op.Add(blocks, np.int64(plan.stride - 1)), np.int64(plan.stride))
        slots = op.Add(op.Mul(grown, np.int64(plan.shards * plan.block)), np.int64(plan.fixed * plan.block))
    last = op.Unsqueeze(op.Sub(lengths, np.int64(1)), [1])
    held = _held(op, plan, last, slots)
    at = op.Max(op.Min(held.at, op.Sub(tokens, np.int64(1))), np.int64(0))
    rows = op.Range(np.int64(0), op.Squeeze(op.Shape(cache, start=0, end=1), [0]), np.int64(1))
    first = op.Add(op.Mul(op.Unsqueeze(rows, [1]), np.int64(heads)), np.arange(heads, dtype=np.int64))
    index = op.Add(op.Unsqueeze(op.Mul(first, tokens), [2]), at)
    size = (sizes(cache) or (0,) * 4)[3]
    assert isinstance(size, int)
    kept: ir.Value = op.Gather(op.Reshape(cache, np.array([-1, size], np.int64)), index, axis=0)
    kept.type = cache.type
    kept.shape = ir.Shape([cache.shape[0] if cache.shape is not None else None, heads, "slots", size])
    return kept


def evict(splicer: Splicer, step: Site, prefill: Site, plan: SlotPlan, shifts: tuple[int, ...]) -> None:
    """Gives the caches of one attention slots, in both entries.

    Raises:
        Decline: the caches are not those of task "causal-lm".
    """
    program = splicer.program
    caches = caches_of(step)
    names = [v.name.replace("past_", "present_", 1) for v in caches if v.name is not None]
    model = program.entry(prefill.entry)
    outputs = [next(v for v in model.graph.outputs if v.name == name) for name in names]
    lengths = lengths_of(model.graph)
    assert lengths is not None
    for cache in caches:
        assert cache.shape is not None and cache.name is not None
        cache.shape = ir.Shape([cache.shape[0], cache.shape[1], "slots", cache.shape[3]])
        cache.metadata_props[SLOTS] = plan.to_text()
        program.provenance[f"{SLOTS}.{cache_layer(cache.name)}"] = plan.to_text()
    for old in step.node.outputs[1:3]:
        assert old.shape is not None
        old.shape = ir.Shape([old.shape[0], old.shape[1], "slots", old.shape[3]])
    decode = program.entry(step.entry)
    made = splicer.build(decode, step.node, lambda op: evict_step(op, step, plan, shifts), [step.node])
    splicer.replace(step.node, made)
    for old in outputs:
        source = old.producer()
        assert source is not None

        def make(op: Any, old: ir.Value = old, lengths: ir.Value = lengths) -> list[ir.Value]:
            return [evict_prompt(op, old, lengths, plan, step.heads.kv)]

        (new,) = splicer.build(model, None, make, [source])
        splicer.replace_output(model.graph, old, new)
