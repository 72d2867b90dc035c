"""The driver: applies the rules of a pass to every graph of a program until none fires any more.

Rules are indexed by the operator of their root, so a sweep costs one dictionary look-up for a node that no rule
starts at. A sweep visits nodes from the end of the graph to its start; what a firing creates or feeds is visited
at once; sweeps repeat until one fires nothing, and the declines of that last sweep are the ones reported.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.errors import PlanishError
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import Decline, PassContext, PassResult
from planish.passes.builder import Builder, Constants
from planish.passes.matcher import Matcher
from planish.passes.names import Names
from planish.passes.opset import needs_opset
from planish.passes.replace import Replacer
from planish.passes.rule import CompiledRule, Match, Rule, Site, as_values
from planish.passes.values import users

_MOST_ALTERNATIVES = 64  # matches at one root (operand orders) that are offered to a check
_MOST_CONSUMERS = 64  # consumers of a new value that are visited at once; the next sweep sees the others


@dataclass
class FiringLog:
    """What fired, in order; with `limit`, nothing fires after that many. Bisection reads and sets it."""

    limit: int | None = None
    fired: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.limit is not None and len(self.fired) >= self.limit


_log: ContextVar[FiringLog | None] = ContextVar("planish_firings", default=None)


@contextmanager
def log_firings(limit: int | None = None) -> Iterator[FiringLog]:
    """Records (rule, root, matched nodes) of every firing inside the block; stops firing after `limit`."""
    log = FiringLog(limit)
    token = _log.set(log)
    try:
        yield log
    finally:
        _log.reset(token)


def apply_rules(pass_name: str, rules: Sequence[Rule], program: Program, ctx: PassContext) -> PassResult:
    """Applies rules to all entries and subgraphs of a program (bodies of functions are left alone).

    Raises:
        PlanishError: a rule does not stop firing, or builds something that can not be; the message names it.
    """
    compiled = [CompiledRule.of(rule) for rule in rules]
    names = Names(program)
    constants = Constants(program, names)
    result = PassResult(False)
    for model in program.entries.values():
        for graph in list(model.graphs()):
            work = _GraphWork(pass_name, compiled, Site(program, model, graph, ctx.target), names, constants)
            result.fired += work.run()
            result.declined += work.declined.values()
    result.modified = result.fired > 0
    return result


class _GraphWork:
    """The rules at work on one graph."""

    def __init__(
        self, pass_name: str, rules: Sequence[CompiledRule], site: Site, names: Names, constants: Constants
    ) -> None:
        self.pass_name, self.site = pass_name, site
        self.replacer = Replacer(pass_name, site, names, constants)
        self.declined: dict[tuple[str, int], Declined] = {}
        self.opsets = site.model.graph.opset_imports
        self.by_op: dict[tuple[str, str], list[tuple[CompiledRule, Matcher]]] = {}
        self.anywhere: list[tuple[CompiledRule, Matcher]] = []
        for rule in rules:
            root = rule.pattern.roots[0]
            entry = (rule, Matcher(rule.pattern, self.opsets))
            if root.op is None or root.domain is None:
                self.anywhere.append(entry)
            else:
                self.by_op.setdefault((root.domain, root.op), []).append(entry)
        self.fired = 0
        self.growing: dict[str, int] = {}
        self.recent: deque[str] = deque(maxlen=16)
        # Every firing that does not shrink the graph spends from this; those that shrink it end by themselves.
        self.budget = 100 + 2 * len(site.graph)

    def run(self) -> int:
        while self._sweep():
            pass
        return self.fired

    def _sweep(self) -> bool:
        self.declined.clear()
        log, before = _log.get(), self.fired
        if self.anywhere:
            stack = list(self.site.graph)
        else:
            by_op = self.by_op
            stack = [node for node in self.site.graph if (node.domain, node.op_type) in by_op]
        while stack:
            node = stack.pop()
            if node.graph is not self.site.graph:
                continue  # replaced since it was put there
            if log is not None and log.full:
                return False
            touched = self._visit(node)
            if touched:
                stack += touched
        return self.fired > before

    def _visit(self, node: ir.Node) -> list[ir.Node]:
        candidates = self.by_op.get((node.domain, node.op_type), [])
        for rule, matcher in candidates + self.anywhere if self.anywhere else candidates:
            if matcher.screen(node):
                touched = self._try(rule, matcher, node)
                if touched is not None:
                    return touched
        return []

    def _try(self, rule: CompiledRule, matcher: Matcher, node: ir.Node) -> list[ir.Node] | None:
        """Fires the rule at `node` if it can; returns what to visit next, or None if it did not fire."""
        for count, bound in enumerate(matcher.matches(node, Match(rule, self.site, node))):
            match = Match(rule, self.site, node, bound)
            builder = Builder(rule.rule.name, self.opsets)
            try:
                values = propose(rule, match, builder)
                plan = self.replacer.plan(rule.rule, match, builder, values)
            except Decline as decline:
                builder.discard()
                # Operand orders are one site: the reason of the first is kept.
                key = (rule.rule.name, id(node))
                self.declined.setdefault(key, Declined(rule.rule.name, describe_node(node), decline.reason))
                if count + 1 >= _MOST_ALTERNATIVES:
                    return None
                continue
            matched = tuple(map(describe_node, match.nodes))
            change = self.replacer.carry_out(plan)
            self._count(rule.rule, matched, change)
            return self._neighbours(plan.new_nodes)
        return None

    def _count(self, rule: Rule, matched: tuple[str, ...], change: int) -> None:
        self.fired += 1
        self.recent.append(rule.name)
        log = _log.get()
        if log is not None:
            log.fired.append((rule.name, matched[0], matched))
        if change < 0:
            return
        spent = self.growing[rule.name] = self.growing.get(rule.name, 0) + 1
        if spent <= self.budget:
            return
        others = sorted(set(self.recent) - {rule.name})
        cause = f"it and {', '.join(others)} undo each other" if others else "its output matches its own pattern"
        raise PlanishError(
            f"pass '{self.pass_name}': rule '{rule.name}' fired {spent} times without making the graph smaller "
            f"(limit {self.budget}), last at '{matched[0]}'; most likely {cause}."
        )

    def _neighbours(self, new_nodes: Sequence[ir.Node]) -> list[ir.Node]:
        nearby: dict[ir.Node, None] = {}
        for node in new_nodes:
            for value in node.outputs:
                for consumer in itertools.islice(users(value), _MOST_CONSUMERS):
                    nearby.setdefault(consumer)
        nearby.update(dict.fromkeys(new_nodes))
        # The last is visited first: what was just built, then its consumers.
        return [n for n in nearby if self.anywhere or (n.domain, n.op_type) in self.by_op]


def propose(rule: CompiledRule, match: Match, builder: Builder) -> Sequence[ir.Value]:
    """Checks a match and builds the replacement, without touching the graph.

    Raises:
        Decline: the rule must not act here; the reason says why.
    """
    opset = match.opset
    if opset < rule.rule.min_opset:
        raise Decline(needs_opset(rule.rule.min_opset, opset))
    if rule.rule.remove_nodes:
        require_removable(match)
    if rule.rule.check is not None and rule.rule.check(match) is False:
        raise Decline("its check returned False")
    return as_values(rule.rule.rewrite(builder, **rule.arguments(match)), rule.rule, len(match.outputs))


def require_removable(match: Match) -> None:
    """Declines a match of which an inner value is needed by something else."""
    nodes, outputs = set(match.nodes), set(match.outputs)
    for node in match.nodes:
        for value in node.outputs:
            if value in outputs:
                continue
            if value.is_graph_output():
                raise Decline(f"inner value '{value.name}' is an output of the graph")
            for user in users(value):
                if user not in nodes:
                    raise Decline(f"inner value '{value.name}' is also used by {user.op_type} '{user.name}'")


def describe_node(node: ir.Node) -> str:
    """The name of a node, or what it computes if it has none."""
    return node.name or f"{node.op_type} of {node.outputs[0].name if node.outputs else 'nothing'}"


__all__ = ["FiringLog", "apply_rules", "describe_node", "log_firings", "propose", "require_removable"]
