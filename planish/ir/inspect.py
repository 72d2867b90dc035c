"""What is in a program: interface, operators, weights, costs, blocks. Pure data for ``planish inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from planish.ir.blocks import graph_blocks
from planish.ir.errors import UnsupportedError
from planish.ir.input_sizes import require_dims
from planish.ir.printer import op_counts
from planish.ir.program import Program
from planish.ir.provenance import PASS_KEY


@dataclass(frozen=True)
class BlockSummary:
    """A block of the graph: its nodes by operator."""

    name: str
    nodes: int
    ops: dict[str, int]


@dataclass
class Inspection:
    """A program in numbers and names.

    Attributes:
        inputs, outputs: by entry, each as ``name: dtype[shape]``.
        opsets: domain → version.
        ops: operator → number of nodes, most frequent first.
        flops_by_op: operator → floating point operations of a run at `dims`.
        dtypes: element type of weights → bytes.
        dims: sizes that symbolic dimensions were given for the costs.
        flops, bytes_moved, peak_activation_bytes: of one run at `dims`; None where the analysis can not tell.
        functions: model-local functions, as ``domain::name``.
        made_by: nodes by the pass that made them.
        provenance: where the program came from.
        layers: entry → its stacks of repeated layers, and what looked like layers and is not.
    """

    inputs: dict[str, list[str]]
    outputs: dict[str, list[str]]
    opsets: dict[str, int]
    nodes: int
    ops: dict[str, int]
    weights: int
    weight_bytes: int
    dtypes: dict[str, int]
    blocks: list[BlockSummary]
    functions: list[str] = field(default_factory=list)
    made_by: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    flops: float | None = None
    bytes_moved: float | None = None
    peak_activation_bytes: int | None = None
    flops_by_op: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_program(program: Program, dims: Mapping[str, int] | None = None) -> Inspection:
    """Looks a program over.

    Args:
        dims: sizes of symbolic dimensions to compute costs at; the others get the sizes that synthetic inputs have.

    Raises:
        InputError: `dims` names no dimension, or holds a size below 1.
    """
    opsets: dict[str, int] = {}
    for model in program.entries.values():
        opsets |= {domain or "ai.onnx": version for domain, version in model.opset_imports.items()}
    from planish.ir.analyses.layers import find_layers  # networkx takes a moment to import

    dtypes: Counter[str] = Counter()
    weights = program.weights
    for tensor in weights.values():
        dtypes[tensor.dtype.name.lower()] += tensor.nbytes
    made = Counter(origin for node in program.nodes() if (origin := node.metadata_props.get(PASS_KEY)))
    blocks = [
        BlockSummary(block.name, block.count, dict(Counter(node.op for node in block.nodes).most_common()))
        for block in graph_blocks(program, limit=program.node_count())
    ]
    found = Inspection(
        inputs={entry: [str(spec) for spec in program.inputs(entry)] for entry in program.entries},
        outputs={entry: [str(spec) for spec in program.outputs(entry)] for entry in program.entries},
        opsets=opsets,
        nodes=program.node_count(),
        ops=op_counts(program),
        weights=len(weights),
        weight_bytes=program.weight_bytes(),
        dtypes=dict(dtypes.most_common()),
        blocks=blocks,
        functions=sorted({f"{f.domain}::{f.name}" for m in program.entries.values() for f in m.functions.values()}),
        made_by=dict(made.most_common()),
        provenance=dict(program.provenance),
        layers={entry: find_layers(model).to_dict() for entry, model in program.entries.items()},
    )
    _add_costs(found, program, dims)
    return found


def _add_costs(found: Inspection, program: Program, dims: Mapping[str, int] | None) -> None:
    from planish.ir.analyses.cost import cost
    from planish.ir.analyses.liveness import liveness

    require_dims(dims or (), [spec for entry in program.entries for spec in program.inputs(entry)])
    try:
        costs = cost(program, dims=dims)
        live = liveness(program, dims=costs.dims)
    except UnsupportedError as error:  # an input that sizes can not be made up for
        found.notes.append(f"costs are not known: {error}")
        return
    found.dims = dict(costs.dims)
    found.flops, found.bytes_moved = float(costs.flops), float(costs.bytes)
    found.flops_by_op = {op: float(c.flops) for op, c in costs.by_op.items() if c.flops}
    found.peak_activation_bytes = int(live.peak_bytes)
    if costs.unresolved:
        found.notes.append(f"costs leave out {len(costs.unresolved)} values whose size is only known at run time.")
    if costs.unknown:
        listed = ", ".join(sorted(costs.unknown))
        found.notes.append(f"FLOPs leave out operators whose cost is not known: {listed}.")
