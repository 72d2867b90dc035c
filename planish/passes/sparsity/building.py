"""What takes the place of an attention: the block-sparse operator, or on a step over a cache the pattern as a mask."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.block_sparsity import Layout
from planish.ir.ops import DIALECT_DOMAIN
from planish.passes.fusion.sizes import sizes
from planish.passes.lowering.causal_buckets import choose
from planish.passes.sparsity.sites import MICROSOFT, Site

_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Bounds:
    """Lengths between which the pattern is used: more than `least` tokens, at most `most`; else attention is dense."""

    least: int
    most: int


def prompt(op: Any, site: Site, layout: Layout, bounds: Bounds, kernels: bool) -> ir.Value:
    """The output of a prompt's attention.

    Args:
        kernels: the target has generated kernels; dense attention then has one too.
    """
    node, old = site.node, site.node.outputs[0]
    wide = len(sizes(site.operand(0)) or ()) == 4

    def typed(value: ir.Value) -> ir.Value:
        value.type, value.shape = old.type, old.shape
        return value

    def sparse() -> list[ir.Value]:
        q, k, v = (_flat(op, site, i) if wide else site.operand(i) for i in range(3))
        lists = (layout.indptr, layout.indices, layout.head_layout)
        settings = _settings(site) | {"block_size": layout.block, "_domain": DIALECT_DOMAIN}
        if site.parts.keys:
            mask, hidden = _key_mask(op, site), site.parts.hidden
            y = op.BlockSparseAttentionKeyMask(q, k, v, mask, *lists, hidden_score=hidden, **settings)
        else:
            y = op.BlockSparseAttention(q, k, v, *lists, **settings)
        if wide:
            y = op.Transpose(op.Reshape(y, [0, 0, site.heads.query, site.size]), perm=[0, 2, 1, 3])
        return [typed(y)]

    def dense() -> list[ir.Value]:
        if not kernels or wide:
            return [typed(op.Attention(*node.inputs, **dict(node.attributes)))]
        settings = _settings(site) | {"_domain": DIALECT_DOMAIN}
        q, k, v = (site.operand(i) for i in range(3))
        if not site.parts.keys:
            return [typed(op.FlashAttention(q, k, v, **settings))]
        mask = _key_mask(op, site)
        return [typed(op.FlashAttentionKeyMask(q, k, v, mask, hidden_score=site.parts.hidden, **settings))]

    if isinstance(site.length, int):
        return sparse()[0]
    axis = 2 if wide else 1
    length = _length(op, site, axis)
    condition = op.And(
        op.Greater(length, np.array([bounds.least], np.int64)),
        op.LessOrEqual(length, np.array([bounds.most], np.int64)),
    )
    return choose(op, condition, sparse, dense)[0]


def _length(op: Any, site: Site, axis: int) -> ir.Value:
    """The number of queries as a vector of one, read off an input where one has it, so that layers share it."""
    graph = site.node.graph
    assert isinstance(graph, ir.Graph)
    for value in graph.inputs:
        dims = sizes(value) or ()
        if isinstance(site.length, str) and site.length in dims:
            at = dims.index(site.length)
            found: ir.Value = op.Shape(value, start=at, end=at + 1)
            return found
    found = op.Shape(site.operand(0), start=axis, end=axis + 1)
    return found


def _settings(site: Site) -> dict[str, Any]:
    return {
        "q_num_heads": site.heads.query,
        "kv_num_heads": site.heads.kv,
        "scale": site.scale,
        "is_causal": int(site.causal),
    }


def _flat(op: Any, site: Site, index: int) -> ir.Value:
    """(batch, heads, length, size) as (batch, length, heads · size)."""
    value, heads = site.operand(index), site.heads.query if index == 0 else site.heads.kv
    flat: ir.Value = op.Reshape(op.Transpose(value, perm=[0, 2, 1, 3]), [0, 0, heads * site.size])
    flat.type = value.type
    if value.shape is not None:
        flat.shape = ir.Shape([value.shape[0], value.shape[2], heads * site.size])
    return flat


def _key_mask(op: Any, site: Site) -> ir.Value:
    """The mask of keys, (batch or 1, 1, 1, keys)."""

    def wide(value: ir.Value) -> ir.Value:
        missing = 4 - len(sizes(value) or ())
        made: ir.Value = op.Unsqueeze(value, list(range(missing))) if missing else value
        return made

    found: ir.Value = functools.reduce(op.And, [wide(value) for value in site.parts.keys])
    return found


def step(op: Any, site: Site, layout: Layout, bounds: Bounds, lists: bool = False) -> list[ir.Value]:
    """The outputs of attention over a cache of all positions.

    Args:
        lists: with the lists of the pattern, for CUDA, where GroupQueryAttention takes no mask; else with a mask.
    """
    node = site.node
    # The operator begins with the pattern, and ends with the last row of its lists.
    bounded = bounds.least > layout.dense_rows() * layout.block or bounds.most < layout.rows * layout.block
    if lists and site.separate and not bounded:
        settings = {name: value for name, value in _settings(site).items() if name != "is_causal"}
        settings |= {"block_size": layout.block, "_domain": DIALECT_DOMAIN}
        tables = (layout.indptr, layout.indices, layout.head_layout)
        return list(op.BlockSparseStep(*node.inputs[:6], *tables, _outputs=3, **settings))
    if site.separate:
        held, total = site.operand(5), site.operand(6)
        total = op.Cast(total, to=int(ir.DataType.INT64))
        seen = _seen(op, layout, op.Cast(held, to=int(ir.DataType.INT64)), total, bounds)
        seen = op.Unsqueeze(op.Transpose(seen, perm=[1, 0, 2]), [2])
        bias = op.Where(seen, np.float32(0), np.float32(_LOWEST))
        inputs = [*node.inputs[:7], None, None, None, bias]
        return list(op.GroupQueryAttention(*inputs, _outputs=3, _domain=MICROSOFT, **dict(node.attributes)))
    past = op.Shape(site.operand(4), start=2, end=3)
    axis = 2 if len(sizes(site.operand(0)) or ()) == 4 else 1
    new = op.Shape(site.operand(0), start=axis, end=axis + 1)
    total = op.Add(past, new)
    positions = op.Range(op.Squeeze(past, [0]), op.Squeeze(total, [0]), np.int64(1))
    seen = op.Unsqueeze(_seen(op, layout, positions, total, bounds), [0])
    mask = node.inputs[3]
    if mask is not None:
        seen = op.And(seen, mask) if mask.dtype == ir.DataType.BOOL else op.Where(seen, mask, np.float32(_LOWEST))
    made = op.Attention(*node.inputs[:3], seen, *node.inputs[4:], _outputs=len(node.outputs), **dict(node.attributes))
    return [made] if len(node.outputs) == 1 else list(made)


def _seen(op: Any, layout: Layout, positions: ir.Value, total: ir.Value, bounds: Bounds) -> ir.Value:
    """(query heads or 1, positions, keys) bool: what queries at `positions` see of `total` keys (a vector of one)."""
    last, block = np.int64(layout.rows - 1), np.int64(layout.block)
    keys = op.Range(np.int64(0), op.Squeeze(total, [0]), np.int64(1))
    row, column = (op.Min(op.Div(at, block), last) for at in (positions, keys))
    seen = op.Gather(op.Gather(op.initializer(layout.masks(), "block_mask"), row, axis=1), column, axis=2)
    if len(layout.indptr) > 1:
        seen = op.Gather(seen, layout.head_layout.astype(np.int64), axis=0)
    free = op.Greater(total, np.array([bounds.most], np.int64))
    if bounds.least > layout.dense_rows() * layout.block:
        free = op.Or(free, op.LessOrEqual(total, np.array([bounds.least], np.int64)))
    found: ir.Value = op.Or(seen, free)
    return found
