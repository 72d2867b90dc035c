"""RGCNConv and FastRGCNConv (Schlichtkrull et al. 2018, arXiv:1703.06103) as relational programs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from planish.frontends.pyg.call import (
    ALL,
    MEANS,
    Ends,
    LayerCall,
    aggregation,
    check_plain,
    edges,
    features,
    first_rows,
)
from planish.ir.errors import InputError
from planish.ir.relational.builder import Builder, src
from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, NONE
from planish.ir.relational.inter import Operand, Program


def rgcn(module: Any, x: Any, edge_index: Any, edge_type: Any = None) -> LayerCall:
    """Reads a call of an RGCNConv or FastRGCNConv: mean, sum or max, bases or blocks, root weight, bias.

    Without features (x is None or integers: rows of the weights are embeddings of nodes) messages are rows of the
    weights: they are looked up before the program, which aggregates them.
    """
    name = check_plain(module)
    reduce = aggregation(module, name, MEANS if type(module).__name__ == "FastRGCNConv" else ALL)
    index, types = edges(module, name, edge_index, edge_type)
    if edge_type is None:
        raise InputError(f"{name}: edge_type is missing.")
    width = module.in_channels_l
    if x is None:
        x = torch.arange(width)
    elif isinstance(x, tuple | list) and len(x) == 2 and x[0] is None:
        x = (torch.arange(width), x[1])
    ends = Ends.of(name, x)
    assert ends.destination is not None
    out = module.out_channels
    weights: dict[str, Tensor] = {}
    if module.bias is not None:
        weights["bias"] = module.bias
    if not ends.source.is_floating_point():
        inputs = _looked_up(module, name, ends, index, types)
        program = _embedding_program(out, reduce, module.root is not None, module.bias is not None)
    else:
        own = module.root.shape[0] if module.root is not None else ends.destination.shape[1]
        inputs = {"x": features(name, "x", ends.source, width)}
        weights["weight"] = full_weight(module)
        same = ends.destination is ends.source
        if module.root is not None:
            weights["root"] = module.root
            if not same:
                inputs["x_root"] = features(name, "the second of x", ends.destination, own)
        blocks = module.num_blocks or 0
        sizes = (width, out, own if module.root is not None else 0)
        program = rgcn_program(*sizes, blocks, reduce, same, module.bias is not None)
    return LayerCall(program, index, types, (ends.nodes,), module.num_relations, inputs, weights, first_rows(ends.rows))


def full_weight(module: Any) -> Tensor:
    """(relations, in, out): sums of bases multiplied out; (relations, blocks, in / blocks, out / blocks) for blocks."""
    weight: Tensor = module.weight
    if module.num_bases is not None:
        flat = module.comp @ weight.view(module.num_bases, -1)
        return flat.view(module.num_relations, module.in_channels_l, module.out_channels)
    return weight


@lru_cache(maxsize=256)
def rgcn_program(width: int, out: int, root: int, blocks: int, reduce: str, same: bool, bias: bool) -> Program:
    """The program of a layer with features.

    Args:
        width, out: features of sources, and of results.
        root: features that the root weight takes; 0: no root weight.
        blocks: of the block-diagonal weights; 0: full ones.
        reduce: over the edges of one type into one node; over types it is always a sum.
        same: the root weight is applied to the features that the sources have.
        bias: whether there is one.
    """
    b = Builder("RGCN")
    x = b.input("x", NODE, width)
    x_root = b.input("x_root", NODE, root) if root and not same else x
    if blocks:
        weight = b.weight("weight", EDGE_TYPE, blocks, width // blocks, out // blocks)
    else:
        weight = b.weight("weight", EDGE_TYPE, width, out)
    if reduce in ("sum", "mean"):
        total = _reduced(b, _typed(b, src(x), weight, EDGE, blocks, width, out), reduce)
    else:
        # Not linear: PyG's layer reduces the features, and multiplies the result.
        extreme = b.emit(reduce, src(x), over=EDGE, domain=DST_PAIR)
        message = _typed(b, extreme, weight, DST_PAIR, blocks, width, out)
        total = b.emit("sum", message, over=DST_PAIR, domain=NODE)
    return b.build(_finish(b, total, x_root, out, root, bias))


@lru_cache(maxsize=256)
def _embedding_program(out: int, reduce: str, root: bool, bias: bool) -> Program:
    b = Builder("RGCNEmbedding")
    message = b.input("message", EDGE, out)
    own = b.input("own", NODE, out)
    total = _reduced(b, message, reduce)
    if root:
        total = b.emit("add", total, own, over=NODE)
    return b.build(_finish(b, total, None, out, 0, bias))


def _reduced(b: Builder, message: Operand, reduce: str) -> Operand:
    if reduce == "sum":
        return b.emit("sum", message, over=EDGE, domain=NODE, by="dst")
    by_pair = b.emit(reduce, message, over=EDGE, domain=DST_PAIR)
    return b.emit("sum", by_pair, over=DST_PAIR, domain=NODE)


def _typed(b: Builder, x: Operand, weight: Operand, over: Any, blocks: int, width: int, out: int) -> Operand:
    if not blocks:
        return b.emit("linear", x, weight, over=over)
    split = b.emit("reshape", x, over=over, shape=(blocks, width // blocks))
    return b.emit("reshape", b.emit("linear", split, weight, over=over), shape=(out,))


def _finish(b: Builder, total: Operand, x: Operand | None, out: int, root: int, bias: bool) -> Operand:
    if root and x is not None:
        total = b.emit("add", total, b.emit("linear", x, b.weight("root", NONE, root, out)))
    if bias:
        total = b.emit("add", total, b.weight("bias", NONE, out))
    return total


def _looked_up(module: Any, name: str, ends: Ends, index: Tensor, types: Tensor) -> dict[str, Tensor]:
    """Messages and own rows of a call without features."""
    if module.num_blocks is not None:
        raise InputError(f"{name}: num_blocks needs float features; x holds node numbers.")
    assert ends.destination is not None
    out = module.out_channels
    rows = full_weight(module).reshape(-1, out)
    message = rows[types * module.in_channels_l + ends.source[index[0]]]
    own = ends.destination
    if module.root is None:
        return {"message": message, "own": message.new_zeros(own.shape[0], out)}
    return {"message": message, "own": module.root[own] if not own.is_floating_point() else own @ module.root}
