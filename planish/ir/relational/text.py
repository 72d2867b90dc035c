"""The text form of relational programs: printed and parsed.

::

    program gat(x: node(4), W: edge_type(4, 4) weight, a: edge_type(4) weight) {
      z: edge(4) = linear(x@src, W)
      s: edge() = dot(z, a)
      l: edge() = leaky_relu(s, slope=0.2)
      w: edge() = edge_softmax(l, by=dst)
      v: edge(1) = reshape(w, shape=(1,))
      m: edge(4) = mul(z, v)
      y: node(4) = sum(m, over=edge, by=dst)
      return y
    }
"""

from __future__ import annotations

import ast
import re
from typing import Any

from planish.ir.errors import InputError
from planish.ir.relational.domains import DOMAINS, Domain
from planish.ir.relational.inter import Location, Op, Operand, Program, Variable

_VARIABLE = re.compile(r"\s*(\w+)\s*:\s*(\w+)(?:\[(\d+)\])?\(([\d,\s]*)\)\s*(weight)?\s*")
_HEADER = re.compile(r"program\s+(\w+)\s*\((.*)\)\s*\{", re.DOTALL)
_OP = re.compile(r"(.*?)=\s*(\w+)\((.*)\)\s*")
_DOMAIN = re.compile(r"(\w+)(?:\[(\d+)\])?")
_OPERAND = re.compile(r"(\w+)(?:@(src|dst))?")


def format_op(op: Op) -> str:
    """One line of the text form."""
    given = [*map(str, op.operands), *(f"{name}={value!r}" for name, value in op.attrs)]
    if op.over != op.result.domain:
        given.append(f"over={op.over}")
    if op.by:
        given.append(f"by={op.by}")
    return f"{op.result} = {op.kind}({', '.join(given)})"


def format_program(program: Program) -> str:
    """The text form of a program; `parse_program` reads it back to an equal one."""
    arguments = [*map(str, program.inputs), *(f"{w} weight" for w in program.weights)]
    lines = [f"program {program.name}({', '.join(arguments)}) {{"]
    lines += [f"  {format_op(op)}" for op in program.ops]
    return "\n".join([*lines, f"  return {', '.join(program.outputs)}", "}"])


def parse_program(text: str) -> Program:
    """Reads the text form.

    Raises:
        InputError: naming the line that is not understood. What programs must fulfil beyond is left to `verify`.
    """
    lines = [line for line in text.strip().splitlines() if line.strip() and not line.strip().startswith("#")]
    header = _HEADER.fullmatch(lines[0].strip()) if lines else None
    if header is None or lines[-1].strip() != "}":
        raise InputError("a relational program begins with 'program name(arguments) {' and ends with '}'.")
    ops: list[Op] = []
    outputs: tuple[str, ...] = ()
    for number, line in enumerate(lines[1:-1], 2):
        if line.strip().startswith("return "):
            outputs = tuple(name.strip() for name in line.strip()[7:].split(","))
        else:
            ops.append(_parse_op(line.strip(), Location("text", number)))
    arguments = [_parse_variable(part) for part in _split(header[2])]
    return Program(
        header[1],
        tuple(v for v, weight in arguments if not weight),
        tuple(v for v, weight in arguments if weight),
        tuple(ops),
        outputs,
    )


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


def _domain(kind: str, index: str | None) -> Domain:
    domain = Domain(kind, None if index is None else int(index))
    if Domain(kind) not in DOMAINS:
        raise InputError(f"there is no row domain '{kind}'; known: {', '.join(map(str, DOMAINS))}.")
    return domain


def _parse_variable(text: str) -> tuple[Variable, bool]:
    found = _VARIABLE.fullmatch(text)
    if found is None:
        raise InputError(f"'{text.strip()}' is no value; a value is written 'name: domain(sizes)'.")
    name, kind, index, sizes, weight = found.groups()
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    return Variable(name, _domain(kind, index), shape), weight is not None


def _parse_op(line: str, location: Location) -> Op:
    found = _OP.fullmatch(line)
    if found is None:
        raise InputError(f"{location}: '{line}' is no operator; one is 'name: domain(sizes) = kind(operands)'.")
    result, _ = _parse_variable(found[1])
    operands: list[Operand] = []
    attrs: dict[str, Any] = {}
    over, by = result.domain, ""
    for part in map(str.strip, _split(found[3])):
        name, equals, value = part.partition("=")
        if equals and name == "over":
            match = _DOMAIN.fullmatch(value)
            assert match is not None
            over = _domain(*match.groups())
        elif equals and name == "by":
            by = value
        elif equals:
            attrs[name] = _literal(value, location)
        else:
            operand = _OPERAND.fullmatch(part)
            if operand is None:
                raise InputError(f"{location}: '{part}' is no operand.")
            operands.append(Operand(operand[1], operand[2] or ""))
    return Op(found[2], result, tuple(operands), tuple(sorted(attrs.items())), over, by, location)


def _literal(value: str, location: Location) -> Any:
    try:
        return float(value) if value in ("inf", "-inf", "nan") else ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise InputError(f"{location}: '{value}' is no literal.") from error
