"""Attention as one operator, where it is not yet: what the exact pipeline recognises, done first."""

from __future__ import annotations

from planish.ir.graphs import is_op
from planish.ir.program import Program
from planish.passes.base import PassContext


def recognize(program: Program, ctx: PassContext) -> bool:
    """Runs the passes that recognise attention if an entry has a Softmax and no Attention; whether that changed it."""
    graphs = [model.graph for model in program.entries.values()]
    if not any(_is_raw(graph) for graph in graphs):
        return False
    from planish.passes.defaults import RECOGNIZE
    from planish.passes.manager import PassManager
    from planish.passes.pipeline import parse_pipeline

    return PassManager(parse_pipeline(",".join(RECOGNIZE))).apply(program, ctx).modified


def _is_raw(graph) -> bool:  # type: ignore[no-untyped-def]
    kinds = {node.op_type for node in graph.all_nodes()}
    return any(is_op(node, "Softmax") for node in graph) and not any("Attention" in kind for kind in kinds)
