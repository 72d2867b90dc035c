"""Puts a replacement into a graph: names, types, metadata, graph outputs, and the right place in the order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.errors import PlanishError
from planish.ir.graphs import subgraphs_of
from planish.passes.base import Decline
from planish.passes.builder import Builder, Constants, new_metadata
from planish.passes.names import Names
from planish.passes.order import Order
from planish.passes.rule import Match, Rule, Site


@dataclass
class Plan:
    """A replacement that was found possible: nothing has been changed yet."""

    rule: Rule
    match: Match
    builder: Builder
    pairs: list[tuple[ir.Value, ir.Value]]
    new_nodes: list[ir.Node]
    anchor: ir.Node
    late: list[ir.Node] = field(default_factory=list)


class Replacer:
    """Carries out replacements in one graph."""

    def __init__(self, pass_name: str, site: Site, names: Names, constants: Constants) -> None:
        self.pass_name, self.site, self.names, self.constants = pass_name, site, names, constants
        self.order = Order(site.graph)

    def plan(self, rule: Rule, match: Match, builder: Builder, values: Sequence[ir.Value]) -> Plan:
        """Works out what to do, without doing it.

        Raises:
            Decline: the graph does not allow it here.
            PlanishError: the rule built something that can not be.
        """
        self._require_sane(rule, match, builder, values)
        pairs = list(zip(match.outputs, values, strict=True))
        plan = Plan(rule, match, builder, pairs, list(builder.nodes), match.root)
        if len(pairs) > 1:
            needed = [v for n in with_inner(builder.nodes) for v in n.inputs if v is not None] + list(values)
            plan.anchor, plan.late = self.order.place(match.nodes, match.outputs, needed)
        self._add_identities(plan)
        return plan

    def _require_sane(self, rule: Rule, match: Match, builder: Builder, values: Sequence[ir.Value]) -> None:
        new = set(with_inner(builder.nodes))
        removed = set(match.nodes) if rule.remove_nodes else {match.root}
        for value in [v for n in with_inner(builder.nodes) for v in n.inputs if v is not None] + list(values):
            producer = value.producer()
            if producer in removed:
                raise PlanishError(
                    f"rule '{rule.name}': the replacement uses '{value.name}', an output of {producer.op_type} "
                    f"'{producer.name}', which it replaces."
                )
            if producer is not None and producer not in new and producer.graph is None:
                raise PlanishError(f"rule '{rule.name}': the replacement uses '{value.name}', which left the graph.")
        for old, value in zip(match.outputs, values, strict=True):
            if value.dtype is not None and old.dtype is not None and value.dtype != old.dtype:
                raise PlanishError(
                    f"rule '{rule.name}': '{old.name}' is {old.dtype.name}, its replacement is {value.dtype.name}."
                )

    def _add_identities(self, plan: Plan) -> None:
        """Outputs of the graph keep their names, so a value that can not take the name gets an Identity."""
        claimed: set[ir.Value] = set()
        new = set(plan.new_nodes)
        for index, (old, value) in enumerate(plan.pairs):
            if not old.is_graph_output():
                continue
            producer = value.producer()
            free = producer is not None and (producer in new or producer.graph is self.site.graph)
            if free and not value.is_graph_output() and value not in claimed:
                claimed.add(value)
                continue
            if [n.op_type for n in plan.match.nodes] == ["Identity"]:
                raise Decline(f"output '{old.name}' of the graph is '{value.name}' itself; the Identity must stay")
            identity = ir.Node("", "Identity", [value])
            identity.outputs[0].type, identity.outputs[0].shape = value.type or old.type, value.shape or old.shape
            plan.new_nodes.append(identity)
            plan.pairs[index] = (old, identity.outputs[0])

    def carry_out(self, plan: Plan) -> int:
        """Changes the graph; returns by how many nodes it grew."""
        graph, match = self.site.graph, plan.match
        self._place_constants(plan)
        metadata = new_metadata(self.pass_name, match.nodes, match.root)
        label = plan.rule.name.replace("-", "_")
        finals = {value for _, value in plan.pairs}
        for node in with_inner(plan.new_nodes):
            node.name = self.names.fresh(node.name or f"{label}_{node.op_type}")
            node.metadata_props.update(metadata)
            for value in node.outputs:
                if value not in finals and value.name != "":  # an optional output that is left out has no name
                    value.name = self.names.fresh(value.name or f"{node.name}_out")
        graph_imports = self.site.model.graph.opset_imports
        for domain in plan.builder.new_domains:
            graph_imports.setdefault(domain, 1)
        for old, value in plan.pairs:
            self._take_over(old, value, value.producer() in plan.new_nodes)
        if plan.new_nodes:
            graph.insert_after(plan.anchor, plan.new_nodes)
        self.order.inserted(plan.anchor, plan.new_nodes, plan.late)
        removed = self._remove(plan)
        return len(plan.new_nodes) - removed

    def _place_constants(self, plan: Plan) -> None:
        placeholders = set(plan.builder.constants)
        if not placeholders:
            return
        placed: dict[ir.Value, ir.Value] = {}

        def real(value: ir.Value) -> ir.Value:
            if value not in placeholders:
                return value
            if value not in placed:
                assert value.const_value is not None
                placed[value] = self.constants.place(self.site.model, value.const_value, value.name or "constant")
            return placed[value]

        for node in with_inner(plan.new_nodes):
            for index, value in enumerate(node.inputs):
                if value is not None:
                    node.replace_input_with(index, real(value))
        plan.pairs = [(old, real(value)) for old, value in plan.pairs]

    def _take_over(self, old: ir.Value, value: ir.Value, is_new: bool) -> None:
        """`value` takes the place of `old` everywhere: uses, name, type, shape, graph outputs."""
        if value.type is None:
            value.type = old.type
        if value.shape is None and old.shape is not None:
            value.shape = old.shape.copy()
        if is_new:
            for key, text in old.metadata_props.items():
                value.metadata_props.setdefault(key, text)
        name = old.name or "value"
        graph_output = old.is_graph_output()
        if graph_output or (is_new and value.name is None):
            old.name = self.names.fresh(f"{name}_replaced")
            value.name = name
        old.replace_all_uses_with(value, replace_graph_outputs=graph_output)

    def _remove(self, plan: Plan) -> int:
        graph, nodes = self.site.graph, list(plan.match.nodes)
        if plan.rule.remove_nodes:
            graph.remove(nodes, safe=True)
            return len(nodes)
        removed = 0
        for node in _consumers_first(nodes):
            if not any(v.uses() or v.is_graph_output() for v in node.outputs):
                graph.remove(node, safe=True)
                removed += 1
        return removed


def with_inner(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Nodes, and those in the graphs inside of them."""
    for node in nodes:
        yield node
        for graph in subgraphs_of(node):
            yield from with_inner(graph)


def _consumers_first(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    order: dict[ir.Node, None] = {}
    inside = set(nodes)

    def visit(node: ir.Node) -> None:
        if node in order:
            return
        for successor in node.successors():
            if successor in inside:
                visit(successor)
        order[node] = None

    for node in nodes:
        visit(node)
    return list(order)
