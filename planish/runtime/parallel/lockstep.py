"""The reference executor of tensor-parallel programs: all ranks in this process, their sums by NumPy.

A graph is cut at its AllReduces into stages that any ONNX runtime runs. Stage by stage every rank runs, what they give
is added, and goes into the next. It checks numbers; it makes nothing faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.ir.causal_lm import KEPT_HEADS
from planish.ir.errors import InputError
from planish.ir.graphs import subgraphs_of
from planish.ir.ops import import_functions
from planish.ir.parallel import is_all_reduce, rank_of, shard_axis
from planish.ir.program import Program

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Stage:
    """What runs between two rounds of sums.

    Attributes:
        model: of the stage alone; None if it computes nothing.
        inputs, outputs: names of values.
        sums: the value that a rank adds → the name of the sum.
    """

    model: ir.Model | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sums: tuple[tuple[str, str], ...]


def stages(model: ir.Model) -> list[Stage]:
    """Cuts a model at its AllReduces. Sums that do not wait for each other end one stage together.

    Raises:
        InputError: an AllReduce is inside of a branch or a loop.
    """
    graph = model.graph
    depth: dict[ir.Value, int] = {}
    level: dict[ir.Node, int] = {}
    for node in graph:
        if any(map(is_all_reduce, (inner for sub in subgraphs_of(node) for inner in sub.all_nodes()))):
            raise InputError(f"node '{node.name}' has an AllReduce inside of a branch; it must be in the main graph.")
        level[node] = max((depth.get(v, 0) for v in _reads(node)), default=0)
        for value in node.outputs:
            depth[value] = level[node] + is_all_reduce(node)
    last = max(level.values(), default=0)
    return [_stage(model, level, number, last) for number in range(last + 1)]


def _stage(model: ir.Model, level: Mapping[ir.Node, int], number: int, last: int) -> Stage:
    graph = model.graph
    nodes = [n for n in graph if level[n] == number and not is_all_reduce(n)]
    reduces = [n for n in graph if level[n] == number and is_all_reduce(n)]
    made = {v for n in nodes for v in n.outputs}
    later = {v for n in graph if n not in set(nodes) for v in _reads(n)} | set(graph.outputs)
    outputs = [v for n in nodes for v in n.outputs if v in later]
    inputs = dict.fromkeys(v for n in nodes for v in _reads(n) if v not in made and not _is_weight(v))
    sums = tuple((_name(n.inputs[0]), _name(n.outputs[0])) for n in reduces)
    own = _extract(model, list(inputs), outputs) if outputs else None
    return Stage(own, tuple(map(_name, inputs)), tuple(map(_name, outputs)), sums)


def _extract(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    """A model of the nodes between values; weights are shared with `model`."""
    from onnx_ir.convenience import extract

    part = ir.Model(extract(model.graph, inputs, outputs), ir_version=model.ir_version)
    part.graph.opset_imports.update(model.graph.opset_imports)
    part.functions.update(model.functions)
    import_functions(part)
    return part


class LockStep:
    """All ranks of one entry.

    Args:
        programs: by rank, as `tensor_parallel` made them.

    Raises:
        InputError: they are not all ranks of one program, or differ in their sums.
    """

    def __init__(self, programs: Sequence[Program], entry: str | None = None) -> None:
        known = [rank_of(program) for program in programs]
        if known != [(rank, len(programs)) for rank in range(len(programs))]:
            raise InputError(f"these are the ranks {known}, not 0 to {len(programs) - 1} of {len(programs)}.")
        entry = entry or programs[0].default_entry
        self.graphs = [program.entry(entry).graph for program in programs]
        self.stages = [stages(program.entry(entry)) for program in programs]
        plans = [[stage.sums for stage in rank] for rank in self.stages]
        if any(plan != plans[0] for plan in plans):
            raise InputError("the ranks differ in what they sum; run the same passes on all of them.")
        self._sessions = [[_session(stage) for stage in rank] for rank in self.stages]

    @property
    def reduces(self) -> int:
        """Number of AllReduces of one run."""
        return sum(len(stage.sums) for stage in self.stages[0])

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Inputs of the whole program → its outputs; ranks get, and give, their parts of caches.

        Raises:
            InputError: an output that all ranks should have alike differs between them.
        """
        known: list[Arrays] = [_part(graph, feeds) for graph in self.graphs]
        for number, stage in enumerate(self.stages[0]):
            for rank, values in enumerate(known):
                mine, session = self.stages[rank][number], self._sessions[rank][number]
                if session is not None:
                    given = {name: values[name] for name in mine.inputs}
                    values |= zip(mine.outputs, session.run(list(mine.outputs), given), strict=True)
            for addend, total in stage.sums:
                result = np.sum([np.asarray(values[addend], np.float64) for values in known], axis=0)
                for values in known:
                    values[total] = result.astype(values[addend].dtype)
        return {_name(value): _joined(index, self.graphs, known) for index, value in enumerate(self.graphs[0].outputs)}


def _session(stage: Stage):  # type: ignore[no-untyped-def]
    from planish.ir.target import Target
    from planish.runtime.ort import create_session
    from planish.runtime.ort_options import session_options

    if stage.model is None:
        return None
    proto = ir.to_proto(stage.model)
    return create_session(proto.SerializeToString(), session_options(Target(threads=1), None, optimize=True))


def _part(graph: ir.Graph, feeds: Mapping[str, np.ndarray]) -> Arrays:
    """What one rank is given of the inputs of the whole."""
    found = {}
    for value in graph.inputs:
        name = _name(value)
        if name not in feeds:
            raise InputError(f"input '{name}' is not given.")
        found[name], heads = np.asarray(feeds[name]), value.metadata_props.get(KEPT_HEADS)
        if (axis := shard_axis(value)) is not None and heads is not None:
            found[name] = np.take(found[name], [int(head) for head in heads.split()], axis=axis)
    return found


def _joined(index: int, graphs: Sequence[ir.Graph], known: Sequence[Arrays]) -> np.ndarray:
    value = graphs[0].outputs[index]
    found = [values[_name(graph.outputs[index])] for graph, values in zip(graphs, known, strict=True)]
    if (axis := shard_axis(value)) is not None:
        return np.concatenate(found, axis=axis)
    if any(not np.array_equal(other, found[0], equal_nan=found[0].dtype.kind == "f") for other in found):
        raise InputError(f"output '{value.name}' differs between the ranks; a part of it was not summed.")
    return found[0]


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, by the graphs inside of it too."""
    inner = [n for sub in subgraphs_of(node) for n in sub.all_nodes()]
    own = {v for n in inner for v in n.outputs}
    own |= {v for sub in subgraphs_of(node) for v in sub.inputs}
    ends = [v for sub in subgraphs_of(node) for v in sub.outputs]
    values = [v for n in (node, *inner) for v in n.inputs if v is not None] + ends
    return [v for v in dict.fromkeys(values) if v not in own and not _in_subgraph(v, node)]


def _in_subgraph(value: ir.Value, node: ir.Node) -> bool:
    return value.is_initializer() and value.graph is not None and value.graph is not node.graph


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _name(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""
