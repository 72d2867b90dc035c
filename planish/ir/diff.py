"""What differs between two programs: operators, blocks, nodes, weights, interface. Pure data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx_ir as ir

from planish.ir.blocks import Block, graph_blocks, op_name
from planish.ir.hashing import structural_hash, tensor_digest
from planish.ir.printer import op_counts
from planish.ir.program import Program


@dataclass(frozen=True)
class BlockChange:
    """A block whose operators differ; `ops` has operator → (count before, count after) where they do."""

    name: str
    before: int
    after: int
    ops: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class WeightChange:
    """A weight that is not in both programs as it is: ``added``, ``removed``, ``changed`` or ``renamed``."""

    name: str
    change: str
    detail: str


@dataclass
class ModelDiff:
    """The difference of two programs, from the first to the second.

    Attributes:
        same: structurally equal: operators, attributes, edges, types, weights and interface; names of nodes and
            of inner values may differ.
        interface: inputs, outputs, opsets and entries that differ, one line each.
        ops: operator → (count before, count after), where they differ.
        blocks: blocks whose operators differ, in graph order.
        removed, added: nodes in one program only, as ``name (operator)``.
        weights: weights that differ.
        nodes, weight_bytes: (before, after) of the whole program.
    """

    same: bool
    nodes: tuple[int, int]
    weight_bytes: tuple[int, int]
    interface: list[str] = field(default_factory=list)
    ops: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: list[BlockChange] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    weights: list[WeightChange] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diff_programs(before: Program, after: Program) -> ModelDiff:
    """Compares two programs. Weights are compared by content, nodes by name and operator."""
    found = ModelDiff(
        same=structural_hash(before) == structural_hash(after),
        nodes=(before.node_count(), after.node_count()),
        weight_bytes=(before.weight_bytes(), after.weight_bytes()),
    )
    found.interface = _interface(before, after)
    found.ops = _changed(op_counts(before), op_counts(after))
    found.blocks = _blocks(before, after)
    old, new = _node_names(before), _node_names(after)
    found.removed = [f"{name} ({op})" for name, op in (old - new).elements()]
    found.added = [f"{name} ({op})" for name, op in (new - old).elements()]
    found.weights = _weights(before, after)
    return found


def _changed(old: dict[str, int], new: dict[str, int]) -> dict[str, tuple[int, int]]:
    names = dict.fromkeys([*old, *new])
    return {n: (old.get(n, 0), new.get(n, 0)) for n in names if old.get(n, 0) != new.get(n, 0)}


def _node_names(program: Program) -> Counter[tuple[str, str]]:
    return Counter((node.name or "", op_name(node)) for node in program.nodes())


def _interface(before: Program, after: Program) -> list[str]:
    lines = []
    for entry in dict.fromkeys([*before.entries, *after.entries]):
        if entry not in before.entries or entry not in after.entries:
            lines.append(f"entry '{entry}' {'added' if entry in after.entries else 'removed'}")
            continue
        where = f"entry '{entry}': " if len(before.entries) > 1 else ""
        sides = (before.inputs(entry), after.inputs(entry)), (before.outputs(entry), after.outputs(entry))
        for role, (old_specs, new_specs) in zip(("input", "output"), sides, strict=True):
            old, new = ({spec.name: str(spec) for spec in specs} for specs in (old_specs, new_specs))
            for name in dict.fromkeys([*old, *new]):
                if old.get(name) != new.get(name):
                    lines.append(f"{where}{role} {_was_is(old.get(name), new.get(name))}")
        opsets = before.entry(entry).opset_imports, after.entry(entry).opset_imports
        for domain in sorted({*opsets[0], *opsets[1]}):
            if opsets[0].get(domain) != opsets[1].get(domain):
                name = domain or "ai.onnx"
                lines.append(f"{where}opset of {name}: {opsets[0].get(domain, '–')} → {opsets[1].get(domain, '–')}")
    return lines


def _was_is(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return f"{new} added" if old is None else f"{old} removed"
    return f"{old} → {new}"


def _blocks(before: Program, after: Program) -> list[BlockChange]:
    limit = before.node_count() + after.node_count()
    old = {block.name: block for block in graph_blocks(before, limit=limit)}
    new = {block.name: block for block in graph_blocks(after, limit=limit)}
    changes = []
    for name in dict.fromkeys([*old, *new]):
        ops = _changed(_ops(old.get(name)), _ops(new.get(name)))
        if ops:
            counts = (old[name].count if name in old else 0), (new[name].count if name in new else 0)
            changes.append(BlockChange(name, *counts, ops))
    return changes


def _ops(block: Block | None) -> dict[str, int]:
    return dict(Counter(node.op for node in block.nodes)) if block else {}


def _weights(before: Program, after: Program) -> list[WeightChange]:
    old, new = before.weights, after.weights
    only_old = {name: tensor for name, tensor in old.items() if name not in new}
    changes = []
    by_digest: dict[str, list[str]] = {}
    for name, tensor in only_old.items():
        by_digest.setdefault(tensor_digest(tensor), []).append(name)
    for name, tensor in new.items():
        if name in old:
            if old[name] is not tensor and tensor_digest(old[name]) != tensor_digest(tensor):
                changes.append(WeightChange(name, "changed", f"{_describe(old[name])} → {_describe(tensor)}"))
            continue
        twins = by_digest.get(tensor_digest(tensor))
        if twins:
            source = twins.pop()
            only_old.pop(source)
            changes.append(WeightChange(name, "renamed", f"was {source}"))
        else:
            changes.append(WeightChange(name, "added", _describe(tensor)))
    changes += [WeightChange(name, "removed", _describe(tensor)) for name, tensor in only_old.items()]
    return changes


def _describe(tensor: ir.TensorProtocol) -> str:
    dims = ", ".join(map(str, tensor.shape))
    return f"{tensor.dtype.name.lower()}[{dims}]"
