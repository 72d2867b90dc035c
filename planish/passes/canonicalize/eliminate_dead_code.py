"""eliminate-dead-code: removes what no output depends on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from planish.ir.graphs import subgraphs_of
from planish.ir.program import Program
from planish.passes.base import ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor, detach
from planish.passes.registry import register


@register
@dataclass(frozen=True)
class EliminateDeadCode(ExactPass):
    """Removes dead nodes, initializers and functions, and optional outputs that nothing reads.

    ONNX operators have no side effects, so a node is alive if and only if an output of its graph, or a node that
    is alive, reads one of its outputs. Inputs of the graph stay: they are its interface.
    """

    name: ClassVar[str] = "eliminate-dead-code"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        editor = Editor(program, self.name)
        for model in program.entries.values():
            opset = model.opset_imports.get("", 1)
            editor.fired += _clean(model.graph, opset) + _drop_functions(model)
        return editor.result()


def _clean(graph: ir.Graph, opset: int) -> int:
    """One backwards sweep: when a node is met, all its readers, also those in later subgraphs, were met before."""
    count = 0
    dead: list[ir.Node] = []
    for node in reversed(graph):
        if not any(v.is_graph_output() or v.uses() for v in node.outputs):
            detach(node)
            dead.append(node)
            continue
        count += sum(_clean(inner, opset) for inner in subgraphs_of(node)) if node.attributes else 0
        if len(node.outputs) > 1:
            count += _trim(node, opset)
    if dead:
        graph.remove(dead)
    unused = [n for n, v in graph.initializers.items() if not (v.uses() or v.is_graph_output() or v.is_graph_input())]
    for name in unused:
        del graph.initializers[name]
    return count + len(dead) + len(unused)


def _trim(node: ir.Node, opset: int) -> int:
    """Drops trailing outputs that are optional and unused, and the names of unused ones before."""
    optional = _optional_outputs(node.domain, node.op_type, opset)
    size = len(node.outputs)
    while size > 1 and size - 1 in optional and not _is_read(node.outputs[size - 1]):
        size -= 1
    count = len(node.outputs) - size
    node.resize_outputs(size)
    for index, value in enumerate(node.outputs):
        if index in optional and value.name and not _is_read(value):
            value.name = ""
            count += 1
    return count


def _is_read(value: ir.Value) -> bool:
    return value.is_graph_output() or bool(value.uses())


@functools.lru_cache(maxsize=1024)
def _optional_outputs(domain: str, op_type: str, opset: int) -> frozenset[int]:
    if domain:
        return frozenset()
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return frozenset()
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return frozenset(i for i, item in enumerate(schema.outputs) if item.option == optional)


def _drop_functions(model: ir.Model) -> int:
    """Removes functions that no node calls, directly or through a function that is called."""
    if not model.functions:
        return 0
    pending = [n.op_identifier() for n in model.graph.all_nodes() if n.op_identifier() in model.functions]
    called = set()
    while pending:
        key = pending.pop()
        if key not in called:
            called.add(key)
            inner = (n.op_identifier() for n in model.functions[key].graph.all_nodes())
            pending.extend(k for k in inner if k in model.functions)
    unused = [key for key in model.functions if key not in called]
    for key in unused:
        del model.functions[key]
    return len(unused)
