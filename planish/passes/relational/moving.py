"""Moving an operator to a coarser row domain: when its operands say that many of its rows are equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from planish.ir.relational.domains import EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, PAIRS, Domain, compose, ends
from planish.ir.relational.inter import Op, Operand, Variable
from planish.ir.relational.ops import REDUCTIONS, full_end
from planish.ir.relational.statistics import Statistics

#: They depend on all rows at once, or are layouts of nodes.
FIXED = REDUCTIONS | {"edge_softmax", "join", "pick"}


def moved(op: Op, to: Domain, end: str, variables: Mapping[str, Variable], rows: Statistics) -> Op | None:
    """`op` over the rows of `to`, which its own rows lead to by `end`; None if it reads what varies within a row of it.

    This is the legality of compact materialization: by induction over the program, what is read from `to` is all that
    the value depends on.
    """
    if op.kind in FIXED:
        return None
    operands = []
    for operand in op.operands:
        domain = variables[operand.name].domain
        own = full_end(op.over, domain, operand.end)
        for choice in ends(to, domain):
            if compose(op.over, to, end, domain, choice) == own and allowed(to, domain, choice, rows):
                operands.append(Operand(operand.name, choice))
                break
        else:
            return None
    result = replace(op.result, domain=to)
    return replace(op, result=result, operands=tuple(operands), over=to)


def allowed(to: Domain, domain: Domain, end: str, rows: Statistics) -> bool:
    """An edge type has node types of its ends only in canonical graphs."""
    if domain != NODE_TYPE or to.kind in ("node", "edge", "node_type") or rows.canonical:
        return True
    return to in PAIRS and to.kind.startswith(end)


def dependence(op: Op, atoms: Mapping[str, frozenset[str]], variables: Mapping[str, Variable]) -> frozenset[str]:
    """What a row of the result varies with, among ``src``, ``dst``, ``type`` and ``edge`` for values over edges.

    Args:
        op: an operator over edges or pairs.
        atoms: the same of operands over edges or pairs.
        variables: of the program.
    """
    if op.kind in FIXED:
        return own_atoms(op.result.domain)
    found: set[str] = set()
    for operand in op.operands:
        domain = variables[operand.name].domain
        if operand.name in atoms and domain in (EDGE, *PAIRS):
            found |= atoms[operand.name]
        elif domain in (NODE, NODE_TYPE):
            found.add(full_end(op.over, domain, operand.end))
        else:
            found |= own_atoms(domain)
    return frozenset(found)


def own_atoms(domain: Domain) -> frozenset[str]:
    """What a value by `domain` may vary with."""
    if domain in PAIRS:
        return frozenset((domain.kind.removesuffix("_pair"), "type"))
    return frozenset({EDGE: ("edge",), EDGE_TYPE: ("type",)}.get(domain, ()))


def needed_rows(atoms: frozenset[str], rows: Statistics) -> int:
    """How many rows a value over edges has when it is computed once for each thing that it varies with."""
    if not atoms:
        return rows.rows(NONE)
    if atoms == {"type"}:
        return rows.edge_types
    if atoms in ({"src"}, {"dst"}):
        return rows.nodes
    if atoms == {"src", "type"}:
        return rows.src_pairs
    if atoms == {"dst", "type"}:
        return rows.dst_pairs
    return rows.edges


def all_dependences(ops: tuple[Op, ...], variables: Mapping[str, Variable]) -> dict[str, frozenset[str]]:
    """`dependence` of every value over edges or pairs."""
    found = {name: own_atoms(v.domain) for name, v in variables.items() if v.domain in (EDGE, *PAIRS)}
    for op in ops:
        if op.over in (EDGE, *PAIRS) and op.result.domain == op.over:
            found[op.name] = dependence(op, found, variables)
    return found


def end_at(pair: Domain, operand: Operand, variables: Mapping[str, Variable], rows: Statistics) -> str | None:
    """The end by which rows of `pair` read what edges read as `operand`; None if it varies within a pair."""
    domain = variables[operand.name].domain
    own = full_end(EDGE, domain, operand.end)
    for end in ends(pair, domain):
        if compose(EDGE, pair, "", domain, end) == own and allowed(pair, domain, end, rows):
            return end
    return None
