"""The attentions of a program, each in all of its entries, and how much each of their heads adds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.analyses.layers import LayerStack
from planish.ir.graphs import constant_tensor, is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import Decline
from planish.passes.layers.head_edits import require_sizes, require_untied
from planish.passes.layers.head_flow import OPERATORS, HeadFlow
from planish.passes.layers.importance import PADDING, observe, padding_inputs, tokens
from planish.passes.layers.units import Unit, require_one, stacks_of, units_of

Run = Callable[[Program, str], list[dict[str, Any]]]
_HEADS = "planish_heads_{}"


@dataclass
class Site:
    """The self-attention of one layer.

    Attributes:
        index: position of the layer in its stack.
        name: of the layer.
        flows, units: by entry: where its heads run, and the branch of the layer as a whole.
    """

    index: int
    name: str
    flows: dict[str, HeadFlow] = field(default_factory=dict)
    units: dict[str, tuple[LayerStack, Unit]] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self._count("q")

    @property
    def group(self) -> int:
        """Query heads that read one head of keys and values."""
        return self._count("q") // self._count("kv")

    def _count(self, role: str) -> int:
        return next(iter(self.flows.values())).counts[role]


@dataclass
class StackSites:
    """Sites of one stack in order; `layers` is how many layers it has, `attended` which have an attention."""

    name: str
    layers: int
    attended: frozenset[int]
    sites: list[Site]


def find_sites(program: Program, stack: str | None, single: bool, name: str) -> tuple[list[StackSites], list[Declined]]:
    """The attentions whose heads can be told apart in every entry, by stack; what else there is, with the reason.

    Args:
        single: layers were named, so that there must be one stack only.
        name: of the pass.

    Raises:
        InputError: there is no such stack, or several where one is meant.
    """
    declined: list[Declined] = []
    by_entry: dict[str, dict[str, LayerStack]] = {}
    for entry, model in program.entries.items():
        stacks, reasons = stacks_of(model, stack)
        if not stacks:
            declined += [Declined(name, entry, f"no repeated layers: {reason}") for reason in reasons]
        if single:
            require_one(stacks)
        by_entry[entry] = {s.name: s for s in stacks}
    first, found = next(iter(by_entry.values())), []
    for known in first:
        same = {entry: stacks.get(known) for entry, stacks in by_entry.items()}
        lengths = {entry: len(s) if s is not None else 0 for entry, s in same.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{n} in '{entry}'" for entry, n in lengths.items())
            declined.append(Declined(name, known, f"entries share their weights, and differ in layers: {listed}"))
            continue
        sites, why = _sites(program, {entry: s for entry, s in same.items() if s is not None})
        declined += [Declined(name, layer, reason) for layer, reason in why.items()]
        attended = frozenset(unit.index for unit in units_of(first[known], "attention"))
        found.append(StackSites(known, len(first[known]), attended, sites))
    return found, declined


def _sites(program: Program, stacks: dict[str, LayerStack]) -> tuple[list[Site], dict[str, str]]:
    sites, declined = [], dict[str, str]()
    units = {entry: {unit.index: unit for unit in units_of(s, "attention")} for entry, s in stacks.items()}
    for index in sorted(set[int]().union(*units.values())):
        site = Site(index, next(by[index].layer.name for by in units.values() if index in by))
        where = ""
        try:
            for entry, stack in stacks.items():
                where = f"{entry}: " if len(stacks) > 1 else ""
                if stack.tied:
                    raise Decline(f"the layers of '{stack.name}' share their weights; one is the others run again")
                site.flows[entry] = _flow(program.entry(entry).graph, units[entry].get(index))
                site.units[entry] = stack, units[entry][index]
            where = ""
            if len({tuple(flow.counts.values()) for flow in site.flows.values()}) > 1:
                raise Decline("entries differ in the number of heads")
            require_untied(program, list(site.flows.values()))
        except Decline as decline:
            declined[site.name] = where + decline.reason
        else:
            sites.append(site)
    return sites, declined


def _flow(graph: ir.Graph, unit: Unit | None) -> HeadFlow:
    if unit is None or unit.part is None:
        raise Decline("it has no attention here")
    caches = {*unit.layer.cache_inputs, *unit.layer.cache_outputs}
    flow = HeadFlow(graph, attention_of(unit.part.nodes), caches).trace()
    require_sizes(flow)
    return flow


def importances(program: Program, entry: str, sites: Sequence[Site], run: Run) -> dict[int, np.ndarray]:
    """How much each query head adds, on the calibration inputs of an entry.

    A head adds its part of what the output projection reads, times the rows of the projection for that part: the norm
    of this, summed over all positions that are no padding.

    Returns:
        Index of the layer → one number a query head, float64.
    """
    trial = Program({entry: program.entry(entry).clone()}, program.target, dict(program.provenance))
    graph = trial.entry(entry).graph
    values = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    for site in sites:
        read = site.flows[entry].projections[0].node.inputs[0]
        assert read is not None
        observe(graph, values[read.name], _HEADS.format(site.index))
    for name in padding_inputs(graph, entry):
        observe(graph, values[name], PADDING.format(name))
    batches = run(trial, entry)
    return {site.index: sum(_added(site, entry, batch) for batch in batches) for site in sites}  # type: ignore[misc]


def _added(site: Site, entry: str, batch: dict[str, Any]) -> np.ndarray:
    """Sums of the norms over the positions of one batch, by head."""
    cut = site.flows[entry].projections[0]
    tensor = constant_tensor(cut.node.inputs[1])
    assert tensor is not None
    weight = np.asarray(tensor.numpy(), np.float64)
    rows = (weight if cut.layout.axis == -2 else weight.T).reshape(site.heads, cut.layout.depth, -1)
    read = np.asarray(batch[_HEADS.format(site.index)], np.float64)
    parts = read.reshape(*read.shape[:-1], site.heads, cut.layout.depth)
    # |x W|² = x (W Wᵀ) xᵀ: no product as wide as the hidden state for each head.
    squares = np.einsum("...hd,hde,...he->...h", parts, rows @ rows.transpose(0, 2, 1), parts)
    norms = np.sqrt(np.maximum(squares, 0.0))
    total: np.ndarray = norms[tokens(batch, norms.shape[:-1])].reshape(-1, site.heads).sum(0)
    return total


def attention_of(nodes: Collection[ir.Node]) -> ir.Node:
    """The one attention operator among the nodes of a part.

    Raises:
        Decline: there is none, or there are several.
    """
    found = [node for node in nodes if (node.domain, node.op_type) in OPERATORS]
    if len(found) == 1:
        return found[0]
    if found:
        raise Decline(f"it has {len(found)} attention operators")
    if any(is_op(node, "If") for node in nodes):
        raise Decline("its attention is inside of an If; prune-heads comes before the lowerings")
    raise Decline("its attention is not one operator; run fuse-attention first")
