"""Groups the operators of a relational program into kernels of two templates: segment GEMM and traversal.

Products (`linear`, `outer`) are GEMMs and take in what scales or shifts their rows. Everything else is traversed:
operators join a loop over the same rows, and loops over edges join around the node that their reductions lead to, so
that an edge softmax, what it is computed from and the sum that it weights are one kernel (Hector, arXiv:2301.06284,
section 3; there nested loops are merged). What stops it: a value of another row than that of the loop, which is only
known after the loop has run for all rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from planish.ir.relational.domains import EDGE, NODE, TYPES, Domain
from planish.ir.relational.groups import Group, Kind, Plan, outputs_of
from planish.ir.relational.inter import Op, Program
from planish.ir.relational.ops import ELEMENTWISE, REDUCTIONS, full_end

PRODUCTS = frozenset(("linear", "outer"))
Epilogue = Literal["none", "scale", "all"]


@dataclass(eq=False)
class _Draft:
    """A group while it grows."""

    kind: Kind
    over: Domain
    center: Domain | None = None
    by: str = ""
    ops: list[Op] = field(default_factory=list)


def fuse_operators(program: Program, epilogue: Epilogue = "scale") -> Plan:
    """Groups the operators of a verified program.

    Args:
        program: of which everything is needed (run dead code elimination first).
        epilogue: what GEMMs take in after the product: nothing; factors and addends by row, and biases by type; or
            any elementwise operator.
    """
    once = set(program.graph_constants())
    maker = _Fusion(program, epilogue)
    for op in program.ops:
        if op.name not in once:
            maker.place(op)
    groups = tuple(
        Group(d.kind, tuple(d.ops), outputs_of(program, d.ops), d.over, d.center, d.by) for d in maker.ordered()
    )
    return Plan(program, tuple(op for op in program.ops if op.name in once), groups)


class _Fusion:
    def __init__(self, program: Program, epilogue: Epilogue) -> None:
        self.program, self.epilogue = program, epilogue
        self.variables = program.variables()
        self.drafts: list[_Draft] = []
        #: Which draft computes a value.
        self.home: dict[str, _Draft] = {}

    def place(self, op: Op) -> None:
        """Puts an operator into the latest group that can take it, or into a new one."""
        if op.kind not in PRODUCTS:
            for draft in reversed(self.drafts):
                if self.fits(draft, op) and not self.waits(draft, op):
                    self.join(draft, op)
                    return
        draft = _Draft("gemm" if op.kind in PRODUCTS else "traversal", *_shape(op))
        self.drafts.append(draft)
        self.join(draft, op)

    def join(self, draft: _Draft, op: Op) -> None:
        if draft.kind == "traversal":
            draft.over, draft.center, draft.by = _merged(draft, op) or (draft.over, draft.center, draft.by)
        draft.ops.append(op)
        self.home[op.name] = draft

    def waits(self, draft: _Draft, op: Op) -> bool:
        """Whether something that `op` reads depends on the draft by way of another group."""
        others = [self.home[name] for name in op.reads if name in self.home and self.home[name] is not draft]
        return any(self.depends(other, draft) for other in others)

    def depends(self, later: _Draft, earlier: _Draft) -> bool:
        seen, todo = set[int](), [later]
        while todo:
            draft = todo.pop()
            if draft is earlier:
                return True
            if id(draft) not in seen:
                seen.add(id(draft))
                todo += self.before(draft)
        return False

    def before(self, draft: _Draft) -> list[_Draft]:
        read = (name for op in draft.ops for name in op.reads if name in self.home)
        return [self.home[name] for name in dict.fromkeys(read) if self.home[name] is not draft]

    def fits(self, draft: _Draft, op: Op) -> bool:
        if draft.kind == "gemm":
            return self.absorbed(draft, op)
        merged = _merged(draft, op)
        if merged is None:
            return False
        own = {inner.name for inner in draft.ops}
        shared = own & set(op.reads)
        # Loops over the same rows join for what they share; unrelated ones stay apart.
        related = shared or {name for inner in draft.ops for name in inner.reads} & set(op.reads)
        return bool(related) and all(self.local(merged, inner, own | {op.name}) for inner in (*draft.ops, op))

    def local(self, shape: tuple[Domain, Domain | None, str], op: Op, own: Iterable[str]) -> bool:
        """Whether what `op` reads of values of the group belongs to its row or to the center around it."""
        over, center, by = shape
        for operand in op.operands:
            domain = self.variables[operand.name].domain
            if operand.name not in own or domain == op.over:
                continue
            if not (
                op.over == over
                and domain == center
                and full_end(over, domain, operand.end) == full_end(over, domain, by)
            ):
                return False
        return True

    def absorbed(self, draft: _Draft, op: Op) -> bool:
        """Whether a GEMM does `op` to its rows before it stores them."""
        root, last = draft.ops[0], draft.ops[-1]
        if self.epilogue == "none" or root.kind != "linear" or op.over != root.over or op.result.domain != op.over:
            return False
        if last.name not in op.reads or op.kind not in ELEMENTWISE | {"reshape"} or op.reads.count(last.name) > 1:
            return False
        if root.over in TYPES or last.name in self.program.outputs or len(self.readers(last.name)) > 1:
            return False
        if self.epilogue == "all" or op.kind == "reshape":
            return True
        return (
            op.kind in ("mul", "div", "add", "sub")
            and all(
                self.per_row(name) if op.kind in ("mul", "div") else self.bias(name)
                for name in op.reads
                if name != last.name
            )
            and (op.kind != "div" or op.reads[0] == last.name)
        )

    def readers(self, name: str) -> list[Op]:
        return [op for op in self.program.ops if name in op.reads]

    def per_row(self, name: str) -> bool:
        return all(size == 1 for size in self.variables[name].shape)

    def bias(self, name: str) -> bool:
        return self.variables[name].domain in TYPES

    def ordered(self) -> list[_Draft]:
        """Groups in an order in which each comes after those that it reads from, else as they were begun."""
        done: list[_Draft] = []

        def visit(draft: _Draft) -> None:
            if not any(draft is other for other in done):
                for other in self.before(draft):
                    visit(other)
                done.append(draft)

        for draft in self.drafts:
            visit(draft)
        return done


def _shape(op: Op) -> tuple[Domain, Domain | None, str]:
    """(domain of the inner loop, center, end) that an operator asks for by itself."""
    if op.kind in REDUCTIONS and op.over != op.result.domain:
        return op.over, op.result.domain, full_end(op.over, op.result.domain, op.by)
    if op.kind == "edge_softmax":
        return EDGE, NODE, op.by
    return op.over, None, ""


def _merged(draft: _Draft, op: Op) -> tuple[Domain, Domain | None, str] | None:
    """The loops of a traversal with `op` in it, or None if they do not fit together."""
    over, center, by = _shape(op)
    if draft.center is None and center is None:
        if over == draft.over:
            return over, None, ""
        return None
    if draft.center is not None and center is not None:
        return (over, center, by) if (over, center, by) == (draft.over, draft.center, draft.by) else None
    if center is None:  # a loop without a center joins inside, or around
        fits = over in (draft.over, draft.center)
        return (draft.over, draft.center, draft.by) if fits else None
    return (over, center, by) if draft.over in (over, center) else None
