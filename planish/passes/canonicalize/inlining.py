"""Moves the nodes of a branch of an If in front of it."""

from __future__ import annotations

import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.canonicalize.editing import Editor


def inline_branch(node: ir.Node, branch: str, editor: Editor) -> list[ir.Node]:
    """Replaces the If `node` by the contents of its attribute `branch`; returns the nodes that moved.

    Names inside the two branches, and in other subgraphs, may be equal, so all that moves is renamed.

    Raises:
        Decline: an output of the branch is not made inside it.
    """
    graph = node.attributes.get_graph(branch)
    target = node.graph
    assert graph is not None and target is not None
    inside = {v for inner in graph for v in inner.outputs}
    results = list(graph.outputs)
    constants = list(graph.initializers.values())
    if any(v not in inside and v not in constants for v in results):
        raise Decline(f"an output of the {branch} comes from outside of it")
    lifted = any(v.is_graph_output() and r in constants for v, r in zip(node.outputs, results, strict=True))
    if lifted or len(set(results)) < len(results):
        raise Decline(f"an output of the {branch} can not become an output of the graph")
    graph.outputs.clear()
    for value in constants:
        del graph.initializers[value.name or ""]
        value.name = editor.names.fresh(value.name or "constant")
        target.register_initializer(value)
    moved = list(graph)
    graph.remove(moved)
    for inner in moved:
        inner.name = editor.names.fresh(inner.name or inner.op_type)
        for value in inner.outputs:
            if value.name:
                value.name = editor.names.fresh(value.name)
        editor.mark(inner, [inner, node])
    target.insert_before(node, moved)
    for old, new in zip(node.outputs, results, strict=True):
        editor.replace(old, new)
    editor.remove(node)
    return moved
