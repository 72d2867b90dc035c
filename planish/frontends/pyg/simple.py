"""Convolutions of one edge type, as they stand in a HeteroConv: SAGEConv, GraphConv, GCNConv, GATConv.

SAGEConv: Hamilton et al. 2017 (arXiv:1706.02216); GraphConv: Morris et al. 2019 (arXiv:1810.02244); GCNConv: Kipf and
Welling 2017 (arXiv:1609.02907); GATConv: Veličković et al. 2018 (arXiv:1710.10903). A linear layer on nodes alone (of
the root, of the result) is left to torch: it is no part of the program.
"""

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
)
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.relational.builder import Builder, dst, src
from planish.ir.relational.domains import EDGE, NODE
from planish.ir.relational.inter import Program


def sage(module: Any, x: Any, edge_index: Any, size: Any = None) -> LayerCall:
    """Reads a call of a SAGEConv: mean, sum, max or min; root weight, projection, normalization."""
    name = check_plain(module)
    _no_size(name, size)
    reduce = aggregation(module, name, ALL)
    index, types = edges(module, name, edge_index)
    ends = _bipartite(module, name, x)
    source = ends.source
    if module.project:
        source = module.lin(source).relu()

    def result(outputs: Any) -> Tensor:
        y = module.lin_l(outputs[0][: ends.rows])
        if module.root_weight and ends.destination is not None:
            y = y + module.lin_r(ends.destination[: ends.rows])
        return torch.nn.functional.normalize(y, p=2.0, dim=-1) if module.normalize else y

    program = _aggregate("SAGE", source.shape[1], reduce, False)
    return LayerCall(program, index, types, (ends.nodes,), 1, {"x": source}, {}, result)


def graph_conv(module: Any, x: Any, edge_index: Any, edge_weight: Any = None, size: Any = None) -> LayerCall:
    """Reads a call of a GraphConv: mean, sum, max or min; edge weights."""
    name = check_plain(module)
    _no_size(name, size)
    reduce = aggregation(module, name, ALL)
    index, types = edges(module, name, edge_index)
    ends = _bipartite(module, name, x)
    inputs = {"x": ends.source, **_edge_weight(name, edge_weight)}

    def result(outputs: Any) -> Tensor:
        assert ends.destination is not None
        y: Tensor = module.lin_rel(outputs[0][: ends.rows]) + module.lin_root(ends.destination[: ends.rows])
        return y

    program = _aggregate("GraphConv", ends.source.shape[1], reduce, edge_weight is not None)
    return LayerCall(program, index, types, (ends.nodes,), 1, inputs, {}, result)


def gcn(module: Any, x: Any, edge_index: Any, edge_weight: Any = None) -> LayerCall:
    """Reads a call of a GCNConv: normalized or not, with self-loops or without, edge weights without self-loops."""
    name = check_plain(module)
    aggregation(module, name, {"add": "sum", "sum": "sum"})
    if module.cached:
        raise UnsupportedError(f"{name}: cached=True; planish caches what depends on the graph by itself.")
    if module.add_self_loops and edge_weight is not None:
        raise UnsupportedError(f"{name}: edge weights together with self-loops; set add_self_loops=False.")
    index, types = edges(module, name, edge_index)
    features(name, "x", x, module.lin.weight.shape[1])
    inputs = {"x": module.lin(x), **_edge_weight(name, edge_weight)}
    weighted = edge_weight is not None
    if module.add_self_loops:
        # A loop counts once for each node, whether the graph has it or not: those in the graph weigh nothing.
        inputs["edge_weight"] = (index[0] != index[1]).to(torch.float32)
        weighted = True
    # PyG gives loops the weight 1 where edges have no weights, whatever `improved` says.
    loop = 1.0 if module.add_self_loops else 0.0
    program = _gcn_program(module.lin.weight.shape[0], bool(module.normalize), weighted, loop)

    def result(outputs: Any) -> Tensor:
        y: Tensor = outputs[0]
        return y + module.bias if module.bias is not None else y

    return LayerCall(program, index, types, (x.shape[0],), 1, inputs, {}, result)


def gat(
    module: Any, x: Any, edge_index: Any, edge_attr: Any = None, size: Any = None, return_attention_weights: Any = None
) -> LayerCall:
    """Reads a call of a GATConv: heads, edge features without self-loops, residual, shared or separate projections."""
    name = check_plain(module)
    _no_size(name, size)
    if return_attention_weights:
        raise UnsupportedError(f"{name}: return_attention_weights; a relational layer gives the features alone.")
    if module.training and module.dropout > 0:
        raise UnsupportedError(f"{name}: dropout of attention while training; set dropout to 0, or call eval().")
    if module.add_self_loops and edge_attr is not None:
        raise UnsupportedError(f"{name}: edge features together with self-loops; set add_self_loops=False.")
    reduce = aggregation(module, name, MEANS)
    index, types = edges(module, name, edge_index)
    heads, out = module.heads, module.out_channels
    ends = _bipartite(module, name, x)
    assert ends.destination is not None
    of_source, of_destination = (module.lin, module.lin) if module.lin is not None else (module.lin_src, module.lin_dst)
    z = of_source(ends.source).view(-1, heads, out)
    same = ends.destination is ends.source and of_source is of_destination
    z_dst = z if same else of_destination(ends.destination).view(-1, heads, out)
    inputs = {
        "z": z,
        "of_source": (z * module.att_src).sum(-1),
        "of_destination": (z_dst * module.att_dst).sum(-1),
    }
    bias = edge_attr is not None and module.lin_edge is not None
    if bias:
        attr = edge_attr.view(-1, 1) if edge_attr.dim() == 1 else edge_attr
        by_head = module.lin_edge(features(name, "edge_attr", attr, module.edge_dim)).view(-1, heads, out)
        inputs["of_edge"] = (by_head * module.att_edge).sum(-1)
    masked = bool(module.add_self_loops)
    if masked:
        index, types, inputs["mask"] = _with_loops(x, index, types, ends, reduce, name)

    def result(outputs: Any) -> Tensor:
        y: Tensor = outputs[0][: ends.rows]
        y = y.reshape(-1, heads * out) if module.concat else y.mean(1)
        if module.res is not None:
            assert ends.destination is not None
            y = y + module.res(ends.destination[: ends.rows])
        return y + module.bias if module.bias is not None else y

    program = _gat_program(heads, out, float(module.negative_slope), bias, masked, reduce)
    return LayerCall(program, index, types, (ends.nodes,), 1, inputs, {}, result)


def _with_loops(
    x: Any, index: Tensor, types: Tensor, ends: Ends, reduce: str, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One loop for each node after the edges; loops that were there get minus infinity as their logit.

    Their weight in the sum is then exactly 0, and no size depends on how many there are.
    """
    if reduce == "mean":
        raise UnsupportedError(f"{name}: aggr 'mean' together with self-loops; set add_self_loops=False.")
    count = ends.nodes if isinstance(x, Tensor) else min(x[0].shape[0], x[1].shape[0])
    loops = torch.arange(count)
    mask = torch.zeros(index.shape[1]).masked_fill(index[0] == index[1], -torch.inf)
    return (
        torch.cat([index, torch.stack([loops, loops])], 1),
        torch.cat([types, torch.zeros_like(loops)]),
        torch.cat([mask, torch.zeros(count)]),
    )


def _bipartite(module: Any, name: str, x: Any) -> Ends:
    if not isinstance(x, Tensor) and module.flow == "target_to_source":
        raise UnsupportedError(f"{name}: a pair of features with flow 'target_to_source'.")
    ends = Ends.of(name, x)
    for what, tensor in (("x", ends.source), ("the second of x", ends.destination)):
        if tensor is not None and tensor.dim() != 2:
            raise InputError(f"{name}: {what} has shape {tuple(tensor.shape)}; it must be (rows, features).")
        if tensor is not None and tensor.dtype != torch.float32:
            raise InputError(f"{name}: {what} is {tensor.dtype}; it must be float32.")
    return ends


def _no_size(name: str, size: Any) -> None:
    if size is not None:
        raise UnsupportedError(f"{name}: size; leave it out, give features of both ends.")


def _edge_weight(name: str, weight: Any) -> dict[str, Tensor]:
    if weight is None:
        return {}
    if not isinstance(weight, Tensor) or weight.dtype != torch.float32:
        raise InputError(f"{name}: edge_weight is {getattr(weight, 'dtype', type(weight).__name__)}; give float32.")
    return {"edge_weight": weight.reshape(-1)}


@lru_cache(maxsize=256)
def _aggregate(name: str, width: int, reduce: str, weighted: bool) -> Program:
    b = Builder(name)
    x = b.input("x", NODE, width)
    if not weighted:
        return b.build(b.emit(reduce, src(x), over=EDGE, domain=NODE, by="dst"))
    message = b.emit("mul", src(x), b.input("edge_weight", EDGE), over=EDGE)
    return b.build(b.emit(reduce, message, over=EDGE, domain=NODE, by="dst"))


@lru_cache(maxsize=256)
def _gcn_program(width: int, normalize: bool, weighted: bool, loop: float) -> Program:
    """Sums of x_src, weighted by 1 / sqrt(degree_src degree_dst); a loop of weight `loop` at each node."""
    b = Builder("GCN")
    x = b.input("x", NODE, width)
    weight = b.input("edge_weight", EDGE) if weighted else None
    if not normalize:
        message = b.emit("mul", src(x), weight, over=EDGE) if weight else src(x)
        return b.build(b.emit("sum", message, over=EDGE, domain=NODE, by="dst"))
    if weight:
        degree = b.emit("sum", weight, over=EDGE, domain=NODE, by="dst")
    else:
        degree = b.emit("count", over=EDGE, domain=NODE, by="dst")
    if loop:
        degree = b.emit("add", degree, b.constant(loop), over=NODE)
    # A node without edges has degree 0 and the factor 0, not infinity.
    there = b.emit("step", degree)
    safe = b.emit("add", degree, b.emit("sub", b.constant(1.0), there, over=NODE))
    factor = b.emit("mul", b.emit("recip", b.emit("sqrt", safe)), there, name="factor")
    scaled = b.emit("mul", x, factor, over=NODE)
    message = b.emit("mul", src(scaled), weight, over=EDGE) if weight else src(scaled)
    y = b.emit("sum", message, over=EDGE, domain=NODE, by="dst")
    if loop:
        y = b.emit("add", y, b.emit("mul", scaled, b.constant(loop), over=NODE))
    return b.build(b.emit("mul", y, factor, over=NODE))


@lru_cache(maxsize=256)
def _gat_program(heads: int, out: int, slope: float, biased: bool, masked: bool, reduce: str) -> Program:
    b = Builder("GAT")
    z = b.input("z", NODE, heads, out)
    of_source, of_destination = b.input("of_source", NODE, heads), b.input("of_destination", NODE, heads)
    logits = b.emit("add", src(of_source), dst(of_destination), over=EDGE)
    if biased:
        logits = b.emit("add", logits, b.input("of_edge", EDGE, heads))
    logits = b.emit("leaky_relu", logits, slope=slope)
    if masked:
        logits = b.emit("add", logits, b.input("mask", EDGE))
    alpha = b.emit("reshape", b.emit("edge_softmax", logits, by="dst"), shape=(heads, 1))
    message = b.emit("mul", src(z), alpha, over=EDGE)
    return b.build(b.emit(reduce, message, over=EDGE, domain=NODE, by="dst"))
