"""Bodies of BlockSparseAttention and its relatives in standard ONNX: lists become a mask for Attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Schema
from planish.ir.ops.flash_attention import CAUSAL, KV_HEADS, Q_HEADS, SCALE, Body
from planish.ir.ops.key_mask_attention import HIDDEN

_LOWEST = float(np.finfo(np.float32).min)


def body(schema: Schema, opset: int) -> ir.Function:
    made = Body(schema, opset)
    value = made.values
    sees = _seen(made)
    if "key_mask" not in value:
        y = made.attend(value["q"], value["k"], value["v"], sees, is_causal=0)
    else:
        hidden = made.add("Constant", refs={"value_float": HIDDEN})
        scores = made.add(
            "Where", made.add("And", sees, value["key_mask"]), made.add("Constant", value_float=0.0), hidden
        )
        y = made.attend(value["q"], value["k"], value["v"], scores, is_causal=0)
    if len(schema.outputs) == 1:
        return made.function(y)
    return made.function(y, _log_sum_exp(made, sees))


def _seen(made: Body) -> ir.Value:
    """(1, heads, queries, keys), bool."""
    value, add = made.values, made.add
    zero, one = (add("Constant", value_int=n) for n in (0, 1))
    block, is_causal = made.attribute("block_size"), made.attribute(CAUSAL)
    queries, keys = (add("Squeeze", made.sizes(value[name], 1, 2)) for name in ("q", "k"))
    past = add("Mul", add("Sub", keys, queries), is_causal)
    positions = add("Add", add("Range", zero, queries, one), past)
    key = add("Range", zero, keys, one)
    columns = add("Div", add("Add", keys, add("Sub", block, one)), block)
    grid, rows = _grid(made, columns)
    row = add("Div", positions, block)
    there = add("Clip", row, zero, add("Squeeze", add("Sub", rows, one)))
    sees = add("Gather", add("Gather", grid, value["head_layout"], axis=0), there, axis=1)
    sees = add("Gather", sees, add("Div", key, block), axis=2)
    column = made.ints(-1, 1)
    if "tiles" in value:
        # Before the tiles come one of nothing and one of everything: the grid has 0 and 1 for them.
        kinds = add("Expand", add("Constant", value_ints=[0, 1]), made.ints(2))
        shape = add("Concat", made.ints(2), *[add("Unsqueeze", block, made.ints(0))] * 2, axis=0)
        first = add("Expand", add("Reshape", add("Cast", kinds, to=int(ir.DataType.BOOL)), made.ints(2, 1, 1)), shape)
        flat = add("Reshape", add("Concat", first, value["tiles"], axis=0), made.ints(-1))
        number = add("Cast", sees, to=int(ir.DataType.INT64))
        where = add("Mul", add("Mod", key, block), block)
        where = add("Add", where, add("Reshape", add("Mod", positions, block), column))
        sees = add("Gather", flat, add("Add", add("Mul", number, add("Mul", block, block)), where), axis=0)
    else:
        sees = add("Greater", sees, add("Constant", value_float=0.5))
    inside = add("Reshape", add("And", add("GreaterOrEqual", positions, zero), add("Less", row, rows)), column)
    earlier = add("LessOrEqual", key, add("Reshape", positions, column))
    earlier = add("Or", earlier, add("Equal", is_causal, zero))
    return add("Unsqueeze", add("And", sees, add("And", inside, earlier)), made.ints(0))


def _grid(made: Body, columns: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(layouts, rows, columns), float: 0 for a block that is not seen, 1 for one that is, t + 2 with tile t."""
    value, add = made.values, made.add
    zero, one = (add("Constant", value_int=n) for n in (0, 1))
    # (layouts · rows, entries): is the entry in the row's list? Times (entries, blocks): does it name the block?
    entry = add("Range", zero, add("Squeeze", made.sizes(value["indices"], 0, 1)), one)
    ends = add("Cast", value["indptr"], to=int(ir.DataType.INT64))
    last = made.sizes(value["indptr"], 1, 2)
    first_end, second_end = (
        add("Reshape", add("Slice", ends, made.ints(a), b, made.ints(1)), made.ints(-1, 1))
        for a, b in ((0, add("Sub", last, one)), (1, last))
    )
    listed = add("And", add("GreaterOrEqual", entry, first_end), add("Less", entry, second_end))
    index = add("Cast", add("Unsqueeze", value["indices"], made.ints(1)), to=int(ir.DataType.INT64))
    named = add("Cast", add("Equal", index, add("Range", zero, columns, one)), to=int(ir.DataType.FLOAT))
    if "entry_tile" in value:
        kind = add("Cast", add("Unsqueeze", value["entry_tile"], made.ints(1)), to=int(ir.DataType.FLOAT))
        named = add("Mul", named, add("Add", kind, add("Constant", value_float=2.0)))
    count = add("MatMul", add("Cast", listed, to=int(ir.DataType.FLOAT)), named)
    rows = add("Sub", last, one)
    shape = add("Concat", made.sizes(value["indptr"], 0, 1), rows, add("Unsqueeze", columns, made.ints(0)), axis=0)
    # Without keys there are no blocks, and a 0 in the shape must not mean "as before".
    return add("Reshape", count, shape, allowzero=1), rows


def _log_sum_exp(made: Body, sees: ir.Value) -> ir.Value:
    value, add = made.values, made.add
    heads = {}
    for name, count in (("q", Q_HEADS), ("k", KV_HEADS)):
        number = add("Unsqueeze", made.attribute(count), made.ints(0))
        # The size of a head is said: without queries or keys nothing else tells it.
        size = add("Div", made.sizes(value[name], 2, 3), number)
        shape = add("Concat", made.sizes(value[name], 0, 2), number, size, axis=0)
        heads[name] = add("Reshape", value[name], shape, allowzero=1), number, size
    (q, q_heads, size), (k, kv_heads, _) = heads["q"], heads["k"]
    batch, queries, keys = made.sizes(value["q"], 0, 1), made.sizes(value["q"], 1, 2), made.sizes(value["k"], 1, 2)
    shared = add("Div", q_heads, kv_heads)
    grouped = add("Reshape", add("Transpose", q, perm=[0, 2, 1, 3]),
                  add("Concat", batch, kv_heads, add("Mul", shared, queries), size, axis=0), allowzero=1)  # fmt: skip
    scores = add("MatMul", grouped, add("Transpose", k, perm=[0, 2, 3, 1]))
    scores = add("Reshape", scores, add("Concat", batch, q_heads, queries, keys, axis=0), allowzero=1)
    scores = add("Mul", scores, add("Constant", refs={"value_float": SCALE}))
    scores = add("Where", sees, scores, add("Constant", value_float=-np.inf))
    # Beside the lowest number there is a maximum of no keys too.
    least = add(
        "Expand", add("Constant", value_float=_LOWEST), add("Concat", batch, q_heads, queries, made.ints(1), axis=0)
    )
    top = add("ReduceMax", add("Concat", scores, least, axis=-1), made.ints(-1), keepdims=1)
    total = add("ReduceSum", add("Exp", add("Sub", scores, top)), made.ints(-1), keepdims=1)
    return add("Squeeze", add("Add", add("Log", total), top), made.ints(-1))
