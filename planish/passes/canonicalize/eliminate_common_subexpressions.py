"""eliminate-common-subexpressions: computes and stores equal things once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.ir.graphs import is_op, subgraphs_of
from planish.ir.hashing import tensor_digest
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.determinism import Determinism
from planish.passes.canonicalize.editing import Editor
from planish.passes.canonicalize.keys import node_key
from planish.passes.registry import register

_PROBE_BYTES = 4096


@register
@dataclass(frozen=True)
class EliminateCommonSubexpressions(ExactPass):
    """Merges nodes of the same operator, attributes and inputs, and initializers of the same content.

    Only deterministic operators are merged. Nodes in a subgraph may be merged with earlier ones outside of it.

    Attributes:
        max_bytes: larger initializers are not compared.
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"

    max_bytes: int = 1 << 30

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        editor = Editor(program, self.name)
        ranks = {name: rank for rank, name in enumerate(_initializer_names(program))}
        for model in program.entries.values():
            for graph in model.graphs():
                editor.fired += _merge_initializers(graph, ranks, self.max_bytes)
            _Merger(editor, Determinism(model)).graph(model.graph, ())
        return editor.result()


@dataclass
class _Merger:
    editor: Editor
    determinism: Determinism

    def graph(self, graph: ir.Graph, outer: tuple[dict[object, ir.Node], ...]) -> None:
        own: dict[object, ir.Node] = {}
        tables = (own, *outer)
        for node in graph:
            for inner in subgraphs_of(node) if node.attributes else ():
                self.graph(inner, tables)
            if not node.outputs or not self.determinism.of(node):
                continue
            key = node_key(node)
            first = next((t[key] for t in tables if key in t), None)
            if first is None:
                own[key] = node
                continue
            try:
                self.editor.fired += self._merge(node, first)
            except Decline as decline:
                self.editor.decline(node, decline.reason)

    def _merge(self, node: ir.Node, first: ir.Node) -> bool:
        if is_op(node, "Identity", "Constant") and node.outputs[0].is_graph_output():
            return False  # such a node is there to give an output its name
        pairs = list(zip(node.outputs, first.outputs, strict=True))
        outputs = [(a, b) for a, b in pairs if a.is_graph_output()]
        for a, b in outputs:
            if b.is_graph_output() or first.graph is not node.graph:
                raise Decline(f"'{a.name}' and '{b.name}' are equal, and each needs a node of its own graph to make it")
        for a, b in pairs:
            if not b.name and (a.uses() or a.is_graph_output()):
                b.name = self.editor.names.fresh(f"{first.name}_output")
            self.editor.replace(a, b)
        self.editor.mark(first, [first, node])
        self.editor.remove(node)
        return True


def _initializer_names(program: Program) -> dict[str, None]:
    """Names in a fixed order over all entries, so that each entry keeps the same one of equal weights."""
    return {name: None for model in program.entries.values() for name in model.graph.initializers}


def _merge_initializers(graph: ir.Graph, ranks: dict[str, int], max_bytes: int) -> int:
    """Groups by what is cheap to know before it hashes: whole weights are read only where a probe is equal."""
    groups: dict[object, list[ir.Value]] = {}
    for value in sorted(graph.initializers.values(), key=lambda v: ranks.get(v.name or "", len(ranks))):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output() or tensor.nbytes > max_bytes:
            continue
        groups.setdefault((tensor.dtype, tuple(tensor.shape.numpy())), []).append(value)
    count = 0
    for group in groups.values():
        if len(group) > 1:
            for probed in _split(group, _probe):
                for equal in _split(probed, lambda t: tensor_digest(t)) if len(probed) > 1 else ():
                    count += _keep_first(equal)
    return count


def _split(values: list[ir.Value], key: object) -> list[list[ir.Value]]:
    parts: dict[object, list[ir.Value]] = {}
    for value in values:
        parts.setdefault(key(value.const_value), []).append(value)  # type: ignore[operator]
    return list(parts.values())


def _probe(tensor: ir.TensorProtocol) -> object:
    if tensor.dtype == ir.DataType.STRING:
        return None
    array = tensor.numpy()
    return array.ravel()[: _PROBE_BYTES // max(1, array.itemsize)].tobytes() if array.flags.c_contiguous else None


def _keep_first(values: list[ir.Value]) -> int:
    first, *rest = values
    for value in rest:
        for user, index in value.uses():
            user.replace_input_with(index, first)
        assert value.graph is not None and value.name is not None
        del value.graph.initializers[value.name]
    return len(rest)
