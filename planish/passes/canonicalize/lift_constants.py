"""lift-constants: Constant nodes become initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.ir.graphs import constant_node_tensor
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor, apply_rules
from planish.passes.registry import register


@register
@dataclass(frozen=True)
class LiftConstants(ExactPass):
    """Makes every Constant node an initializer of its graph, so that a constant has one form for other passes."""

    name: ClassVar[str] = "lift-constants"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        return apply_rules(program, self.name, {"Constant": _lift})


def _lift(node: ir.Node, editor: Editor) -> bool:
    tensor = constant_node_tensor(node)
    if tensor is None:
        raise Decline("the constant is sparse, or an attribute of a function")
    old = node.outputs[0]
    if old.is_graph_output():
        return False  # an output needs a node that makes it
    assert node.graph is not None
    new = editor.constant(node.graph, tensor, old.name or "constant")
    editor.replace(old, new)
    editor.remove(node)
    return True
