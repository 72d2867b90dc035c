"""Edits that the canonicalizing passes share: fresh names, new constants and nodes, replacing one value by another.

An :class:`Editor` lives for one run of one pass over one program and does the bookkeeping of that run: how many
places changed, what was declined, which node was made from which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import subgraphs_of
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.ir.provenance import provenance
from planish.passes.base import Decline, PassResult
from planish.passes.names import Names


class Editor:
    """The edits of one run of the pass called `name`.

    Attributes:
        fired: number of places changed so far.
        declined: places left alone, with reasons.
        revisit: nodes whose output has learned a type or a shape, so that a rule may now prove more of them.
    """

    def __init__(self, program: Program, name: str) -> None:
        self.name = name
        self.fired = 0
        self.declined: list[Declined] = []
        self.revisit: list[ir.Node] = []
        self._noted: set[tuple[ir.Node, str]] = set()
        #: Names that no node and no value of the program has, in any entry: entries may share an initializer.
        self.names = Names(program)

    def result(self) -> PassResult:
        return PassResult(self.fired > 0, self.fired, self.declined)

    def decline(self, node: ir.Node, reason: str) -> None:
        """Keeps the reason why the pass left `node` alone."""
        if (node, reason) not in self._noted:  # a node may be looked at again
            self._noted.add((node, reason))
            self.declined.append(Declined(self.name, node.name or f"unnamed {node.op_type}", reason))

    def constant(self, graph: ir.Graph, array: np.ndarray | ir.TensorProtocol, stem: str) -> ir.Value:
        """A new initializer of `graph`."""
        tensor = ir.tensor(array) if isinstance(array, np.ndarray) else array
        value = ir.Value(name=self.names.fresh(stem), const_value=tensor)
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        graph.register_initializer(value)
        return value

    def node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        sources: Iterable[ir.Node] = (),
    ) -> ir.Value:
        """Inserts a node of one output in front of `before`; the output takes type and shape from `like`."""
        node = ir.node(
            op_type, list(inputs), attributes=dict(attributes or {}), name=self.names.fresh(f"{op_type}_planish")
        )
        value = node.outputs[0]
        value.name = self.names.fresh(f"{like.name if like is not None else op_type}_planish")
        if like is not None:
            value.type, value.shape = like.type, like.shape
        assert before.graph is not None
        before.graph.insert_before(before, node)
        self.mark(node, list(sources) or [before])
        return value

    def mark(self, node: ir.Node, sources: Sequence[ir.Node]) -> None:
        """Notes on `node` that this pass made it from `sources`, whose own metadata it takes over."""
        made_from = provenance(self.name, sources)
        for source in sources:
            for key, text in source.metadata_props.items():
                node.metadata_props.setdefault(key, text)
        node.metadata_props.update(made_from)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Lets every user of `old` use `new`, and gives `new` the name of `old` where that is an output.

        Raises:
            Decline: `old` is an output of its graph and `new` can not take its place and name.
        """
        known = (new.type, new.shape)
        if old.is_graph_output():
            self._replace_output(old, new)
        if new.type is None:
            new.type = old.type
        producer = new.producer()
        if producer is not None:
            new.shape = old.shape if new.shape is None else new.shape
            if known != (new.type, new.shape):
                self.revisit.append(producer)
        for user, index in old.uses():
            user.replace_input_with(index, new)

    def _replace_output(self, old: ir.Value, new: ir.Value) -> None:
        graph = old.graph
        producer = new.producer()
        if producer is None or producer.graph is not graph:
            raise Decline(f"'{old.name}' is an output of the graph, and '{new.name}' is not made by one of its nodes")
        if new.is_graph_output():
            raise Decline(f"'{old.name}' and '{new.name}' are both outputs of the graph")
        assert graph is not None
        graph.outputs[:] = [new if v is old else v for v in graph.outputs]
        name = old.name
        old.name = self.names.fresh(f"{name}_replaced")
        new.name = name
        # The declared type of an output is the interface of the graph.
        new.type = old.type if old.type is not None else new.type
        new.shape = old.shape if old.shape is not None else new.shape

    def remove(self, node: ir.Node) -> None:
        """Takes a node without users out of its graph, and all that is inside it out of the lists of users.

        Who is left as the only user of what it read may be free to act now.
        """
        read = [value for value in node.inputs if value is not None]
        detach(node)
        for value in read:
            uses = value.uses()
            if len(uses) == 1:
                self.revisit.append(next(iter(uses)).node)
        assert node.graph is not None
        node.graph.remove(node)


def detach(node: ir.Node) -> None:
    """Makes `node`, and every node in its subgraphs, no longer a user of anything."""
    for index, value in enumerate(node.inputs):
        if value is not None:
            node.replace_input_with(index, None)
    for graph in subgraphs_of(node):
        for inner in graph:
            detach(inner)


def walk(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes in order of execution, what is inside a node before the node; the current node may be removed."""
    for node in graph:
        if node.attributes:
            for inner in subgraphs_of(node):
                yield from walk(inner)
        yield node


Rule = Callable[[ir.Node, Editor], bool]


def apply_rules(
    program: Program, name: str, rules: Mapping[str, Rule], observe: Callable[[ir.Node], object] | None = None
) -> PassResult:
    """One sweep over all graphs: each node of the standard domain meets the rule of its operator.

    Args:
        rules: operator → a rule, which returns whether it changed something, or raises `Decline`.
        observe: called with every node before its rule, in order of execution.
    """
    editor = Editor(program, name)
    for model in program.entries.values():
        for node in walk(model.graph):
            if observe is not None:
                observe(node)
            _apply_rule(node, rules, editor)
        while editor.revisit:
            node = editor.revisit.pop()
            if node.graph is not None:
                _apply_rule(node, rules, editor)
    return editor.result()


def _apply_rule(node: ir.Node, rules: Mapping[str, Rule], editor: Editor) -> None:
    rule = rules.get(node.op_type) if not node.domain else None
    if rule is None:
        return
    try:
        editor.fired += bool(rule(node, editor))
    except Decline as decline:
        editor.decline(node, decline.reason)
