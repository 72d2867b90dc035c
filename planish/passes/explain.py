"""Near misses: why a pass did not fire at the places where it almost did.

A pattern is matched from its last operator back to its inputs, with every failure traced, and the one that came
furthest is told. Where the last operators are others than expected, matching never starts, so parts of the pattern
are looked for too: what matches one up to an inner operator, and is then read by something else, is a near miss.
None of this runs, or costs anything, in a normal run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from planish.ir.program import Program
from planish.passes.base import Decline, Pass, PassContext
from planish.passes.builder import Builder
from planish.passes.driver import describe_node, propose
from planish.passes.matcher import Matcher
from planish.passes.pattern import CompiledPattern, NodePattern, OrPattern, OutPattern, VarPattern, pattern_slice
from planish.passes.rewrite import RewriteMixin
from planish.passes.rule import CompiledRule, Match, Site

#: Operators that must have matched; fewer are a coincidence, unless one is an anchor of the pass.
LEAST_MATCHED = 2
_LEAST_PART = 3  # operators of a part of a pattern, where the last operators are others
_MOST_READERS = 3  # shown


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


@dataclass(frozen=True)
class Explained:
    """One pass of a pipeline: how often it fires, and where it nearly does.

    Attributes:
        name: the pass with its options.
        position: its index in the pipeline.
    """

    name: str
    position: int
    fired: int
    near_misses: list[NearMiss]


def explain(program: Program, p: Pass) -> list[NearMiss]:
    """Every place where `p` could start and does not fire, the nearest first. `program` is not changed.

    Of several rules that miss at one node the nearest is told; nodes that a firing takes with it are no misses, and
    neither are places where fewer than two operators match and none is one of the pass's ``anchors``.
    For a pass that is not made of rules: the places that it declines.
    """
    if not isinstance(p, RewriteMixin):
        result = p.apply(program.clone(), PassContext(program.target))
        return [NearMiss(d.rule, d.node, (d.node,), d.reason, 1, d.node, True) for d in result.declined]
    misses: dict[ir.Node, NearMiss] = {}
    taken: set[ir.Node] = set()
    covered: set[ir.Node] = set()
    work = [
        (rule, Site(program, model, graph, program.target))
        for rule in map(CompiledRule.of, p.rules())
        for model in program.entries.values()
        for graph in list(model.graphs())
    ]
    for rule, site in work:
        for node in site.graph:
            found = _examine(rule, site, node, taken)
            if found is None or not (found[0].declined or _is_near(found[1], p.anchors)):
                continue
            covered.update(found[1])
            if node not in misses or _distance(found[0]) < _distance(misses[node]):
                misses[node] = found[0]
    for rule, site in work:
        for node, miss in _parts(rule, site, taken, covered):
            misses.setdefault(node, miss)
    return sorted((m for node, m in misses.items() if node not in taken), key=_distance)


def explain_pipeline(program: Program, passes: Sequence[Pass]) -> Iterator[Explained]:
    """The near misses of every pass made of rules, each on the program as the passes before it leave it.

    `program` is changed: the passes are applied to it.
    """
    ctx = PassContext(program.target)
    for position, p in enumerate(passes):
        misses = explain(program, p) if isinstance(p, RewriteMixin) else None
        result = p.apply(program, ctx)
        if misses is not None:
            yield Explained(str(p), position, result.fired, misses)


def _is_near(matched: Sequence[ir.Node], anchors: Sequence[str]) -> bool:
    # Where a pass has anchors, sums and products alone say little.
    least = LEAST_MATCHED * 2 if anchors else LEAST_MATCHED
    return len(matched) >= least or any(node.op_type in anchors for node in matched)


def _distance(miss: NearMiss) -> tuple[bool, float]:
    return not miss.declined, -len(miss.matched_nodes) / max(miss.pattern_nodes, 1)


class _Best:
    """Keeps the failure that came furthest; later ones of equal depth are no nearer.

    `passed_over`: that far the check of a variable said no, which is how a pass says that a place is none of its
    business (it declines the others).
    """

    def __init__(self) -> None:
        self.nodes: dict[NodePattern, ir.Node] = {}
        self.item: Any = None
        self.why: str = ""
        self.passed_over = False

    def __call__(self, nodes: dict[NodePattern, ir.Node], pattern: Any, item: Any, why: Callable[[], str]) -> None:
        refused = isinstance(pattern, VarPattern) and pattern.check is not None and item is not None
        if not self.why or len(nodes) > len(self.nodes):
            self.passed_over = refused
            # The reason reads bindings that backtracking undoes, so it is formatted now.
            self.nodes, self.item, self.why = nodes, item, why()
        elif len(nodes) == len(self.nodes):
            self.passed_over |= refused


def _examine(
    rule: CompiledRule, site: Site, node: ir.Node, taken: set[ir.Node]
) -> tuple[NearMiss, tuple[ir.Node, ...]] | None:
    """The miss of one rule at one node with what matched; None, with its nodes added to `taken`, if it fires there."""
    root = rule.pattern.roots[0]
    if not root.accepts(node.op_type) or not root.accepts_domain(node.domain):
        return None
    best = _Best()
    matcher = Matcher(rule.pattern, site.model.graph.opset_imports, best)
    declined: tuple[NearMiss, tuple[ir.Node, ...]] | None = None
    name, count = label(node), len(rule.pattern.nodes)
    for bound in matcher.matches(node, Match(rule, site, node)):
        match = Match(rule, site, node, bound)
        builder = Builder(rule.rule.name, match.model.graph.opset_imports)
        try:
            propose(rule, match, builder)
        except Decline as decline:
            if declined is None:
                matched = tuple(label(n) for n in match.nodes)
                declined = NearMiss(rule.rule.name, name, matched, decline.reason, count, name, True), match.nodes
            continue
        finally:
            builder.discard()
        taken.update(match.nodes)
        return None
    if declined is not None or best.passed_over:
        return declined
    nodes = tuple(dict.fromkeys(best.nodes.values()))
    matched = tuple(label(n) for n in nodes)
    return NearMiss(rule.rule.name, name, matched, best.why, count, label(best.item) or name), nodes


def _parts(
    rule: CompiledRule, site: Site, taken: set[ir.Node], covered: set[ir.Node]
) -> Iterator[tuple[ir.Node, NearMiss]]:
    """Places where the pattern matches up to an inner operator, whose result then goes elsewhere than expected."""
    root = rule.pattern.roots[0]
    parts = [(q, pattern_slice(q)) for q in rule.pattern.slices[root] if q is not root]
    parts = [(q, inner) for q, inner in parts if len(inner) >= _LEAST_PART]
    by_op: dict[str, list[ir.Node]] = {}
    for node in site.graph if parts else ():
        by_op.setdefault(node.op_type, []).append(node)
    for q, inner in sorted(parts, key=lambda part: -len(part[1])):
        part = CompiledPattern(rule.pattern.name, (q,), (), inner, {q: inner})
        matcher = Matcher(part, site.model.graph.opset_imports)
        expected = " or ".join(sorted({str(n) for n in rule.pattern.slices[root] if _reads(n, q)}))
        for node in by_op.get(q.op or "", ()):
            bound = None if node in covered or node in taken else next(matcher.matches(node, None), None)
            if bound is None:
                continue
            nodes = tuple(dict.fromkeys(n for k, n in bound.items() if isinstance(k, NodePattern)))
            if len(nodes) < _LEAST_PART or any(n in taken for n in nodes):
                continue
            covered.update(nodes)
            value = node.outputs[0]
            readers = [f"{u.op_type} '{label(u)}'" for u in value.consumers()][:_MOST_READERS]
            readers += ["an output of the graph"] * value.is_graph_output()
            why = f"'{value.name}' matches up to {node.op_type}, and is read by {', '.join(readers) or 'nothing'}"
            matched = tuple(label(n) for n in nodes)
            yield (
                node,
                NearMiss(
                    rule.rule.name,
                    label(node),
                    matched,
                    f"{why}; expected {expected}",
                    len(rule.pattern.nodes),
                    value.name or "",
                ),
            )


def _reads(node: NodePattern, inner: NodePattern) -> bool:
    """Whether an operator of the pattern takes the result of another one as an operand."""
    stack = list(node.inputs)
    while stack:
        value = stack.pop()
        if isinstance(value, OutPattern) and value.node is inner:
            return True
        if isinstance(value, OrPattern):
            stack += value.alternatives
    return False


def label(item: Any) -> str:
    """How to call a node or value in a message."""
    if isinstance(item, tuple):
        item = item[0]
    if isinstance(item, ir.Node):
        return describe_node(item)
    return item.name or "" if isinstance(item, ir.Value) else ""
