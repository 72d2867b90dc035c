"""Cost: floating point operations and bytes moved, by node, by operator and in total, at given sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.analyses.flops import MOVES, VIEWS, Unknown, node_flops
from planish.ir.analyses.sizes import Sizes
from planish.ir.blocks import op_name
from planish.ir.graphs import is_op, subgraphs_of
from planish.ir.ops import DIALECT, DIALECT_DOMAIN, OpCost, TensorInfo
from planish.ir.program import Program

#: Read a few rows of their first operand, not all of it.
_SPARSE_READS = frozenset(("Gather", "GatherElements", "GatherND", "Slice"))


@dataclass
class Cost:
    """What one run of an entry costs.

    Attributes:
        flops: floating point operations; a multiply and an add are two.
        bytes: bytes read and written if every node reads its operands from memory and writes its results there;
            views (Reshape, Squeeze, …) cost nothing, a Gather reads only what it returns.
        nodes: node name → its cost, in all bodies of control flow. In sums the body of a loop counts once, and of an
            If the branch that costs more.
        by_op: operator → sum over its nodes, most operations first.
        unknown: operator → number of nodes of which only bytes are counted.
        unresolved: values whose size could not be told; they count as 0 bytes.
        dims: symbol → size that was used.
    """

    flops: int = 0
    bytes: int = 0
    nodes: dict[str, OpCost] = field(default_factory=dict)
    by_op: dict[str, OpCost] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    unresolved: list[str] = field(default_factory=list)
    dims: dict[str, int] = field(default_factory=dict)

    @property
    def intensity(self) -> float:
        """Operations for each byte moved."""
        return self.flops / self.bytes if self.bytes else 0.0


def cost(item: Program | ir.Model, *, dims: Mapping[str, int] | None = None, entry: str | None = None) -> Cost:
    """The cost of one entry (by default ``"main"``, or the first one).

    Args:
        dims: sizes of symbolic dimensions; left-out ones as `planish.ir.inputs.synthesize` chooses them.
    """
    model = _inlined(entry_of(item, entry))
    sizes = Sizes(model, dims)
    result = Cost(unresolved=sizes.unresolved, dims=dict(sizes.dims))
    costs: dict[ir.Node, OpCost] = {}
    unknown: set[ir.Node] = set()
    for node in model.graph.all_nodes():
        try:
            flops = _flops(node, sizes)
        except Unknown:
            flops = 0
            unknown.add(node)
        costs[node] = result.nodes[node.name or ""] = OpCost(flops, _bytes(node, sizes))
    for node in _run(model.graph, costs):
        name, own = op_name(node), costs[node]
        if node in unknown:
            result.unknown[name] = result.unknown.get(name, 0) + 1
        result.flops += own.flops
        result.bytes += own.bytes
        known = result.by_op.get(name, OpCost(0, 0))
        result.by_op[name] = OpCost(known.flops + own.flops, known.bytes + own.bytes)
    result.by_op = dict(sorted(result.by_op.items(), key=lambda pair: (-pair[1].flops, -pair[1].bytes, pair[0])))
    return result


def _run(graph: ir.Graph, costs: Mapping[ir.Node, OpCost]) -> list[ir.Node]:
    """The nodes that run: of an If those of the branch that costs more, of a loop those of the body, once."""
    found: list[ir.Node] = []
    for node in graph:
        found.append(node)
        bodies = [_run(body, costs) for body in subgraphs_of(node)]
        if is_op(node, "If") and bodies:
            sums = [(sum(costs[n].flops for n in body), sum(costs[n].bytes for n in body)) for body in bodies]
            bodies = [bodies[sums.index(max(sums))]]
        for body in bodies:
            found += body
    return found


def entry_of(item: Program | ir.Model, entry: str | None) -> ir.Model:
    """The model that an analysis of a program looks at."""
    if isinstance(item, ir.Model):
        return item
    return item.entry(item.default_entry if entry is None else entry)


def _inlined(model: ir.Model) -> ir.Model:
    """`model`, or a copy with its own functions inlined; dialect nodes stay nodes."""
    own = {key for key in model.functions if key[0] != DIALECT_DOMAIN}
    if not own:
        return model
    from onnx_ir.passes.common import InlinePass

    copy = model.clone()
    for key in [k for k in copy.functions if k not in own]:
        del copy.functions[key]
    InlinePass()(copy)
    return copy


def _flops(node: ir.Node, sizes: Sizes) -> int:
    op = DIALECT.get(node.op_type) if node.domain == DIALECT_DOMAIN else None
    if op is None:
        return node_flops(node, sizes)
    inputs = [sizes.info(v) for v in node.inputs]
    outputs = [sizes.info(v) for v in node.outputs]
    if any(i is None and v is not None for i, v in zip(inputs, node.inputs, strict=True)) or None in outputs:
        raise Unknown(f"planish::{node.op_type}: sizes are not known")
    return op.flops(inputs, [o for o in outputs if o is not None], op.attributes_of(node))


def _bytes(node: ir.Node, sizes: Sizes) -> int:
    if not node.domain and node.op_type in VIEWS:
        return 0
    written = sum(_known(sizes.info(v)) for v in node.outputs if v.name)
    operands = list(dict.fromkeys(v for v in node.inputs if v is not None))
    if not node.domain and node.op_type in _SPARSE_READS:
        return 2 * written + sum(_known(sizes.info(v)) for v in operands[1:])
    if not node.domain and node.op_type in MOVES and not node.inputs:
        return written
    return written + sum(_known(sizes.info(v)) for v in operands)


def _known(info: TensorInfo | None) -> int:
    return 0 if info is None else info.nbytes
