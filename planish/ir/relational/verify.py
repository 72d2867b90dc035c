"""Validation of relational programs: every error names the value, and the line of source where it is known."""

from __future__ import annotations

from planish.ir.errors import InputError
from planish.ir.relational.domains import NODE_TYPE, Domain
from planish.ir.relational.inter import Location, Op, Program, Variable
from planish.ir.relational.ops import SPECS, Mismatch, check_domains, infer


def error_at(location: Location | None, message: str) -> InputError:
    """The error with its position in front; the caller raises it."""
    return InputError(f"{location}: {message}." if location else f"{message}.")


def check_op(op: Op, operands: list[Variable]) -> None:
    """Raises InputError unless `op` fits what it reads."""
    try:
        shape = infer(op.kind, [v.shape for v in operands], dict(op.attrs))
        if shape != op.result.shape:
            raise Mismatch(f"{op.kind} gives shape {shape}, and is said to give {op.result.shape}")
        check_domains(op, [v.domain for v in operands])
    except Mismatch as error:
        raise error_at(op.location, f"'{op.name}': {error}") from error


def verify(program: Program) -> None:
    """Checks names, order, shapes, domains and outputs of a program.

    Raises:
        InputError: naming the value, and file and line where it was written if that is known.
    """
    known: dict[str, Variable] = {}
    for variable in program.arguments:
        _define(program, known, variable, None)
        if any(size < 1 for size in variable.shape):
            raise InputError(f"'{variable.name}': sizes must be 1 or more, not {variable.shape}.")
    for op in program.ops:
        missing = next((name for name in op.reads if name not in known), None)
        if missing is not None:
            later = any(other.name == missing for other in program.ops)
            why = "which is defined later" if later else "which is not defined"
            raise error_at(op.location, f"'{op.name}' reads '{missing}', {why}")
        check_op(op, [known[name] for name in op.reads])
        _define(program, known, op.result, op.location)
    if not program.outputs:
        raise InputError(f"relational program '{program.name}' has no outputs.")
    for name in program.outputs:
        if name not in known:
            raise InputError(f"output '{name}' of '{program.name}' is not defined.")


def _define(program: Program, known: dict[str, Variable], variable: Variable, location: Location | None) -> None:
    if variable.name in known:
        raise error_at(location, f"'{variable.name}' is defined twice in '{program.name}'")
    if not variable.name.isidentifier():
        raise error_at(location, f"'{variable.name}' is no name: letters, digits and _")
    known[variable.name] = variable


def needs_canonical_types(program: Program) -> bool:
    """Whether some operator reads the node type of one end from an edge type: each edge type must then have one."""
    variables = program.variables()

    def crosses(op: Op, coarse: Domain, end: str, fine: Domain) -> bool:
        if coarse != NODE_TYPE or fine.kind in ("node", "edge", "node_type"):
            return False
        own = {"src_pair": "src", "dst_pair": "dst"}.get(fine.kind)
        return own != end

    for op in program.ops:
        if any(crosses(op, variables[o.name].domain, o.end, op.over) for o in op.operands):
            return True
        if crosses(op, op.result.domain, op.by, op.over):
            return True
    return False


__all__ = ["SPECS", "check_op", "error_at", "needs_canonical_types", "verify"]
