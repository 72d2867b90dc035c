"""RGATConv (Busbridge et al. 2019, arXiv:1904.05811) as a relational program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from planish.frontends.pyg.call import MEANS, LayerCall, aggregation, check_plain, edges, features, first_rows
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.relational.builder import Builder, dst, src
from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, NONE
from planish.ir.relational.inter import Operand, Program


@dataclass(frozen=True)
class Options:
    """What an RGATConv is made of; `width` features in, `out` for each head, `dim` query and key numbers a head."""

    width: int
    out: int
    heads: int
    dim: int
    blocks: int
    additive: bool
    within: bool
    mod: str | None
    concat: bool
    slope: float
    edge_dim: int
    reduce: str
    bias: bool


def rgat(
    module: Any,
    x: Any,
    edge_index: Any,
    edge_type: Any = None,
    edge_attr: Any = None,
    size: Any = None,
    return_attention_weights: Any = None,
) -> LayerCall:
    """Reads a call of an RGATConv: both attention modes and mechanisms, heads, mods, bases or blocks, edge features."""
    name = check_plain(module)
    if module.training and module.dropout > 0:
        raise UnsupportedError(f"{name}: dropout of attention while training; set dropout to 0, or call eval().")
    if return_attention_weights is not None:
        raise UnsupportedError(f"{name}: return_attention_weights; a relational layer gives the features alone.")
    if size is not None:
        raise UnsupportedError(f"{name}: size; leave it out, the result has a row for each row of x.")
    if edge_type is None:
        raise InputError(f"{name}: edge_type is missing.")
    index, types = edges(module, name, edge_index, edge_type)
    features(name, "x", x, module.in_channels)
    inputs = {"x": x}
    if edge_attr is not None:
        if module.edge_dim is None:
            raise InputError(f"{name}: edge_attr is given, but the layer was made without edge_dim.")
        edge_attr = edge_attr.view(-1, 1) if edge_attr.dim() == 1 else edge_attr
        inputs["edge_attr"] = features(name, "edge_attr", edge_attr, module.edge_dim)
    options = Options(
        width=module.in_channels,
        out=module.out_channels,
        heads=module.heads,
        dim=module.dim,
        blocks=module.num_blocks or 0,
        additive=module.attention_mode == "additive-self-attention",
        within=module.attention_mechanism == "within-relation",
        mod=module.mod,
        concat=bool(module.concat),
        slope=float(module.negative_slope),
        edge_dim=module.edge_dim if edge_attr is not None else 0,
        reduce=aggregation(module, name, MEANS),
        bias=module.bias is not None,
    )
    return LayerCall(
        rgat_program(options), index, types, (x.shape[0],), module.num_relations, inputs, _weights(module, options),
        first_rows(x.shape[0]),
    )  # fmt: skip


def _weights(module: Any, options: Options) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {"q": module.q, "k": module.k}
    if module.num_bases is not None:
        flat = module.att @ module.basis.view(module.num_bases, -1)
        weights["weight"] = flat.view(module.num_relations, module.in_channels, -1)
    else:
        weights["weight"] = module.weight
    if options.edge_dim:
        weights["edge"] = module.lin_edge.weight.t() @ module.e
    if options.mod == "additive":
        weights["w"] = module.w
    if options.mod == "scaled":
        weights |= {
            "l1": module.l1.view(-1),
            "b1": module.b1.view(-1),
            "l2": module.l2,
            "b2": module.b2.view(-1),
        }
    if options.bias:
        weights["bias"] = module.bias
    return weights


@lru_cache(maxsize=256)
def rgat_program(o: Options) -> Program:
    """z = x W by edge type at both ends; logits from z_dst q and z_src k; softmax; a weighted sum of z_src."""
    b = Builder("RGAT")
    x = b.input("x", NODE, o.width)
    total = o.heads * o.out
    if o.blocks:
        weight = b.weight("weight", EDGE_TYPE, o.blocks, o.width // o.blocks, total // o.blocks)
    else:
        weight = b.weight("weight", EDGE_TYPE, o.width, total)

    def projected(end: Operand, name: str) -> Operand:
        if not o.blocks:
            return b.emit("linear", end, weight, over=EDGE, name=name)
        split = b.emit("reshape", end, over=EDGE, shape=(o.blocks, o.width // o.blocks))
        return b.emit("reshape", b.emit("linear", split, weight, over=EDGE), shape=(total,), name=name)

    z_dst, z = projected(dst(x), "z_dst"), projected(src(x), "z")
    query = b.emit("linear", z_dst, b.weight("q", NONE, total, o.heads * o.dim), name="query")
    key = b.emit("linear", z, b.weight("k", NONE, total, o.heads * o.dim), name="key")
    logits = b.emit("add" if o.additive else "mul", query, key, name="logits")
    if o.edge_dim:
        attr = b.input("edge_attr", EDGE, o.edge_dim)
        by_edge = b.emit("linear", attr, b.weight("edge", NONE, o.edge_dim, o.heads * o.dim))
        logits = b.emit("add" if o.additive else "mul", logits, by_edge)
    if o.additive:
        logits = b.emit("leaky_relu", logits, slope=o.slope)
    alpha = _softmax_within(b, logits) if o.within else b.emit("edge_softmax", logits, by="dst", name="alpha")
    return b.build(_aggregated(b, o, alpha, z))


def _softmax_within(b: Builder, logits: Operand) -> Operand:
    """Softmax over the edges of one type into one node."""
    most = b.emit("max_rows", logits, over=EDGE, domain=DST_PAIR)
    part = b.emit("exp", b.emit("sub", logits, most, over=EDGE))
    return b.emit("div", part, b.emit("sum", part, over=EDGE, domain=DST_PAIR), over=EDGE, name="alpha")


def _aggregated(b: Builder, o: Options, alpha: Operand, z: Operand) -> Operand:
    # Of one shape: (heads, out), with (dim) between them where the mode is multiplicative.
    middle = () if o.additive else (o.dim,)
    if o.mod == "f-additive":
        alpha = b.emit("add", alpha, b.emit("step", alpha))
    share = b.emit("reshape", alpha, shape=(o.heads, *middle, 1))
    if o.mod == "additive":
        share = b.emit("add", share, b.weight("w", NONE, o.out))
    values = b.emit("reshape", z, shape=(o.heads, *(1 for _ in middle), o.out))
    message = b.emit("mul", values, share, name="message")
    y = b.emit(o.reduce, message, over=EDGE, domain=NODE, by="dst")
    if o.mod in ("scaled", "f-scaled"):
        # The same factor for all edges into a node: it is taken out of the sum.
        degree = b.emit("count", over=EDGE, domain=NODE, by="dst")
        if o.mod == "scaled":
            factor = b.emit("mul", degree, b.weight("l1", NONE, o.out), over=NODE)
            factor = b.emit("relu", b.emit("add", factor, b.weight("b1", NONE, o.out)))
            factor = b.emit("linear", factor, b.weight("l2", NONE, o.out, o.out))
            degree = b.emit("add", factor, b.weight("b2", NONE, o.out))
        y = b.emit("mul", y, degree, over=NODE)
    width = (o.dim if middle else 1) * o.out
    if o.concat:
        y = b.emit("reshape", y, shape=(o.heads * width,))
    else:
        summed = b.emit("reshape", b.emit("fsum", y, axes=(0,)), shape=(width,))
        y = b.emit("mul", summed, b.constant(1.0 / o.heads), over=NODE)
    if o.bias:
        y = b.emit("add", y, b.weight("bias", NONE, o.heads * width if o.concat else width))
    return y
