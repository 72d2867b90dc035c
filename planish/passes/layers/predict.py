"""What leaving layers out should gain, by the cost model: where the search by measurement starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from planish.ir.analyses.cost import cost
from planish.ir.analyses.stream import Flow
from planish.ir.graphs import is_op, subgraphs_of
from planish.ir.ops import OpCost
from planish.ir.program import Program
from planish.passes.layers.units import Unit, units_of

if TYPE_CHECKING:
    from planish.passes.layers.skip_layers import SkipLayers

#: Operations that one core does while it moves a byte to or from memory (roofline: Williams et al. 2009). Of order
#: ten on today's CPUs; it only decides whether a node counts by its operations or by its bytes.
FLOPS_PER_BYTE = 8.0


def shares_gone(p: SkipLayers, program: Program, ratios: Sequence[float]) -> list[float]:
    """For each nominal ratio the share of a run's time, from 0 to 1, that leaving layers out should save.

    A node takes max(operations / `FLOPS_PER_BYTE`, bytes), at the sizes of the calibration inputs; what no input
    changes, such as the transpose of a tied head, is computed once and takes none. Embeddings and the head of the model
    stay. All layers of a stack count alike. Of several entries the one that gains most counts, as when measured.
    """
    found = [0.0] * len(ratios)
    for entry in p.entry_names(program):
        model = program.entry(entry)
        costs = dict(cost(model, dims=program.sizes()).nodes)
        flow = Flow(model.graph)
        for node in flow.nodes:
            if flow.constant.issuperset(node.outputs):
                costs.pop(node.name or "", None)
        whole = sum(_time(node, costs) for node in flow.nodes)
        stacks = [units_of(stack, p.part) for stack in p.stacks(model)[0]]
        for k, ratio in enumerate(ratios):
            gone = sum(_gone(units, costs) * p.removed_share(len(units), ratio) for units in stacks)
            found[k] = max(found[k], gone / whole if whole else 0.0)
    return found


def _gone(units: Sequence[Unit], costs: Mapping[str, OpCost]) -> float:
    return sum(_time(node, costs) for unit in units for node in (unit.part or unit.layer).nodes)


def _time(node: ir.Node, costs: Mapping[str, OpCost]) -> float:
    """A node with its bodies, in bytes; of an If the branch that takes longer."""
    own = costs.get(node.name or "", OpCost(0, 0))
    bodies = [sum(_time(inner, costs) for inner in body) for body in subgraphs_of(node)]
    inside = max(bodies, default=0.0) if is_op(node, "If") else sum(bodies)
    return max(own.flops / FLOPS_PER_BYTE, own.bytes) + inside
