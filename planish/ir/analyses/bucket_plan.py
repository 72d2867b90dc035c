"""From the sizes that a target asks for to what may be padded, by proof, and why the rest may not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from planish.ir.analyses.padding import Proof, padding
from planish.ir.buckets import Buckets, Cut
from planish.ir.errors import unknown
from planish.ir.graphs import dims_of


def plan_buckets(
    model: ir.Model, asked: Sequence[tuple[str, tuple[int, ...]]], others: Collection[str] = ()
) -> tuple[Buckets | None, list[str]]:
    """What of a model is padded to which sizes, None if nothing is, and what a report should say about it.

    Args:
        others: dimensions that other entries of the program have; here they are passed over.

    Raises:
        InputError: no input has a dimension of that name (with a did-you-mean).
    """
    graph = model.graph
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    symbols = {d for v in inputs for d in dims_of(v) or () if isinstance(d, str)}
    sizes: dict[str, tuple[int, ...]] = {}
    fills: dict[str, float | None] = {}
    cuts: dict[str, list[Cut]] = {}
    notes: list[str] = []
    assumes: list[str] = []
    for dim, listed in asked:
        if dim not in symbols and dim in others:
            continue
        if dim not in symbols:
            raise unknown("dimension", dim, sorted(symbols))
        proof = padding(model, dim, fills)
        kept = tuple(n for n in listed if proof.least <= n and (proof.limit is None or n <= proof.limit))
        reason = proof.reason or _unsized(model, proof)
        if reason or not kept:
            notes.append(f"sizes of {dim} are not padded: {reason or f'it takes up to {proof.limit}'}.")
            continue
        if len(kept) < len(listed):
            left_out = ", ".join(str(n) for n in listed if n not in kept)
            notes.append(f"sizes of {dim} are not padded to {left_out}: the model takes up to {proof.limit}.")
        sizes[dim] = kept
        fills |= {name: fill if fill is not None else fills.get(name) for name, fill in proof.fills.items()}
        for name, axes in proof.outputs.items():
            cuts.setdefault(name, []).extend((axis, dim, plus) for axis, plus in axes)
        assumes += [item for item in proof.assumes if item not in assumes]
    if not sizes:
        return None, notes
    text = "; ".join(f"{dim} to {', '.join(map(str, kept))}" for dim, kept in sizes.items())
    notes.insert(0, f"inputs are padded, {text}" + (f", which takes that {' and '.join(assumes)}." if assumes else "."))
    return Buckets(sizes, fills, {name: tuple(listed) for name, listed in cuts.items()}), notes


def _unsized(model: ir.Model, proof: Proof) -> str:
    """Outputs have to say their sizes."""
    for value in model.graph.outputs:
        if dims_of(value) is None:
            return f"the rank of output '{value.name}' is not known"
    return ""
