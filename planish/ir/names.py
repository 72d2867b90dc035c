"""Names: every node and value of a program has one, unique within its graph and what that graph can see."""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.graphs import subgraphs_of


def ensure_names(model: ir.Model) -> int:
    """Names unnamed nodes and values, and renames the later of two that share a name; returns how many changed.

    Inputs, outputs and initializers of the main graph keep their names: they are the interface and the keys of
    the weight store. ONNX files may hold any number of nodes without a name.
    """
    graph = model.graph
    kept = {v.name for v in (*graph.inputs, *graph.outputs, *graph.initializers.values()) if v.name}
    changed = _Namer(kept).graph(graph, set(), graph_is_main=True)
    for function in model.functions.values():
        changed += _Namer(set()).graph(function.graph, set(), graph_is_main=False)
    return changed


class _Namer:
    def __init__(self, interface: set[str]) -> None:
        self.interface = interface
        self.counters: dict[str, int] = {}

    def graph(self, graph: ir.Graph, outer: set[str], *, graph_is_main: bool) -> int:
        changed = 0
        values = set(outer)
        nodes: set[str] = set()
        own = [*graph.inputs, *(v for v in graph.initializers.values() if not v.is_graph_input())]
        for value in own:
            if not value.name or (value.name in values and not graph_is_main):
                value.name = self._fresh(value.name or "value", values)
                changed += 1
            values.add(value.name)
        for node in graph:
            if not node.name or node.name in nodes:
                node.name = self._fresh(node.name or node.op_type, nodes)
                changed += 1
            nodes.add(node.name)
            changed += self._outputs(node, values)
        # Subgraphs after all outer values are named: a name inside must not hide one outside.
        for node in graph:
            changed += sum(self.graph(inner, values, graph_is_main=False) for inner in subgraphs_of(node))
        return changed

    def _outputs(self, node: ir.Node, values: set[str]) -> int:
        changed = 0
        for index, value in enumerate(node.outputs):
            if not value.name and not value.uses() and not value.is_graph_output():
                continue  # an optional output that is left out
            is_interface = value.is_graph_output() and value.name in self.interface
            taken = value.name in values or (value.name in self.interface and not is_interface)
            if not value.name or taken:
                value.name = self._fresh(value.name or f"{node.name}_out{index}", values)
                changed += 1
            values.add(value.name)
        return changed

    def _fresh(self, stem: str, taken: set[str]) -> str:
        # Counters by stem keep this linear where thousands of nodes share a stem.
        while True:
            number = self.counters[stem] = self.counters.get(stem, -1) + 1
            name = f"{stem}_{number}"
            if name not in taken and name not in self.interface:
                return name
