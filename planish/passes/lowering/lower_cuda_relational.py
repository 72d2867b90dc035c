"""Relational layers as kernels are generated from them: each operator's program after the relational passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.ir.errors import PlanishError
from planish.ir.graphs import constant_tensor, dims_of
from planish.ir.ops import import_functions
from planish.ir.ops.relational import PROGRAM, graph_of, is_relational, relational_name
from planish.ir.program import Program
from planish.ir.relational.body import body_of
from planish.ir.relational.inter import Program as RelationalProgram
from planish.ir.relational.statistics import NOMINAL, Statistics
from planish.ir.relational.text import parse_program
from planish.ir.schemas import DIALECT_DOMAIN
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.registry import register
from planish.passes.relational.pipeline import DEFAULT, run_passes


@register
@dataclass(frozen=True)
class LowerCudaRelational(ExactPass):
    """Runs the relational passes on the programs of planish::Relational… operators, for generated CUDA kernels.

    What pays depends on the graph: constant edges are counted, for others two edges are assumed for each pair of node
    and type. The operator goes by another name afterwards, and its function is made of the new program.

    Attributes:
        passes: a pipeline of relational passes.
    """

    name: ClassVar[str] = "lower-cuda-relational"
    passes: str = DEFAULT

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        editor = Editor(program, self.name)
        for model in program.entries.values():
            nodes = [n for n in model.graph.all_nodes() if n.domain == DIALECT_DOMAIN and is_relational(n.op_type)]
            before = editor.fired
            for node in nodes:
                try:
                    self._optimize(node, ctx)
                except Decline as decline:
                    editor.decline(node, decline.reason)
                else:
                    editor.fired += 1
            if editor.fired > before:
                import_functions(model)
        return editor.result()

    def _optimize(self, node: ir.Node, ctx: PassContext) -> None:
        if ctx.target.name != "ort-cuda" or not ctx.target.kernels:
            raise Decline(f"target '{ctx.target}' has no kernels for relational layers; 'ort-cuda:kernels' has")
        old = node.attributes.get_string(PROGRAM, "")
        opset = (node.graph.opset_imports.get("", 23)) if node.graph is not None else 23
        try:
            program = parse_program(old)
            made = run_passes(program, _statistics(node, program), self.passes).program
            text = str(made)
            if text == old:
                raise Decline("its program is as the relational passes leave it")
            body_of(made, DIALECT_DOMAIN, relational_name(text), max(opset, 18))
        except PlanishError as error:
            raise Decline(str(error)) from error
        node.op_type = relational_name(text)
        node.attributes[PROGRAM] = ir.AttrString(PROGRAM, text)


def _statistics(node: ir.Node, program: RelationalProgram) -> Statistics:
    index, kinds = (constant_tensor(value) for value in node.inputs[:2])
    shapes = [dims_of(value) for value in node.inputs[2:]]
    if index is None or kinds is None or None in shapes:
        return NOMINAL
    graph = graph_of(program, index.numpy(), kinds.numpy(), [shape[0] if shape else 0 for shape in shapes])
    return NOMINAL if graph is None else Statistics.of(graph)
