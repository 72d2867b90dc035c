"""Patterns: onnxscript's pattern language, compiled for our matcher. The one module that knows onnxscript's classes.

A pattern is a Python function ``pattern(op, x, y, ...)`` that builds the expression to look for. What is understood:
operators and calls (``op.Add(x, 1.0)``, ``x / y``), attributes as constants or variables, ``_outputs``,
``_domain``, ``_allow_other_inputs``, ``_allow_other_attributes``, ``_check``, :func:`Constant`, :func:`Var`,
:func:`AttrVar`, :func:`OrValue` and ``ANY_VALUE``. A function that returns several values makes a pattern with
several outputs; outputs of different nodes must share a value, so that one can be found from the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from planish.ir.errors import PlanishError

__all__ = [
    "AttrVar",
    "CompiledPattern",
    "Constant",
    "OrValue",
    "Var",
    "any_value",
    "compile_pattern",
    "pattern_slice",
]

#: Operators whose operands may be given in any order (the variadic ones for as many operands as they have).
COMMUTATIVE = frozenset(
    ("Add", "Mul", "And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Max", "Min", "Mean", "Sum")
)
_MOST_PERMUTED = 4  # operands of a variadic operator that are tried in every order


def _language() -> Any:
    """onnxscript's pattern classes; imported at first use, since that costs half a second."""
    import onnxscript.rewriter._pattern_ir as language

    return language


def Var(name: str, *, check: Callable[..., bool] | None = None, optional: bool = False) -> Any:
    """A pattern variable; `check(match, value)` restricts it; `optional` lets it match an absent input."""
    return _language().Var(name, check=check, can_match_none=optional)


def AttrVar(name: str, *, optional: bool = False) -> Any:
    """An attribute variable; `optional` lets it match an attribute that is absent and has no default."""
    return _language().AttrVar(name, can_match_none=optional)


def Constant(value: Any, rel_tol: float | None = None) -> Any:
    """A number or list of numbers; without `rel_tol` the tolerance suits the dtype found in the graph."""
    language = _language()
    return language.Constant(value) if rel_tol is None else language.Constant(value, rel_tol=rel_tol)


def OrValue(
    values: Sequence[Any], name: str | None = None, tag_var: str | None = None, tag_values: Sequence[Any] | None = None
) -> Any:
    """Any one of `values`, tried in order; `tag_var` is bound to the tag (or index) of the one that matched."""
    return _language().OrValue(values, name, tag_var, tag_values)


def any_value() -> Any:
    """Matches any value, without binding it."""
    return _language().ANY_VALUE


@dataclass(eq=False, slots=True)
class VarPattern:
    name: str | None
    check: Callable[..., Any] | None = None
    optional: bool = False

    def __str__(self) -> str:
        return self.name or "a value"


@dataclass(eq=False, slots=True)
class AnyPattern:
    def __str__(self) -> str:
        return "anything"


@dataclass(eq=False, slots=True)
class ConstPattern:
    value: float | int | bool | list[float] | list[int]
    rel_tol: float | None = None

    def __str__(self) -> str:
        return f"the constant {self.value}"


@dataclass(eq=False, slots=True)
class OutPattern:
    node: NodePattern
    index: int
    name: str | None

    def __str__(self) -> str:
        return f"an output of {self.node}"


@dataclass(eq=False, slots=True)
class OrPattern:
    alternatives: tuple[ValuePattern, ...]
    tags: tuple[Any, ...]
    name: str | None
    tag_var: str | None

    def __str__(self) -> str:
        return " or ".join(str(a) for a in self.alternatives)


ValuePattern = VarPattern | AnyPattern | ConstPattern | OutPattern | OrPattern


@dataclass(eq=False, slots=True)
class NodePattern:
    """One operator call of a pattern. `op` is None when the name is a prefix (then `accepts` decides)."""

    op: str | None
    accepts: Callable[[str], bool]
    domain: str | None
    accepts_domain: Callable[[str], bool]
    inputs: tuple[ValuePattern | None, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()
    outputs: tuple[str | None, ...] = ()
    other_attributes: bool = True
    other_inputs: bool = False
    check: Callable[..., Any] | None = None
    commutative: bool = False
    label: str = ""

    def __str__(self) -> str:
        return self.label


@dataclass(eq=False, slots=True)
class CompiledPattern:
    """A pattern ready to match.

    Attributes:
        roots: the operator calls that no other call of the pattern consumes; matching starts at the first.
        outputs: what the pattern returns, in order.
        nodes: every operator call.
        slices: for each root the calls that it depends on, itself included.
    """

    name: str
    roots: tuple[NodePattern, ...]
    outputs: tuple[OutPattern, ...]
    nodes: tuple[NodePattern, ...]
    slices: dict[NodePattern, tuple[NodePattern, ...]] = field(default_factory=dict)


def compile_pattern(function: Callable[..., Any], name: str) -> CompiledPattern:
    """Compiles a pattern function.

    Raises:
        PlanishError: the function uses something that this matcher does not understand; the message names the rule.
    """
    language = _language()
    try:
        graph = language._to_graph_pattern(function)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise PlanishError(f"rule '{name}': its pattern does not build: {error}") from error
    return _Compiler(name, language).graph(graph)


class _Compiler:
    """Translates onnxscript's pattern graph into the classes above, once per node and value."""

    def __init__(self, name: str, language: Any) -> None:
        self.name, self.language = name, language
        self.nodes: dict[Any, NodePattern] = {}
        self.values: dict[Any, ValuePattern] = {}

    def graph(self, graph: Any) -> CompiledPattern:
        outputs = tuple(self.value(v) for v in graph.outputs)
        for output in outputs:
            if not isinstance(output, OutPattern):
                raise self.error(f"it returns {output}; every returned value must be the output of an operator")
        roots = tuple(self.node(n) for n in graph.output_nodes)
        pattern = CompiledPattern(self.name, roots, outputs, tuple(self.nodes.values()))  # type: ignore[arg-type]
        pattern.slices = {root: pattern_slice(root) for root in roots}
        self._require_connected(pattern)
        return pattern

    def error(self, problem: str) -> PlanishError:
        return PlanishError(f"rule '{self.name}': its pattern is not supported: {problem}.")

    def value(self, value: Any) -> Any:
        if value is None:
            return None
        if value not in self.values:
            self.values[value] = self._value(value)
        return self.values[value]

    def _value(self, value: Any) -> ValuePattern:
        language = self.language
        if isinstance(value, language.AnyValue):
            return AnyPattern()
        if isinstance(value, language.Constant):
            default = type(value)(0)._rel_tol
            return ConstPattern(value.value, None if value._rel_tol == default else value._rel_tol)
        if isinstance(value, language.NodeOutputPattern):
            producer = value.producer()
            if str(producer.op) == "Constant" and producer.op_identifier() is not None:
                return self._constant_call(producer)
            return OutPattern(self.node(producer), value.output_index, value.name)
        if isinstance(value, language.BacktrackingOr):
            alternatives = tuple(self.value(v) for v in value._values)
            return OrPattern(alternatives, tuple(value._tag_values), value.name, value.tag_var)
        if isinstance(value, language.OpIdDispatchOr):
            entries = list(value._op_to_pattern.values())
            alternatives = tuple(self.value(v) for _, v in entries)
            return OrPattern(alternatives, tuple(t for t, _ in entries), value.name, value.tag_var)
        if type(value) in (language.Var, language.ValuePattern):
            return VarPattern(value.name, value.check_method, value.can_match_none)
        raise self.error(f"a value of class {type(value).__name__}")

    def _constant_call(self, producer: Any) -> ConstPattern:
        """``op.Constant(0.5)`` or ``op.Constant(value_float=0.5)``: the number, wherever the graph keeps it."""
        if len(producer.inputs) == 1 and isinstance(producer.inputs[0], self.language.Constant):
            return ConstPattern(producer.inputs[0].value)
        values = [a._value for n, a in producer.attributes.items() if n.startswith("value") and hasattr(a, "_value")]
        if len(values) != 1:
            raise self.error("op.Constant needs one number or list of numbers")
        return ConstPattern(list(values[0]) if isinstance(values[0], list | tuple) else values[0])

    def node(self, node: Any) -> NodePattern:
        if node in self.nodes:
            return self.nodes[node]
        exact = isinstance(node.op, self.language.StringConstantPattern)
        exact_domain = isinstance(node.domain, self.language.StringConstantPattern)
        domain = _normal_domain(str(node.domain)) if exact_domain else None
        op = str(node.op) if exact else None
        compiled = NodePattern(op, node.op.matches, domain, node.domain.matches)
        compiled.inputs = tuple(self.value(v) for v in node.inputs)
        compiled.attributes = tuple(node.attributes.items())
        compiled.outputs = tuple(o.name for o in node.outputs)
        compiled.other_attributes, compiled.other_inputs = node.allow_other_attributes, node.allow_other_inputs
        compiled.check = node.check_method
        compiled.commutative = op in COMMUTATIVE and domain == "" and 2 <= len(compiled.inputs) <= _MOST_PERMUTED
        compiled.label = f"{domain}::{node.op}" if domain else str(node.op)
        # Entered last, so that nodes are listed inputs first.
        self.nodes[node] = compiled
        return compiled

    def _require_connected(self, pattern: CompiledPattern) -> None:
        """Every root after the first must be reachable through a value that is bound by then."""
        names: set[str] = set()
        seen: set[NodePattern] = set()

        def take(nodes: Sequence[NodePattern]) -> None:
            for node in nodes:
                seen.add(node)
                names.update(v.name for v in node.inputs if isinstance(v, VarPattern) and v.name)

        take(pattern.slices[pattern.roots[0]])
        for root in pattern.roots[1:]:
            reach = pattern.slices[root]
            if not any(n in seen or any(_bound(v, names, seen) for v in n.inputs) for n in reach):
                raise self.error(f"its output {root} shares no value with the outputs before it")
            take(reach)


def _bound(value: ValuePattern | None, names: set[str], nodes: set[NodePattern]) -> bool:
    if isinstance(value, VarPattern):
        return value.name in names
    return isinstance(value, OutPattern) and value.node in nodes


def pattern_slice(root: NodePattern) -> tuple[NodePattern, ...]:
    """The calls that `root` depends on, inputs first, `root` last."""
    found: dict[NodePattern, None] = {}

    def visit_value(value: ValuePattern | None) -> None:
        if isinstance(value, OutPattern):
            visit(value.node)
        elif isinstance(value, OrPattern):
            for alternative in value.alternatives:
                visit_value(alternative)

    def visit(node: NodePattern) -> None:
        if node not in found:
            for value in node.inputs:
                visit_value(value)
            found[node] = None

    visit(root)
    return tuple(found)


def _normal_domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def attribute_matches(wanted: Any, found: ir.Attr) -> bool:
    """Whether an attribute of the graph is what the pattern asks for (one of ``NodePattern.attributes``)."""
    expected = getattr(wanted, "_value", None)
    if isinstance(expected, float) and found.type == ir.AttributeType.FLOAT:
        return math.isclose(found.as_float(), expected, rel_tol=1e-6)  # attributes are stored as float32
    return bool(wanted.matches(found))


@functools.lru_cache(maxsize=4096)
def attribute_default(domain: str, op_type: str, version: int, name: str) -> ir.Attr | None:
    """The default of an attribute by the schema of the operator at an opset version, or None."""
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    attribute = schema.attributes.get(name)
    if attribute is None or not attribute.default_value.name:
        return None
    default: ir.Attr = ir.from_proto(attribute.default_value)
    return default
