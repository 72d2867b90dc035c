"""Near misses: why a pass did not fire at the places where it almost did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from planish.ir.program import Program
from planish.passes.base import Decline, Pass, PassContext
from planish.passes.builder import Builder
from planish.passes.driver import describe_node, propose
from planish.passes.matcher import Matcher
from planish.passes.pattern import NodePattern
from planish.passes.rewrite import RewriteMixin
from planish.passes.rule import CompiledRule, Match, Site


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule could start and did not fire.

    Attributes:
        rule: the rule.
        node: name of the node where its pattern would have its root.
        matched_nodes: names of the graph's nodes that matched before it failed (all of them if a check declined).
        reason: what did not fit: expected and found.
        pattern_nodes: how many operator calls the pattern has.
        failed_at: name of the node or value where it failed.
        declined: the pattern matched as a whole, and the pass chose not to act.
    """

    rule: str
    node: str
    matched_nodes: tuple[str, ...]
    reason: str
    pattern_nodes: int = 0
    failed_at: str = ""
    declined: bool = False

    def __str__(self) -> str:
        got = "all" if self.declined else f"{len(self.matched_nodes)} of {self.pattern_nodes}"
        return f"{self.rule} at {self.node}: matched {got} nodes; {self.reason}"


def explain(program: Program, p: Pass) -> list[NearMiss]:
    """Every place where `p` could start and does not fire, the nearest first. `program` is not changed.

    Of several rules that miss at one node the nearest is told; nodes that a firing takes with it are no misses.
    For a pass that is not made of rules: the places that it declines.
    """
    if not isinstance(p, RewriteMixin):
        result = p.apply(program.clone(), PassContext(program.target))
        return [NearMiss(d.rule, d.node, (d.node,), d.reason, 1, d.node, True) for d in result.declined]
    misses: dict[ir.Node, NearMiss] = {}
    taken: set[ir.Node] = set()
    for rule in map(CompiledRule.of, p.rules()):
        for model in program.entries.values():
            for graph in list(model.graphs()):
                site = Site(program, model, graph, program.target)
                for node in graph:
                    miss = _examine(rule, site, node, taken)
                    if miss is not None and (node not in misses or _distance(miss) < _distance(misses[node])):
                        misses[node] = miss
    return sorted((m for node, m in misses.items() if node not in taken), key=_distance)


def _distance(miss: NearMiss) -> tuple[bool, float]:
    return not miss.declined, -len(miss.matched_nodes) / max(miss.pattern_nodes, 1)


class _Best:
    """Keeps the failure that came furthest; later ones of equal depth are no nearer."""

    def __init__(self) -> None:
        self.nodes: dict[NodePattern, ir.Node] = {}
        self.item: Any = None
        self.why: str = ""

    def __call__(self, nodes: dict[NodePattern, ir.Node], pattern: Any, item: Any, why: Callable[[], str]) -> None:
        if not self.why or len(nodes) > len(self.nodes):
            # The reason reads bindings that backtracking undoes, so it is formatted now.
            self.nodes, self.item, self.why = nodes, item, why()


def _examine(rule: CompiledRule, site: Site, node: ir.Node, taken: set[ir.Node]) -> NearMiss | None:
    """The miss of one rule at one node; None, with its nodes added to `taken`, if it fires there."""
    root = rule.pattern.roots[0]
    if not root.accepts(node.op_type) or not root.accepts_domain(node.domain):
        return None
    best = _Best()
    matcher = Matcher(rule.pattern, site.model.graph.opset_imports, best)
    declined: NearMiss | None = None
    name, count = label(node), len(rule.pattern.nodes)
    for bound in matcher.matches(node, Match(rule, site, node)):
        match = Match(rule, site, node, bound)
        try:
            propose(rule, match, Builder(rule.rule.name, match.model.graph.opset_imports))
        except Decline as decline:
            if declined is None:
                matched = tuple(label(n) for n in match.nodes)
                declined = NearMiss(rule.rule.name, name, matched, decline.reason, count, name, True)
            continue
        taken.update(match.nodes)
        return None
    if declined is not None:
        return declined
    matched = tuple(dict.fromkeys(label(n) for n in best.nodes.values()))
    return NearMiss(rule.rule.name, name, matched, best.why, count, label(best.item) or name)


def label(item: Any) -> str:
    """How to call a node or value in a message."""
    if isinstance(item, tuple):
        item = item[0]
    if isinstance(item, ir.Node):
        return describe_node(item)
    return item.name or "" if isinstance(item, ir.Value) else ""
