"""Properties of programs: what passes require and ensure by name, so that they need not name each other.

``shapes``            every value that a node computes has a type and a shape (inference restores it)
``functions-inlined`` no node calls a model-local function
``opset>=N``          every entry imports the default domain at version N or newer
``single-entry``      the program has one entry
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from planish.ir.errors import PlanishError, did_you_mean
from planish.ir.program import Program
from planish.ir.schemas import DIALECT_DOMAIN

_OPSET = re.compile(r"opset>=(\d{1,3})")


@dataclass(frozen=True)
class Property:
    """A named fact about programs.

    Attributes:
        problem: returns what stands against it in a program, or an empty string if it holds.
        establish: brings it about without changing what the program computes; None if only a pass can.
    """

    name: str
    problem: Callable[[Program], str]
    establish: Callable[[Program], None] | None = None


def find_property(name: str) -> Property:
    """The property of that name.

    Raises:
        PlanishError: there is none (with a did-you-mean).
    """
    match = _OPSET.fullmatch(name)
    if match:
        return Property(name, functools.partial(_opset_problem, least=int(match[1])))
    if name not in _PROPERTIES:
        hint = did_you_mean(name, [*_PROPERTIES, "opset>=20"])
        raise PlanishError(f"unknown property '{name}'.{hint} Known: {', '.join(_PROPERTIES)}, opset>=N.")
    return _PROPERTIES[name]


def holds(name: str, program: Program) -> bool:
    """Whether `program` has the property of that name."""
    return not find_property(name).problem(program)


def implies(known: str, wanted: str) -> bool:
    """Whether one property follows from another: ``opset>=23`` implies ``opset>=20``."""
    if known == wanted:
        return True
    one, other = _OPSET.fullmatch(known), _OPSET.fullmatch(wanted)
    return bool(one and other and int(one[1]) >= int(other[1]))


def _opset_problem(program: Program, least: int) -> str:
    for entry, model in program.entries.items():
        version = model.graph.opset_imports.get("", 0)
        if version < least:
            return f"entry '{entry}' imports opset {version}"
    return ""


def _shapes_problem(program: Program) -> str:
    for node in program.nodes():
        for value in node.outputs:
            if (value.type is None or (value.shape is None and isinstance(value.type, ir.TensorType))) and (
                value.uses() or value.is_graph_output()
            ):
                return f"'{value.name}', an output of {node.op_type} '{node.name}', has no shape"
    return ""


def _infer(program: Program) -> None:
    from planish.ir.infer import infer_shapes

    for model in program.entries.values():
        infer_shapes(model)


def _inlined_problem(program: Program) -> str:
    for model in program.entries.values():
        if not model.functions:
            continue
        for node in model.graph.all_nodes():
            if node.op_identifier() in model.functions and node.domain != DIALECT_DOMAIN:
                return f"{node.op_type} '{node.name}' calls a function of the model"
    return ""


def _entries_problem(program: Program) -> str:
    return "" if len(program.entries) == 1 else f"the program has the entries {', '.join(program.entries)}"


_PROPERTIES = {
    p.name: p
    for p in (
        Property("shapes", _shapes_problem, _infer),
        Property("functions-inlined", _inlined_problem),
        Property("single-entry", _entries_problem),
    )
}
