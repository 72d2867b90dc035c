"""Puts nodes that a Builder made in front of a node, or at the end of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.passes.builder import Builder, Constants
from planish.passes.canonicalize.editing import Editor
from planish.passes.replace import with_inner


class Splicer:
    """The edits of one run of a pass; equal constants are one, in all entries.

    Args:
        name: of the pass.
    """

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name
        self.editor = Editor(program, name)
        self.constants = Constants(program, self.editor.names)

    def build(
        self,
        model: ir.Model,
        before: ir.Node | None,
        make: Callable[[Any], Sequence[ir.Value]],
        sources: Sequence[ir.Node],
    ) -> list[ir.Value]:
        """Inserts what `make(op)` builds, in front of `before` or (None) at the end; returns what it returns.

        Args:
            sources: nodes that the new ones are made from.
        """
        builder = Builder(self.name, model.graph.opset_imports)
        made = list(make(builder))
        placed = {v: self._place(model, v) for v in builder.constants}
        label = self.name.replace("-", "_")
        for node in with_inner(builder.nodes):
            node.name = self.editor.names.fresh(f"{label}_{node.op_type}")
            self.editor.mark(node, sources)
            for value in node.outputs:
                value.name = self.editor.names.fresh(f"{node.name}_out")
            for index, read in enumerate(node.inputs):
                if read in placed:
                    node.replace_input_with(index, placed[read])
        for domain in builder.new_domains:
            model.graph.opset_imports.setdefault(domain, 1)
        if before is None:
            model.graph.extend(builder.nodes)
        else:
            model.graph.insert_before(before, builder.nodes)
        import_functions(model)
        return [placed.get(value, value) for value in made]

    def _place(self, model: ir.Model, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        return self.constants.place(model, value.const_value, value.name or self.name)

    def replace_output(self, graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
        """Makes `new` the output under the name of `old`, which others still read."""
        name = old.name
        graph.outputs[:] = [new if v is old else v for v in graph.outputs]
        old.name = self.editor.names.fresh(f"{name}_whole")
        new.name = name
        for key, text in old.metadata_props.items():
            new.metadata_props.setdefault(key, text)

    def replace(self, node: ir.Node, made: Sequence[ir.Value]) -> None:
        """Lets what is made take the place of a node's outputs, and removes the node."""
        for old, new in zip(node.outputs, made, strict=True):
            new.shape = old.shape if new.shape is None else new.shape
            self.editor.replace(old, new)
        self.editor.remove(node)
