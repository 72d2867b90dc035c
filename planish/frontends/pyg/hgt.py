"""HGTConv (Hu et al. 2020, arXiv:2003.01332) as a relational program."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from planish.frontends.pyg.call import LayerCall, check_plain, edges, features
from planish.ir.errors import InputError, did_you_mean
from planish.ir.relational.builder import Builder, dst, src
from planish.ir.relational.domains import EDGE, EDGE_TYPE, NODE, NODE_TYPE, node_of
from planish.ir.relational.inter import Operand, Program


def hgt(module: Any, x_dict: Mapping[str, Tensor], edge_index_dict: Mapping[Any, Tensor]) -> LayerCall:
    """Reads a call of an HGTConv: any node and edge types, heads, features of one width or of one by node type.

    Edge types are numbered as in the layer's metadata, whatever the order of `edge_index_dict`; those that are not in
    it have no edges.
    """
    name = check_plain(module)
    kinds = list(module.kqv_lin.lins)
    for what, given, known in (("x_dict", x_dict, kinds), ("edge_index_dict", edge_index_dict, module.edge_types)):
        if not isinstance(given, Mapping):
            raise InputError(f"{name}: {what} is a {type(given).__name__}; give a dict by type.")
        extra = [key for key in given if key not in known]
        if extra:
            hint = did_you_mean(str(extra[0]), [str(key) for key in known])
            raise InputError(f"{name}: {what} has type {extra[0]!r}, which the layer's metadata has not.{hint}")
    missing = [kind for kind in kinds if kind not in x_dict]
    if missing:
        raise InputError(f"{name}: x_dict has no features of node type {missing[0]!r}; give (0, features) for none.")
    widths = {kind: lin.weight.shape[1] for kind, lin in module.kqv_lin.lins.items()}
    for kind in kinds:
        features(name, f"x_dict[{kind!r}]", x_dict[kind], widths[kind])
    counts = [x_dict[kind].shape[0] for kind in kinds]
    index, types = _edges(module, name, kinds, counts, edge_index_dict)
    out, one_width = module.out_channels, len(set(widths.values())) == 1
    skips = one_width and out in widths.values()
    program = hgt_program(widths[kinds[0]] if one_width else 0, out, module.heads, len(kinds), skips)
    inputs = {
        f"x_{k}": x_dict[kind] if one_width else module.kqv_lin.lins[kind](x_dict[kind]) for k, kind in enumerate(kinds)
    }
    number = {kind: k for k, kind in enumerate(kinds)}
    return LayerCall(
        program,
        index,
        types,
        tuple(counts),
        len(module.edge_types),
        inputs,
        _weights(module, kinds, one_width, skips),
        lambda outputs: _by_kind(module, outputs[0], kinds, counts, x_dict, skips),
        tuple((number[a], number[b]) for a, _, b in module.edge_types),
    )


#: What the edges of the last call of a layer were joined to, and the tensors, with their versions, that it came from.
_LAST: weakref.WeakKeyDictionary[Any, tuple[Any, tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


def _edges(
    module: Any, name: str, kinds: Sequence[str], counts: Sequence[Any], given: Mapping[Any, Tensor]
) -> tuple[Tensor, Tensor]:
    """`_joined`, or what it gave at the last call if nothing has changed."""
    if any(type(tensor) is not Tensor for tensor in given.values()):  # tracing, among others
        return _joined(module, name, kinds, counts, given)
    last = _LAST.get(module)
    if last is not None:
        old_counts, refs = last[0]
        now = given.items()
        if (
            old_counts == counts
            and len(refs) == len(given)
            and all(
                triple == key and ref() is tensor and version == tensor._version
                for (triple, ref, version), (key, tensor) in zip(refs, now, strict=True)
            )
        ):
            return last[1]
    joined = _joined(module, name, kinds, counts, given)
    refs = [(triple, weakref.ref(tensor), tensor._version) for triple, tensor in given.items()]
    _LAST[module] = ((list(counts), refs), joined)
    return joined


def _joined(
    module: Any, name: str, kinds: Sequence[str], counts: Sequence[Any], given: Mapping[Any, Tensor]
) -> tuple[Tensor, Tensor]:
    """All edges among all nodes, and their types."""
    offsets, total = {}, 0
    for kind, count in zip(kinds, counts, strict=True):
        offsets[kind] = total
        total = total + count
    parts, types = [], []
    for number, triple in enumerate(module.edge_types):
        if triple not in given:
            continue
        index, _ = edges(module, f"{name}, edges {triple}", given[triple])
        source, _, destination = triple if module.flow == "source_to_target" else triple[::-1]
        parts.append(torch.stack([index[0] + offsets[source], index[1] + offsets[destination]]))
        types.append(torch.full_like(index[0], number))
    if not parts:
        return torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return torch.cat(parts, 1), torch.cat(types)


def _weights(module: Any, kinds: Sequence[str], one_width: bool, skips: bool) -> dict[str, Tensor]:
    heads, types, width = module.heads, len(module.edge_types), module.out_channels // module.heads

    def by_type(weight: Tensor) -> Tensor:
        return weight.view(heads, types, width, width).transpose(0, 1)

    prior = torch.cat([module.p_rel["__".join(triple)] for triple in module.edge_types])
    weights = {
        "k_rel": by_type(module.k_rel.weight),
        "v_rel": by_type(module.v_rel.weight),
        "prior": prior / math.sqrt(width),
        "out": torch.stack([module.out_lin.lins[kind].weight.t() for kind in kinds]),
        "out_bias": torch.stack([module.out_lin.lins[kind].bias for kind in kinds]),
    }
    if one_width:
        weights["kqv"] = torch.stack([module.kqv_lin.lins[kind].weight.t() for kind in kinds])
        weights["kqv_bias"] = torch.stack([module.kqv_lin.lins[kind].bias for kind in kinds])
    if skips:
        weights["skip"] = torch.cat([module.skip[kind] for kind in kinds])
    return weights


def _by_kind(
    module: Any, y: Tensor, kinds: Sequence[str], counts: Sequence[Any], x_dict: Mapping[str, Tensor], skipped: bool
) -> dict[str, Tensor]:
    """What forward returns: results of the node types that are a destination of some edge type."""
    results, start = {}, 0
    for kind, count in zip(kinds, counts, strict=True):
        part, x = y[start : start + count], x_dict[kind]
        start = start + count
        if kind not in module.dst_node_types:
            continue
        if not skipped and x.shape[1] == part.shape[1]:
            gate = module.skip[kind].sigmoid()
            part = gate * part + (1 - gate) * x
        results[kind] = part
    return results


@lru_cache(maxsize=256)
def hgt_program(width: int, out: int, heads: int, kinds: int, skips: bool) -> Program:
    """The program.

    Args:
        width: features of every node; 0: the inputs are keys, queries and values already, (3 · out) for each node.
        out: features of results.
        heads, kinds: attention heads; node types.
        skips: whether results are mixed with the input by a gate; out is width then.
    """
    b = Builder("HGT")
    parts = [b.input(f"x_{k}", node_of(k), width or 3 * out) for k in range(kinds)]
    x = b.emit("join", *parts, name="x")
    kqv = _typed(b, x, "kqv", width, 3 * out) if width else x
    size = out // heads

    def part(number: int, name: str) -> Operand:
        cut = b.emit("slice", kqv, axis=0, start=number * out, stop=(number + 1) * out)
        return b.emit("reshape", cut, shape=(heads, size), name=name)

    k, q, v = part(0, "k"), part(1, "q"), part(2, "v")
    k_rel, v_rel = (b.weight(name, EDGE_TYPE, heads, size, size) for name in ("k_rel", "v_rel"))
    key = b.emit("linear", src(k), k_rel, over=EDGE, name="key")
    logits = b.emit("mul", b.emit("dot", dst(q), key, over=EDGE), b.weight("prior", EDGE_TYPE, heads), over=EDGE)
    alpha = b.emit("reshape", b.emit("edge_softmax", logits, by="dst", name="alpha"), shape=(heads, 1))
    value = b.emit("linear", src(v), v_rel, over=EDGE, name="value")
    message = b.emit("mul", value, alpha, over=EDGE, name="message")
    y = b.emit("reshape", b.emit("sum", message, over=EDGE, domain=NODE, by="dst"), shape=(out,))
    y = _typed(b, _gelu(b, y), "out", out, out)
    if skips:
        gate = b.emit("sigmoid", b.weight("skip", NODE_TYPE))
        kept = b.emit("mul", x, b.emit("sub", b.constant(1.0), gate, over=NODE_TYPE), over=NODE)
        y = b.emit("add", b.emit("mul", y, gate, over=NODE), kept)
    return b.build(y)


def _typed(b: Builder, x: Operand, name: str, width: int, out: int) -> Operand:
    y = b.emit("linear", x, b.weight(name, NODE_TYPE, width, out), over=NODE)
    return b.emit("add", y, b.weight(f"{name}_bias", NODE_TYPE, out), over=NODE)


def _gelu(b: Builder, x: Operand) -> Operand:
    """0.5 x (1 + erf(x / sqrt 2))."""
    inner = b.emit("erf", b.emit("mul", x, b.constant(math.sqrt(0.5)), over=NODE))
    half = b.emit("mul", x, b.constant(0.5), over=NODE)
    return b.emit("mul", half, b.emit("add", inner, b.constant(1.0), over=NODE))
