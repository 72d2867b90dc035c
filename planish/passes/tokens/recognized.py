"""Attention as one operator, where it is not yet: what the exact pipeline recognises, done first."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from planish.ir.graphs import is_op
from planish.ir.program import Program
from planish.passes.base import PassContext


def recognize(program: Program, ctx: PassContext, useful: Callable[[Program], bool]) -> bool:
    """Runs the passes that recognise attention if an entry has a Softmax and no Attention; whether that changed it.

    Args:
        useful: asked about a copy on which they ran; if not, `program` stays as it is.
    """
    if not any(_is_raw(model.graph) for model in program.entries.values()):
        return False
    from planish.passes.defaults import RECOGNIZE
    from planish.passes.manager import PassManager
    from planish.passes.pipeline import parse_pipeline

    passes = PassManager(parse_pipeline(",".join(RECOGNIZE)))
    trial = program.clone()
    passes.apply(trial, PassContext(ctx.target))
    return useful(trial) and passes.apply(program, ctx).modified


def _is_raw(graph: ir.Graph) -> bool:
    kinds = {node.op_type for node in graph.all_nodes()}
    return any(is_op(node, "Softmax") for node in graph) and not any("Attention" in kind for kind in kinds)
