"""The attentions of a program that a pattern can be put on: what they attend to, and why others can not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from planish.ir.block_sparsity import Heads
from planish.ir.causal_lm import LENGTHS, cache_layer
from planish.ir.graphs import is_op
from planish.ir.program import Program
from planish.passes.base import Decline
from planish.passes.fusion.mask_allows import mask_allows
from planish.passes.fusion.sizes import Term, sizes
from planish.passes.lowering.mask_parts import MaskParts, mask_parts

GROUP_QUERY, MICROSOFT = "GroupQueryAttention", "com.microsoft"


@dataclass
class Site:
    """One attention in one entry.

    Attributes:
        entry, index: where; attentions of an entry are counted from 0 in order of execution.
        node: Attention, or GroupQueryAttention over a cache.
        heads: of queries, and of keys and values.
        scale: of the scores.
        causal: whether queries see no later key.
        length: queries and keys of a prompt; None where there is a past.
        parts: what its mask says besides, of a prompt.
        size: numbers of one head.
    """

    entry: str
    index: int
    node: ir.Node
    heads: Heads
    scale: float
    size: int
    causal: bool = True
    length: Term | None = None
    parts: MaskParts = field(default_factory=MaskParts)

    @property
    def past(self) -> bool:
        """Whether it attends to a cache and what is new after it."""
        return self.length is None

    @property
    def separate(self) -> bool:
        """Whether GroupQueryAttention writes into the cache, each row with its own length."""
        return self.node.op_type == GROUP_QUERY

    def operand(self, index: int) -> ir.Value:
        """An input that is there."""
        value = self.node.inputs[index]
        assert value is not None
        return value


def attentions(graph: ir.Graph) -> Iterator[ir.Node]:
    """All attentions of a graph, but those inside of branches."""
    for node in graph:
        if is_op(node, "Attention") or (node.domain == MICROSOFT and node.op_type == GROUP_QUERY):
            yield node


def find_sites(program: Program, entries: list[str]) -> tuple[dict[int, list[Site]], dict[int, tuple[ir.Node, str]]]:
    """Sites by index, those of all entries together; and the indices where some entry declines, with the reason."""
    sites: dict[int, list[Site]] = {}
    declined: dict[int, tuple[ir.Node, str]] = {}
    for entry in entries:
        for index, node in enumerate(attentions(program.entry(entry).graph)):
            try:
                sites.setdefault(index, []).append(_site(entry, index, node))
            except Decline as decline:
                where = f"{entry}: " if len(program.entries) > 1 else ""
                declined.setdefault(index, (node, where + decline.reason))
    for index in declined:
        sites.pop(index, None)
    for index, found in list(sites.items()):
        if len(found) < len(entries) or len({site.heads for site in found}) > 1:
            node = found[0].node
            declined[index] = node, f"attention {index} is not the same in {', '.join(entries)}"
            del sites[index]
    return sites, declined


def _site(entry: str, index: int, node: ir.Node) -> Site:
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in node.inputs[:3]):
        raise Decline("it is not float32")
    if node.attributes.get_float("softcap", 0.0):
        raise Decline("its scores are capped")
    if node.op_type == GROUP_QUERY:
        return _grouped(entry, index, node)
    if len(node.outputs) > 3:
        raise Decline("it gives its scores")
    heads, size = _heads(node)
    scale = node.attributes.get_float("scale", 1 / math.sqrt(size))
    if any(value is not None for value in node.inputs[4:]):
        if any(value is not None for value in node.inputs[6:]) or _is_causal(node):
            raise Decline("it counts positions in a way of its own")
        _check_past(node)
        return Site(entry, index, node, heads, scale, size)
    if len(node.outputs) > 1:
        raise Decline("it gives a cache and reads none")
    length, parts = _prompt(node)
    return Site(entry, index, node, heads, scale, size, parts.causal or _is_causal(node), length, parts)


def _is_causal(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("is_causal", 0))


def _check_past(node: ir.Node) -> None:
    """A pattern hides later keys, so that queries over a cache must not see any of them as it is."""
    dims, mask = sizes(node.inputs[0]), node.inputs[3]
    assert dims is not None
    if dims[-2 if len(dims) == 4 else 1] != 1 and (mask is None or mask_allows(mask) is None):
        raise Decline("it reads several tokens over its cache, and nothing says that none sees a later one")


def _heads(node: ir.Node) -> tuple[Heads, int]:
    dims: list[Any] = [sizes(value) for value in node.inputs[:3]]
    if any(d is None or len(d) != len(dims[0]) or len(d) not in (3, 4) for d in dims):
        raise Decline("the rank of queries, keys or values is unknown")
    if len(dims[0]) == 4:
        counts, widths = [d[1] for d in dims], [d[3] for d in dims]
    else:
        named = [node.attributes.get_int(f"{role}_num_heads", 0) for role in ("q", "kv", "kv")]
        counts = named
        widths = [d[2] // n if isinstance(d[2], int) and n else None for d, n in zip(dims, named, strict=True)]
    if not all(isinstance(n, int) and n > 0 for n in (*counts, *widths)):
        raise Decline("the number or the size of its heads is unknown")
    if len(set(widths)) > 1 or counts[1] != counts[2]:
        raise Decline("its heads of keys and of values differ")
    return Heads(counts[0], counts[1]), widths[0]


def _prompt(node: ir.Node) -> tuple[Term, MaskParts]:
    q, k = (sizes(value) for value in node.inputs[:2])
    assert q is not None and k is not None
    axis = len(q) - 2
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if q[axis] != k[axis]:
        raise Decline("its queries and keys are not known to be as many: it attends to another sequence")
    if mask is None:
        return q[axis], MaskParts()
    if _is_causal(node):
        raise Decline("it is causal and has a mask too")
    return q[axis], mask_parts(mask, q[axis], k[axis])


def _grouped(entry: str, index: int, node: ir.Node) -> Site:
    if any(value is None for value in node.inputs[:7]) or any(value is not None for value in node.inputs[7:]):
        raise Decline("it has a bias, or applies positions to its keys itself")
    heads = Heads(*(node.attributes.get_int(n, 0) for n in ("num_heads", "kv_num_heads")))
    dims = sizes(node.inputs[3])
    if dims is None or len(dims) != 4 or not isinstance(dims[3], int):
        raise Decline("the sizes of its cache are unknown")
    if (sizes(node.inputs[0]) or (0, 0))[1] != 1:
        raise Decline("it reads more than one token at a time over its cache")
    if node.attributes.get_int("local_window_size", -1) >= 0:
        raise Decline("it has a window already")
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(dims[3])
    return Site(entry, index, node, heads, scale, dims[3])


def caches_of(site: Site) -> list[ir.Value]:
    """The graph inputs that hold a step's cache, of keys and of values.

    Raises:
        Decline: they are no inputs named as those of task "causal-lm", or something else reads them.
    """
    found = [site.operand(3), site.operand(4)]
    if not all(v.is_graph_input() and cache_layer(v.name or "") is not None for v in found):
        raise Decline("its caches are no inputs of decode as task='causal-lm' has them")
    if any(len(v.uses()) != 1 for v in found) or not all(v.is_graph_output() for v in site.node.outputs[1:3]):
        raise Decline("something else reads its caches")
    return found


def lengths_of(graph: ir.Graph) -> ir.Value | None:
    """The input with the tokens of each row, where there is one."""
    return next((v for v in graph.inputs if v.name == LENGTHS), None)
