"""Which nodes of a graph a translation needs: some operators have inputs that their code does not read."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

#: Operator → inputs that no code here reads.
UNREAD: dict[tuple[str, str], Collection[int]] = {("com.microsoft", "GroupQueryAttention"): (6,)}


def needed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that outputs are computed from, in order."""
    pending = [value.producer() for value in graph.outputs]
    found: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in found:
            continue
        found.add(node)
        unread = UNREAD.get((node.domain, node.op_type), ())
        pending += [v.producer() for i, v in enumerate(node.inputs) if v is not None and i not in unread]
    return [node for node in graph if node in found]
