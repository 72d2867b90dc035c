"""A rule (what to look for, when to act, what to put there) and a match (where it was found)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.errors import PlanishError, did_you_mean
from planish.ir.graphs import constant_tensor, dims_of
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.pattern import CompiledPattern, NodePattern, OrPattern, OutPattern, VarPattern, compile_pattern


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: shown in ledgers and declines.
        pattern: ``pattern(op, x, ...)`` builds what to look for.
        rewrite: ``rewrite(op, x, ...)`` builds the replacement and returns one value per pattern output; its
            parameters are named after variables of the pattern; one named ``match`` receives the Match.
        check: ``check(match)`` raises Decline("reason") where the rule must not act.
        min_opset: the opset that the model must import at least.
        remove_nodes: True: inner values of the match must have no other use, else the site is declined.
            False: matched nodes that something else still uses stay.
    """

    name: str
    pattern: Callable[..., Any]
    rewrite: Callable[..., Any]
    check: Callable[[Match], Any] | None = None
    min_opset: int = 1
    remove_nodes: bool = True


class Match:
    """Where a rule was found.

    Attributes:
        root: the node that produces the first output of the pattern.
        nodes: every matched node, each once, root first.
        values: variables of the pattern by name: values, attributes, tags; None for what was absent.
        outputs: the values that the replacement takes over, in the pattern's order.
        model, graph, program, target: where it was found.
    """

    def __init__(self, rule: CompiledRule, site: Site, root: ir.Node, bound: dict[Any, Any] | None = None) -> None:
        self.rule, self.root = rule.rule, root
        self.model, self.program, self.target, self.graph = site.model, site.program, site.target, site.graph
        self.values: dict[str, Any] = dict.fromkeys(rule.variables)
        self.nodes: tuple[ir.Node, ...] = (root,)
        self.outputs: tuple[ir.Value, ...] = ()
        if bound is not None:
            self.values.update((k, v) for k, v in bound.items() if isinstance(k, str))
            by_pattern = {k: v for k, v in bound.items() if isinstance(k, NodePattern)}
            self.nodes = tuple(dict.fromkeys(by_pattern.values()))
            self.outputs = tuple(by_pattern[o.node].outputs[o.index] for o in rule.pattern.outputs)

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            hint = did_you_mean(name, self.values)
            raise PlanishError(f"rule '{self.rule.name}': its pattern has no variable '{name}'.{hint}")
        return self.values[name]

    @property
    def output(self) -> ir.Value:
        """The first replaced value."""
        return self.outputs[0]

    @property
    def opset(self) -> int:
        """The version of the default domain that the model imports."""
        return self.model.graph.opset_imports.get("", 1)

    def _value(self, item: str | ir.Value | None) -> ir.Value | None:
        found = self[item] if isinstance(item, str) else item
        return found if isinstance(found, ir.Value) else None

    def constant(self, item: str | ir.Value | None) -> np.ndarray | None:
        """The contents of a variable or value that can not change at run time, else None. Do not write to it."""
        tensor = constant_tensor(self._value(item))
        return None if tensor is None else tensor.numpy()

    def is_constant(self, item: str | ir.Value | None) -> bool:
        """Like ``constant(...) is not None``, without reading the contents."""
        return constant_tensor(self._value(item)) is not None

    def scalar(self, item: str | ir.Value | None) -> float | int | bool | None:
        """The number that a constant of one element holds, else None."""
        tensor = constant_tensor(self._value(item))
        if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
            return None
        number: float | int | bool = tensor.numpy().item()
        return number

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute variable, or `default` if the attribute was absent."""
        found = self[name]
        return found.value if isinstance(found, ir.Attr) else default if found is None else found

    def shape(self, item: str | ir.Value | None) -> tuple[int | str | None, ...] | None:
        """Dimensions: ints, symbol names, None where unknown; None as a whole if the rank is unknown."""
        return dims_of(self._value(item))

    def rank(self, item: str | ir.Value | None) -> int | None:
        dims = self.shape(item)
        return None if dims is None else len(dims)

    def dtype(self, item: str | ir.Value | None) -> ir.DataType | None:
        value = self._value(item)
        return None if value is None else value.dtype


@dataclass
class Site:
    """Where the driver is working: what a Match says about its surroundings."""

    program: Program
    model: ir.Model
    graph: ir.Graph
    target: Target


@dataclass(eq=False)
class CompiledRule:
    """A rule with its compiled pattern, and the way to call its `rewrite`."""

    rule: Rule
    pattern: CompiledPattern
    variables: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    takes_all: bool = False

    @classmethod
    def of(cls, rule: Rule) -> CompiledRule:
        """Compiles a rule.

        Raises:
            PlanishError: the pattern is not supported, or `rewrite` has a parameter that the pattern does not bind.
        """
        pattern = compile_pattern(rule.pattern, rule.name)
        compiled = cls(rule, pattern, _variables(rule, pattern))
        parameters = list(inspect.signature(rule.rewrite).parameters.values())[1:]
        compiled.takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        named = [
            p for p in parameters if p.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        ]
        for parameter in named:
            if (
                parameter.name not in compiled.variables
                and parameter.name != "match"
                and (parameter.default is inspect.Parameter.empty)
            ):
                hint = did_you_mean(parameter.name, compiled.variables)
                raise PlanishError(
                    f"rule '{rule.name}': rewrite wants '{parameter.name}', which its pattern does not bind.{hint}"
                )
        known = {*compiled.variables, "match"}
        compiled.parameters = tuple(p.name for p in named if p.name in known)
        return compiled

    def arguments(self, match: Match) -> dict[str, Any]:
        """The keyword arguments of `rewrite` for a match."""
        names = self.variables if self.takes_all else self.parameters
        found = {name: match.values[name] for name in names if name in match.values}
        if "match" in self.parameters and "match" not in self.variables:
            found["match"] = match
        return found


def _variables(rule: Rule, pattern: CompiledPattern) -> tuple[str, ...]:
    names: dict[str, None] = dict.fromkeys(list(inspect.signature(rule.pattern).parameters)[1:])

    def visit(value: Any) -> None:
        if isinstance(value, VarPattern | OrPattern | OutPattern) and value.name:
            names.setdefault(value.name)
        if isinstance(value, OrPattern):
            if value.tag_var:
                names.setdefault(value.tag_var)
            for alternative in value.alternatives:
                visit(alternative)

    for node in pattern.nodes:
        for value in node.inputs:
            visit(value)
        for name in node.outputs:
            if name:
                names.setdefault(name)
        for _, attribute in node.attributes:
            if attribute.name:
                names.setdefault(attribute.name)
    return tuple(names)


def as_values(result: Any, rule: Rule, count: int) -> Sequence[ir.Value]:
    """What `rewrite` returned, as one value per pattern output.

    Raises:
        PlanishError: it returned something else.
    """
    values = list(result) if isinstance(result, tuple | list) else [result]
    if len(values) != count or not all(isinstance(v, ir.Value) for v in values):
        raise PlanishError(
            f"rule '{rule.name}': rewrite returned {len(values)} values "
            f"({', '.join(type(v).__name__ for v in values)}); its pattern has {count} outputs."
        )
    return values


__all__ = ["CompiledRule", "Match", "Rule", "Site", "as_values"]
