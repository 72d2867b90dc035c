"""tile-all-reduce: sums over ranks in chunks of the sequence, each while the next one is computed (FastAttention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.ir.errors import InputError
from planish.ir.graphs import constant_tensor, dims_of, is_op
from planish.ir.parallel import is_all_reduce
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.parallel.chunks import Bounds, Chunker, resized
from planish.passes.registry import register

#: What works on each position by itself, given operands that are the same for all.
_BY_ROW = {"Add", "Sub", "Mul", "Div", "Gelu", "Erf", "Tanh", "Relu", "Sigmoid", "LeakyRelu", "Elu", "HardSwish", "Pow"}
_BY_ROW |= {"Sqrt", "Exp", "Neg", "Cast", "Identity", "SwiGLU", "QuickGelu", "FastGelu", "BiasGelu", "MatMul"}
_ROWS = -2


@dataclass(frozen=True)
class _Site:
    """What is in front of one AllReduce.

    Attributes:
        nodes: that are copied for each chunk, in order; the last is the product.
        attention: the first of them where that is one.
        reads: values of which a chunk reads its rows.
    """

    reduce: ir.Node
    nodes: tuple[ir.Node, ...]
    attention: ir.Node | None
    reads: frozenset[ir.Value]


@register
@dataclass(frozen=True)
class TileAllReduce(ExactPass):
    """Splits AllReduce(MatMul(attention)) along the sequence, so that communication overlaps with computing.

    The nodes of chunk i and its AllReduce come before those of chunk i + 1: a runtime that sums on a second stream
    takes the longer of both times, plus the first computation and the last sum, in place of both. Causal attention
    computes a chunk with the keys before it as its past, so that nothing is computed twice. Feed-forward networks are
    split alike.

    Options:
        chunks: how many, at most.
        least: rows that a chunk has at least: what shorter ones lose to launches and unfilled multiprocessors is more
            than they hide. Where the length is symbolic it is that of the calibration inputs, and any length remains
            right.
        feed_forward: sums behind feed-forward networks too.
    """

    name: ClassVar[str] = "tile-all-reduce"

    chunks: int = 2
    least: int = 4096
    feed_forward: bool = True

    def __post_init__(self) -> None:
        for option, low in (("chunks", 2), ("least", 1)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InputError(f"{option} is {value!r}; it is a number from {low} on.")

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        editor = Editor(program, self.name)
        sizes = program.sizes()
        for model in program.entries.values():
            reduces = [node for node in model.graph if is_all_reduce(node)]
            makers: dict[int, Chunker] = {}
            for node in reduces:
                try:
                    if any(v is not None and is_op(u, "Concat") for v in node.outputs for u, _ in v.uses()):
                        continue  # a chunk already
                    site = _site(node)
                    count = self._count(site, sizes)
                    if site.attention is None and not self.feed_forward:
                        raise Decline("it sums a feed-forward network, and feed_forward is off")
                    maker = makers.setdefault(count, Chunker(editor, model.graph, count, node))
                    _tile(maker, site)
                    editor.fired += 1
                except Decline as decline:
                    editor.decline(node, decline.reason)
        return editor.result()

    def _count(self, site: _Site, sizes: dict[str, int]) -> int:
        """How many chunks a site is worth.

        Raises:
            Decline: less than two.
        """
        dims = dims_of(site.reduce.inputs[0])
        length = dims[_ROWS] if dims is not None else None
        if isinstance(length, str):
            known = sizes.get(length)
            if known is None:
                raise Decline(f"the length '{length}' is not known: no calibration inputs say it")
            length = known
        if length == 1:
            raise Decline("it sums one token: there is nothing to split")
        if not isinstance(length, int):
            raise Decline("the length of the sequence is not known")
        count = min(self.chunks, length // self.least)
        if count < 2:
            raise Decline(f"its sequence has {length} rows, and two chunks of at least {self.least} take more")
        return count


def _site(reduce: ir.Node) -> _Site:
    """What a sum is made of.

    Raises:
        Decline: it can not be computed in chunks.
    """
    value = reduce.inputs[0]
    dims = dims_of(value)
    product = value.producer() if value is not None else None
    if value is None or not is_op(product, "MatMul") or product is None or constant_tensor(product.inputs[1]) is None:
        raise Decline("what it sums is no product with a weight")
    if dims is None or len(dims) != 3:
        raise Decline("what it sums is not of the form (batch, sequence, width)")
    length, batch = dims[1], dims[0]
    nodes: dict[ir.Node, None] = {}
    reads: set[ir.Value] = set()
    attention = None
    pending = [product]
    while pending:
        node = pending.pop()
        nodes[node] = None
        if is_op(node, "Attention"):
            attention = node
            continue
        for operand in node.inputs:
            if operand is None or constant_tensor(operand) is not None or _same_for_all(operand):
                continue
            above = operand.producer()
            if (dims_of(operand) or ())[:2] != (batch, length):
                raise Decline(f"'{operand.name}' is not seen to hold the sequence")
            if above is not None and _may_copy(above, set(nodes), operand):
                pending.append(above)
            elif is_op(above, "Attention"):
                raise Decline(f"the result of attention '{above.name if above else ''}' is read elsewhere too")
            else:
                reads.add(operand)
    if attention is not None:
        _check(attention)
        reads.add(attention.inputs[0])  # type: ignore[arg-type]
    graph = reduce.graph
    assert graph is not None
    return _Site(reduce, tuple(n for n in graph if n in nodes), attention, frozenset(reads))


def _may_copy(node: ir.Node, inside: set[ir.Node], value: ir.Value) -> bool:
    """Whether a node is computed for the chunks and for nobody else, row by row."""
    if value.is_graph_output() or any(user not in inside for user, _ in value.uses()):
        return False
    if is_op(node, "Attention"):
        return True
    if node.op_type not in _BY_ROW or len(node.outputs) != 1 or node.domain not in ("", "planish", "com.microsoft"):
        return False
    return node.op_type != "MatMul" or constant_tensor(node.inputs[1]) is not None


def _same_for_all(value: ir.Value) -> bool:
    """Whether a value is the same for all positions."""
    dims = dims_of(value)
    return dims is not None and (len(dims) < 2 or dims[_ROWS] == 1)


def _check(node: ir.Node) -> None:
    """Raises Decline: an attention whose queries can not be parted."""
    inputs = [*node.inputs, *[None] * 6]
    if inputs[4] is not None or inputs[5] is not None or len(node.inputs) > 6:
        raise Decline("its attention reads a cache of past keys")
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Decline("its attention gives caches or scores too")
    if any(len(dims_of(v) or ()) != 3 for v in inputs[:3]):
        raise Decline("its attention does not take (batch, sequence, width); run merge-attention-heads first")
    mask = inputs[3]
    if mask is not None and dims_of(mask) is None:
        raise Decline(f"the shape of the mask '{mask.name}' is not known")


def _tile(maker: Chunker, site: _Site) -> None:
    reduce, total = site.reduce, site.reduce.outputs[0]
    assert reduce.inputs[0] is not None
    first = min(site.reads, key=lambda v: v.name or "") if site.attention is None else site.attention.inputs[0]
    assert first is not None
    bounds = maker.bounds(first, 1)
    past = _past(maker, site) if site.attention is not None and _causal(site.attention) else None
    parts = [_chunk(maker, site, bounds, index, past) for index in range(maker.chunks)]
    maker.editor.replace(total, maker.joined(reduce, parts, 1, total, bounds))
    for node in (reduce, *reversed(site.nodes)):
        maker.editor.remove(node)


def _chunk(maker: Chunker, site: _Site, bounds: Bounds, index: int, past: tuple[ir.Value, ...] | None) -> ir.Value:
    """The nodes of one chunk, with its sum behind them."""
    at, size = site.reduce, bounds.sizes[index]
    where = bounds.begins[index], bounds.ends[index], size
    reads = sorted(site.reads, key=lambda v: v.name or "")
    now: dict[ir.Value, ir.Value] = {v: maker.cut(at, v, 1, *where) for v in reads}
    for node in (*site.nodes, site.reduce):
        inputs = [now.get(v, v) if v is not None else None for v in node.inputs]
        if node is site.attention:
            inputs = _attention_inputs(maker, site, inputs, bounds, index, past)
        copy = ir.node(
            node.op_type,
            inputs,
            dict(node.attributes),
            domain=node.domain,
            name=maker.editor.names.fresh(f"{node.name}_chunk"),
            version=node.version,
            # ONNX Runtime's Attention takes no past without giving it back.
            num_outputs=3 if len(inputs) > 4 and node is site.attention else 1,
        )
        for value in copy.outputs[1:]:
            value.name, value.type = maker.editor.names.fresh("unused_present"), node.outputs[0].type
        made, old = copy.outputs[0], node.outputs[0]
        made.name = maker.editor.names.fresh(f"{old.name}_chunk")
        made.type, made.shape = old.type, resized(old, 1, size)
        assert at.graph is not None
        at.graph.insert_before(at, copy)
        maker.editor.mark(copy, [node])
        now[old] = made
    return now[site.reduce.outputs[0]]


def _causal(node: ir.Node) -> bool:
    return node.attributes.get_int("is_causal", 0) == 1


def _attention_inputs(
    maker: Chunker,
    site: _Site,
    inputs: list[ir.Value | None],
    bounds: Bounds,
    index: int,
    past: tuple[ir.Value, ...] | None,
) -> list[ir.Value | None]:
    """Operands of the attention of one chunk: its queries, the keys that they may see, their rows of the mask."""
    at, begin, end, size = site.reduce, bounds.begins[index], bounds.ends[index], bounds.sizes[index]
    mask = inputs[3] if len(inputs) > 3 else None
    if mask is not None and len(dims_of(mask) or ()) > 1 and (dims_of(mask) or ())[-2] != 1:
        mask = maker.cut(at, mask, -2, begin, end, size)
    if past is None:
        return [*inputs[:3], mask] if mask is not None else inputs[:3]
    # Keys before the chunk are its past: is_causal counts positions from there.
    keys = [maker.cut(at, v, 1, begin, end, size) for v in inputs[1:3] if v is not None]
    if mask is not None and (dims_of(mask) or ())[-1] != 1:
        mask = maker.cut(at, mask, -1, maker.number(0), end, None)
    if index == 0:
        return [inputs[0], *keys, mask] if mask is not None else [inputs[0], *keys]
    before = [maker.cut(at, v, 2, maker.number(0), begin, None) for v in past]
    return [inputs[0], *keys, mask, *before]


def _past(maker: Chunker, site: _Site) -> tuple[ir.Value, ...]:
    """Keys and values as (batch, heads, sequence, size), the form of a past."""
    node = site.attention
    assert node is not None
    heads = node.attributes.get_int("kv_num_heads", 0)
    found = []
    for value in node.inputs[1:3]:
        dims = dims_of(value)
        assert value is not None and dims is not None and isinstance(dims[-1], int)
        sizes = maker.number(0, 0, heads, dims[-1] // heads)
        apart = maker.editor.node(site.reduce, "Reshape", [value, sizes])
        apart.type, apart.shape = value.type, ir.Shape([*dims[:2], heads, dims[-1] // heads])
        turned = maker.editor.node(site.reduce, "Transpose", [apart], {"perm": [0, 2, 1, 3]})
        turned.type, turned.shape = value.type, ir.Shape([dims[0], heads, dims[1], dims[-1] // heads])
        found.append(turned)
    return tuple(found)
