"""The matcher: finds a compiled pattern at a node, trying both operand orders of commutative operators.

Matching is a depth-first search over a list of goals ("this pattern must equal this graph value") with an undo
trail. Where several things are possible (operand orders, alternatives of an ``OrValue``, consumers of a shared
value) a choice point is kept, so a wrong early choice is taken back, and further matches can be asked for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from planish.passes.pattern import (
    AnyPattern,
    CompiledPattern,
    ConstPattern,
    NodePattern,
    OrPattern,
    OutPattern,
    ValuePattern,
    VarPattern,
    attribute_default,
    attribute_matches,
)
from planish.passes.values import constant_problem, describe, describe_patterns, describe_values, users

#: Called where matching stops: (operator calls bound so far, the pattern that failed, the node or value, why).
#: `why` is formatted only when called.
Trace = Callable[[dict[NodePattern, ir.Node], Any, Any, Callable[[], str]], None]

_FAIL: Any = object()
_MOST_STEPS = 5_000  # goals tried at one root; a pattern needs some dozens
_MOST_CONSUMERS = 64  # of a shared value, among which another output of a pattern is looked for


class Matcher:
    """Matches one pattern in the graphs of one model.

    Args:
        pattern: what to look for.
        opsets: opset imports of the model; defaults of attributes depend on them.
        trace: told about every failure; leave it out where nobody reads it.
    """

    def __init__(self, pattern: CompiledPattern, opsets: dict[str, int], trace: Trace | None = None) -> None:
        self.pattern, self.opsets, self.trace = pattern, opsets, trace

    def screen(self, node: ir.Node) -> bool:
        """A quick test that rejects most nodes: are the operands of the root what the pattern expects?"""
        pattern = self.pattern.roots[0]
        given = node.inputs
        if pattern.commutative:
            return len(given) == len(pattern.inputs) and all(
                any(_plausible(p, v) for v in given) for p in pattern.inputs
            )
        return all(map(_plausible, pattern.inputs, given))

    def matches(self, root: ir.Node, context: Any = None) -> Iterator[dict[Any, Any]]:
        """Yields the bindings of every match whose first root is `root`.

        A binding maps names of variables to values (or attributes, or tags), and NodePattern to the graph node.
        `context` is handed to the ``_check`` functions of the pattern.
        """
        yield from _Search(self, root, context).run()


class _Search:
    def __init__(self, matcher: Matcher, root: ir.Node, context: Any) -> None:
        self.pattern, self.opsets, self.trace = matcher.pattern, matcher.opsets, matcher.trace
        self.root, self.graph, self.context = root, root.graph, context
        self.bound: dict[Any, Any] = {}
        self.trail: list[Any] = []
        self.choices: list[tuple[Iterator[Any], int]] = []

    def run(self) -> Iterator[dict[Any, Any]]:
        goals: Any = (self.pattern.roots[0], self.root, None)
        steps = 0
        while True:
            while goals is not None and goals is not _FAIL:
                goals = self._step(*goals)
                steps += 1
            if goals is None:
                goals = self._next_root()
                if goals is None:
                    yield dict(self.bound)
                    goals = _FAIL
            if goals is _FAIL:
                goals = self._backtrack()
                if goals is _FAIL or steps > _MOST_STEPS:
                    return

    def _backtrack(self) -> Any:
        while self.choices:
            alternatives, mark = self.choices[-1]
            while len(self.trail) > mark:
                del self.bound[self.trail.pop()]
            goals = next(alternatives, _FAIL)
            if goals is not _FAIL:
                return goals
            self.choices.pop()
        return _FAIL

    def _choose(self, alternatives: list[Any]) -> Any:
        """Continues with the first alternative and remembers the others."""
        if len(alternatives) > 1:
            self.choices.append((iter(alternatives[1:]), len(self.trail)))
        return alternatives[0]

    def _fail(self, pattern: Any, item: Any, why: Callable[[], str]) -> Any:
        if self.trace is not None:
            nodes = {k: v for k, v in self.bound.items() if isinstance(k, NodePattern)}
            self.trace(nodes, pattern, item, why)
        return _FAIL

    def _bind(self, key: Any, item: Any) -> bool:
        if key in self.bound:
            known = self.bound[key]
            return known is item or (isinstance(item, ir.Attr) and known == item)
        self.bound[key] = item
        self.trail.append(key)
        return True

    def _bind_value(self, pattern: Any, name: str | None, value: Any) -> bool:
        if name is None or self._bind(name, value):
            return True
        self._fail(pattern, value, lambda: f"{name} is {describe(self.bound.get(name))}, found {describe(value)}")
        return False

    def _step(self, pattern: Any, item: Any, rest: Any) -> Any:
        kind = type(pattern)
        if kind is VarPattern:
            if item is None and not pattern.optional:
                return self._fail(pattern, item, lambda: f"an input is absent where {pattern} is expected")
            if not self._bind_value(pattern, pattern.name, item):
                return _FAIL
            if pattern.check is not None and not pattern.check(self.context, item):
                return self._fail(pattern, item, lambda: f"{describe(item)} fails the check of {pattern}")
            return rest
        if kind is OutPattern:
            return self._output(pattern, item, rest)
        if kind is NodePattern:
            return self._node(pattern, item, rest)
        if kind is ConstPattern:
            problem = constant_problem(pattern, item)
            return rest if problem is None else self._fail(pattern, item, problem)
        if kind is OrPattern:
            return self._either(pattern, item, rest)
        if kind is AnyPattern:
            return rest
        # A tag to bind: (name, tag).
        return rest if self._bind(pattern[0], pattern[1]) else _FAIL

    def _either(self, pattern: OrPattern, item: Any, rest: Any) -> Any:
        if not self._bind_value(pattern, pattern.name, item):
            return _FAIL
        goals = []
        for alternative, tag in zip(pattern.alternatives, pattern.tags, strict=True):
            if _plausible(alternative, item):
                after = ((pattern.tag_var, tag), None, rest) if pattern.tag_var else rest
                goals.append((alternative, item, after))
        if not goals:
            return self._fail(pattern, item, lambda: f"{describe(item)} is none of: {pattern}")
        return self._choose(goals)

    def _output(self, pattern: OutPattern, value: ir.Value | None, rest: Any) -> Any:
        if value is None:
            return self._fail(pattern, value, lambda: f"an input is absent where {pattern} is expected")
        node = value.producer()
        if node is None:
            return self._fail(pattern, value, lambda: f"{describe(value)} is not computed; expected {pattern}")
        if value.index() != pattern.index:
            return self._fail(
                pattern, value, lambda: f"output {value.index()} of {describe(node)}; expected {pattern.index}"
            )
        if node.graph is not self.graph:
            return self._fail(pattern, node, lambda: f"{describe(node)} is in another graph than the root")
        return self._node(pattern.node, node, rest)

    def _node(self, pattern: NodePattern, node: ir.Node, rest: Any) -> Any:
        known = self.bound.get(pattern)
        if known is not None:
            if known is node:
                return rest
            return self._fail(pattern, node, lambda: f"{pattern} is already {describe(known)}")
        if not _same_op(pattern, node):
            return self._fail(pattern, node, lambda: f"expected {pattern}, found {describe(node)}")
        given, wanted = list(node.inputs), pattern.inputs
        while len(given) > len(wanted) and given[-1] is None:
            given.pop()
        if len(given) > len(wanted) and not pattern.other_inputs:
            return self._fail(
                pattern, node, lambda: f"{describe(node)} has {len(given)} inputs; expected {len(wanted)}"
            )
        if not self._attributes(pattern, node):
            return _FAIL
        if pattern.check is not None and not pattern.check(self.context, node):
            return self._fail(pattern, node, lambda: f"{describe(node)} fails the check of {pattern}")
        self._bind(pattern, node)
        for index, name in enumerate(pattern.outputs):
            if index >= len(node.outputs):
                return self._fail(pattern, node, lambda: f"{describe(node)} has {len(node.outputs)} outputs")
            if name is not None and not self._bind_value(pattern, name, node.outputs[index]):
                return _FAIL
        return self._operands(pattern, node, given, rest)

    def _operands(self, pattern: NodePattern, node: ir.Node, given: list[Any], rest: Any) -> Any:
        wanted = pattern.inputs
        given = given + [None] * (len(wanted) - len(given))
        orders: Any = [given]
        if pattern.commutative and len(given) == len(wanted):
            orders = itertools.permutations(given)
        possible = [order for order in orders if all(map(_plausible, wanted, order))]
        if not possible:
            return self._fail(pattern, node, functools.partial(_wrong_operands, node, wanted, given))
        goals = []
        for order in possible:
            chain = rest
            for operand, value in zip(reversed(wanted), reversed(order[: len(wanted)]), strict=True):
                if operand is not None:
                    if type(operand) is ConstPattern:
                        value = (value, order)
                    chain = (operand, value, chain)
            goals.append(chain)
        return self._choose(goals)

    def _attributes(self, pattern: NodePattern, node: ir.Node) -> bool:
        if not all(self._attribute(pattern, node, name, wanted) for name, wanted in pattern.attributes):
            return False
        if pattern.other_attributes:
            return True
        others = sorted(set(node.attributes) - {name for name, _ in pattern.attributes})
        if others:
            self._fail(pattern, node, lambda: f"{describe(node)} has the attribute '{others[0]}'")
        return not others

    def _attribute(self, pattern: NodePattern, node: ir.Node, name: str, wanted: Any) -> bool:
        given = node.attributes.get(name)
        found = given
        if given is None:
            version = node.version or self.opsets.get(node.domain, 1)
            found = attribute_default(node.domain, node.op_type, version, name)
        if found is None and not wanted.can_match_none:
            self._fail(pattern, node, lambda: f"{describe(node)} has no attribute '{name}'")
            return False
        if found is not None and not attribute_matches(wanted, found):
            value = found.value
            self._fail(pattern, node, lambda: f"{describe(node)}: expected {name}={wanted}, found {value}")
            return False
        return wanted.name is None or self._bind_value(pattern, wanted.name, found)

    def _next_root(self) -> Any:
        """Goals for a root that is not bound yet: consumers of a value that it shares with what is bound.

        Every such root must have a candidate before one of them is tried, or a shared value with many consumers
        would be searched over and over for what it does not feed.
        """
        goals: list[Any] = []
        for root in self.pattern.roots[1:]:
            if root in self.bound:
                continue
            found = self._candidates(root)
            if found == []:
                why = functools.partial("no {} beside it shares a value with the match".format, root)
                return self._fail(root, self.root, why)
            goals = goals or found or []
        return self._choose(goals) if goals else None

    def _candidates(self, root: NodePattern) -> list[Any] | None:
        """Goals for a call of the root's slice that a bound value feeds; None while no value of it is bound."""
        for node in self.pattern.slices[root]:
            shared = next((v for v in map(self._bound_value, node.inputs) if v is not None), None)
            if node in self.bound or shared is None:
                continue
            taken = {id(n) for k, n in self.bound.items() if isinstance(k, NodePattern)}
            # A mask or a shape may feed thousands of nodes; looking at all of them from each is quadratic.
            return [
                (node, consumer, None)
                for consumer in itertools.islice(users(shared), _MOST_CONSUMERS)
                if id(consumer) not in taken and consumer.graph is self.graph and _same_op(node, consumer)
            ]
        return None

    def _bound_value(self, pattern: ValuePattern | None) -> ir.Value | None:
        if isinstance(pattern, VarPattern) and pattern.name is not None:
            value = self.bound.get(pattern.name)
            return value if isinstance(value, ir.Value) else None
        if isinstance(pattern, OutPattern):
            node = self.bound.get(pattern.node)
            return node.outputs[pattern.index] if node is not None else None
        return None


def _wrong_operands(node: ir.Node, wanted: Any, given: Any) -> str:
    return f"operands of {describe(node)}: expected {describe_patterns(wanted)}; found {describe_values(given)}"


def _same_op(pattern: NodePattern, node: ir.Node) -> bool:
    named = node.op_type == pattern.op if pattern.op is not None else pattern.accepts(node.op_type)
    if not named:
        return False
    return node.domain == pattern.domain if pattern.domain is not None else pattern.accepts_domain(node.domain)


def _plausible(pattern: Any, value: Any) -> bool:
    """False only where `pattern` can not match `value`; looks no further than the producer's operator."""
    kind = type(pattern)
    if kind is VarPattern:
        return value is not None or pattern.optional
    if pattern is None:
        return value is None
    if kind is AnyPattern:
        return True
    if kind is OrPattern:
        return any(_plausible(alternative, value) for alternative in pattern.alternatives)
    if value is None:
        return False
    if kind is OutPattern:
        node = value.producer()
        return node is not None and _same_op(pattern.node, node)
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")
