"""Rewrites before lowering: softmax as reductions, transposed weights as values, sums that start from something."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from planish.ir.relational.access import segments
from planish.ir.relational.domains import EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, PAIRS, only_end, reaches
from planish.ir.relational.inter import Op, Operand, Program, Variable

#: Columns from which on a product with a weight is worth tiles; below, it is computed row by row.
LEAST_COLUMNS = 4
#: Matrices of one row that tiles are emitted for: heads, and other leading axes.
_MOST_PARTS = 16


@dataclass(frozen=True)
class Prepared:
    """A program that lowering takes, and what sums start from, by name: ``y = sum(m) + z`` is a sum from z."""

    program: Program
    start: dict[str, str]


def prepare(program: Program, canonical: bool = True) -> Prepared:
    """The rewrites, in order; `canonical`: all edges of a type join nodes of the same two types."""
    ops: list[Op] = []
    taken = set(program.variables())

    def fresh(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    variables = program.variables()
    turned: dict[str, str] = {}
    for op in program.ops:
        if op.over == op.result.domain and op.kind in ("sum", "mean", "max_rows", "min_rows"):
            ops.append(replace(op, kind="copy", by=""))  # each row is a group of its own
        elif op.over == op.result.domain and op.kind == "count":
            one = Variable(fresh(f"{op.name}_one"), NONE)
            ops.append(Op("constant", one, (), (("shape", ()), ("value", 1.0))))
            ops.append(replace(op, kind="copy", operands=(Operand(one.name),), by=""))
        elif op.kind == "edge_softmax":
            ops += _softmax(op, fresh)
        elif op.kind == "linear" and op.attr("transpose"):
            name = op.operands[1].name
            if name not in turned:
                turned[name] = fresh(f"{name}_t")
                ops.append(_transposed(variables[name], turned[name]))
            ops.append(replace(op, operands=(op.operands[0], replace(op.operands[1], name=turned[name])), attrs=()))
        elif op.kind == "outer" and op.over != op.result.domain and not _summed(op, variables):
            # No list of rows by that: first by edge type (or row by row), then the sum of those.
            by_type = canonical and op.result.domain == NODE_TYPE and op.over in (EDGE, *PAIRS)
            middle = EDGE_TYPE if by_type else op.over
            part = Variable(fresh(f"{op.name}_part"), middle, op.result.shape)
            ops.append(replace(op, result=part, by=""))
            ops.append(Op("sum", op.result, (Operand(part.name),), (), middle, op.by, op.location))
        else:
            ops.append(op)
    return _starts(program.with_ops(ops))


def _summed(op: Op, variables: Mapping[str, Variable]) -> bool:
    """Whether a segment GEMM gives the sum of these outer products over rows."""
    return segments(op.over, op.result.domain, op.by) is not None and is_product(op, variables)


def is_product(op: Op, variables: Mapping[str, Variable]) -> bool:
    """Whether an operator is the product of a segment GEMM."""
    if op.kind == "outer":
        leading = op.result.shape[0] if op.attr("heads") else 1
        return op.over != op.result.domain and leading * _spare(op, variables) <= _MOST_PARTS
    if op.kind != "linear":
        return False
    weight = variables[op.operands[1].name]
    if op.over in (EDGE_TYPE, NODE_TYPE, NONE) or op.result.shape[-1] < LEAST_COLUMNS:
        return False
    return segments(op.over, weight.domain, op.operands[1].end) is not None and (
        math.prod(op.result.shape[:-1]) <= _MOST_PARTS
    )


def _spare(op: Op, variables: Mapping[str, Variable]) -> int:
    shape = variables[op.operands[0].name].shape
    return math.prod(shape[: len(shape) - (2 if op.attr("heads") else 1)])


def _softmax(op: Op, fresh) -> list[Op]:  # type: ignore[no-untyped-def]
    """``p = exp(x - max x)``, ``p / sum p``, over the edges with the same end."""
    shape, at = op.result.shape, op.location

    def value(name: str, domain=EDGE) -> Variable:  # type: ignore[no-untyped-def]
        return Variable(fresh(f"{op.name}_{name}"), domain, shape)

    most, less, part, total = value("max", NODE), value("less"), value("exp"), value("sum", NODE)
    return [
        Op("max_rows", most, op.operands, (), EDGE, op.by, at),
        Op("sub", less, (*op.operands, Operand(most.name, op.by)), (), EDGE, "", at),
        Op("exp", part, (Operand(less.name),), (), EDGE, "", at),
        Op("sum", total, (Operand(part.name),), (), EDGE, op.by, at),
        Op("div", op.result, (Operand(part.name), Operand(total.name, op.by)), (), EDGE, "", at),
    ]


def _transposed(weight: Variable, name: str) -> Op:
    shape = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    perm = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
    return Op("transpose", Variable(name, weight.domain, shape), (Operand(weight.name),), (("perm", perm),))


def _starts(program: Program) -> Prepared:
    """Turns ``add(sum(m), z)`` over nodes into a sum that starts from z, and chains of such additions into sums that
    start from each other, in the order in which their terms are there."""
    start: dict[str, str] = {}
    definitions, users, variables = program.definitions(), program.users(), program.variables()
    place = {op.name: number for number, op in enumerate(program.ops)}
    ops = list(program.ops)
    inside: set[str] = set()
    for op in reversed(program.ops):
        if op.kind != "add" or op.over != NODE or op.name in inside:
            continue
        terms = _terms(op, program, definitions, users, inside)
        sums = [name for name in terms if _is_sum(name, op, program, definitions, users)]
        if not sums or len(set(terms)) < len(terms):
            continue
        terms.sort(key=lambda name: place.get(name, -1))
        narrow = [name for name in terms if variables[name].domain != NODE or variables[name].shape != op.result.shape]
        wide = [name for name in terms if name not in narrow]
        first = next((i for i, name in enumerate(wide) if name not in sums), len(wide) - 1)
        wide[first + 1 : first + 1] = narrow  # added to the first term that is no sum
        removed = {op.name, *(name for name in inside if name in _inner(op, definitions, inside)), *sums}
        made = _chain(op, wide, sums, definitions, start)
        ops = [o for o in ops if o.name not in removed] + made
    return Prepared(_ordered(program.with_ops(ops), start), start)


def _terms(
    op: Op, program: Program, definitions: Mapping[str, Op], users: Mapping[str, list[Op]], inside: set[str]
) -> list[str]:
    """What is added up in a tree of additions, whose inner nodes go to `inside`."""
    found: list[str] = []
    for operand in op.operands:
        below = definitions.get(operand.name)
        if (
            below is not None
            and below.kind == "add"
            and below.over == NODE
            and below.result.shape == op.result.shape
            and len(users[below.name]) == 1
            and below.name not in program.outputs
        ):
            inside.add(below.name)
            found += _terms(below, program, definitions, users, inside)
        else:
            found.append(operand.name)
    return found


def _inner(op: Op, definitions: Mapping[str, Op], inside: set[str]) -> set[str]:
    found: set[str] = set()
    for name in op.reads:
        if name in inside:
            found |= {name} | _inner(definitions[name], definitions, inside)
    return found


def _is_sum(name: str, op: Op, program: Program, definitions: Mapping[str, Op], users: Mapping[str, list[Op]]) -> bool:
    total = definitions.get(name)
    return (
        total is not None
        and total.kind == "sum"
        and total.over in (EDGE, *PAIRS)
        and total.result.domain == NODE
        and total.result.shape == op.result.shape
        and name not in program.outputs
        and len(users[name]) == 1
    )


def _chain(op: Op, terms: list[str], sums: list[str], definitions: Mapping[str, Op], start: dict[str, str]) -> list[Op]:
    """Operators that accumulate `terms` in order; the last one defines what `op` does."""
    made: list[Op] = []
    known = terms[0]
    if known in sums:
        made.append(definitions[known])
    for number, term in enumerate(terms[1:], 1):
        last = number == len(terms) - 1
        result = replace(op.result, name=op.name if last else f"{op.name}_part{number}")
        if term in sums:
            made.append(replace(definitions[term], result=result))
            start[result.name] = known
        else:
            made.append(replace(op, result=result, operands=(Operand(known), Operand(term))))
        known = result.name
    return made


def _ordered(program: Program, start: Mapping[str, str]) -> Program:
    """Operators in an order in which everything, starts included, is defined before it is read."""
    done = {v.name for v in program.arguments}
    waiting, ops = list(program.ops), []
    while waiting:
        later = []
        for op in waiting:
            needs = [*op.reads, *([start[op.name]] if op.name in start else [])]
            if all(name in done for name in needs):
                ops.append(op)
                done.add(op.name)
            else:
                later.append(op)
        assert len(later) < len(waiting), f"a cycle among {[op.name for op in later]}"
        waiting = later
    return program.with_ops(ops)


__all__ = ["Prepared", "is_product", "only_end", "prepare", "reaches"]
