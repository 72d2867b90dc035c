"""From the inter-operator IR to kernels: every operator finds the kernel, and the place in it, where it is computed.

Products with weights, outer products and reductions are *roots*: each gets a kernel, or joins one that fits. Everything
else is computed where it is needed: inside of the kernel that reads it if its rows are those of the kernel or of its
inner loop, else by a kernel of its own. What follows a product (a dot with what is at the other end of an edge, a sum
into nodes) moves into the kernel of the product, so that products need no memory. Values that kernels after the one
that computes them need go through memory, unless they cost next to nothing to compute again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from planish.ir.errors import UnsupportedError
from planish.ir.relational import access as schemes
from planish.ir.relational.access import Relation
from planish.ir.relational.building import Building, Cannot
from planish.ir.relational.domains import EDGE, NONE, PAIRS, Domain
from planish.ir.relational.emission import emit
from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.intra import Access, Lowered, View
from planish.ir.relational.placing import ALIASES, CHEAP, REDUCTIONS, Placement
from planish.ir.relational.prepared import is_product, prepare

#: Finished kernels that a reduction or a result is tried to be put into, latest first.
_TRIES = 12


def lower(program: Program, *, scatter: bool = True, canonical: bool = True, recompute: bool = False) -> Lowered:
    """The kernels of a verified program.

    Args:
        program: with values by edge in the order of the given edges.
        scatter: kernels may add rows to those of other domains as they come. Tiles then run one after the other;
            without it, all kernels but outer products can run on several threads.
        canonical: all edges of a type join nodes of the same two types, in every graph that this is for.
        recompute: what is made of one long value in memory, such as a scaled row, is made again by each kernel that
            reads it, and not kept.

    Raises:
        UnsupportedError: a reduction that no kernel can do (a maximum over rows that graphs do not list).
    """
    return _Lowering(prepare(program, canonical), scatter, recompute).run()


class _Lowering(Placement):
    def run(self) -> Lowered:
        for op in self.program.ops:
            if op.name not in self.home and not self._waits(op):
                self._root(op)
        for name in self.program.outputs:
            self.materialize(name)
        return emit(self.prepared, self.variables, self.steps, self.memory, self.aliases)

    # ---- what is computed where

    def _waits(self, op: Op) -> bool:
        """Whether an operator is left until something reads it."""
        if is_product(op, self.variables) or op.kind in ("join", "pick"):
            return False
        if op.kind in REDUCTIONS:
            # Into the rows of a product that reads nothing else: part of its kernel.
            return op.over == EDGE and op.result.domain in PAIRS and self._only_products(op.name, op.result.domain)
        return True

    def _only_products(self, name: str, rows: Domain) -> bool:
        users = self.users[name]
        return bool(users) and all(
            user.over == rows
            and (is_product(user, self.variables) or (self._waits(user) and self._only_products(user.name, rows)))
            for user in users
        )

    def materialize(self, name: str) -> None:
        """Makes sure that a value is in memory when the kernel that is under construction runs."""
        if name in self.memory or name in self.aliases:
            return
        home, op = self.home.get(name), self.defs[name]
        if home is not None and op.kind != "constant":
            if isinstance(home, Building) and home in self.building:
                raise Cannot
            self.memory.add(name)
            return
        if op.kind in ALIASES and op.over == self.variables[op.reads[0]].domain:
            source = op.reads[0]
            if name not in self.program.outputs and self.variables[source].domain != EDGE:
                self.materialize(source)
                self.aliases[name] = self.aliases.get(source, source)
                return
        self._root(op)
        self.memory.add(name)

    def _root(self, op: Op) -> None:
        if op.kind in ("join", "pick"):
            for name in op.reads:
                self.materialize(name)
            view = View("join" if op.kind == "join" else "pick", op.result, tuple(dict.fromkeys(op.reads)))
            self.steps.append(view)
            self.home[op.name] = view
            self.memory |= {op.name}
        elif is_product(op, self.variables):
            self._product(op)
        elif op.kind in REDUCTIONS:
            self._reduction(op)
        else:
            self._rowwise(op)

    def _open(self, rows: Domain, relation: Relation | None) -> Building:
        kernel = Building(rows, relation)
        self.building.append(kernel)
        return kernel

    def _close(self, kernel: Building) -> None:
        self.building.remove(kernel)
        self.steps.append(kernel)

    def _product(self, op: Op) -> None:
        fine = schemes.relation(op.over, EDGE, "") if op.over in PAIRS else None
        kernel = self._open(op.over, fine)
        kernel.product = op
        if op.kind == "linear":
            self.materialize(op.operands[1].name)
            kernel.x = self._access(kernel, op.operands[0], op.over, "row", 0)
        else:
            kernel.x, kernel.y = (self._access(kernel, o, op.over, "row", 0) for o in op.operands)
            self.memory.add(op.name)
        kernel.section = 1
        kernel.placed[op.name] = ("row", 1, 0)
        self.home[op.name] = kernel
        if op.kind == "linear":
            self._push(kernel, op.name)
        self._close(kernel)

    def _push(self, kernel: Building, name: str) -> None:
        """Moves what reads a product, or what is made of it, into the kernel, as far as it reduces to little."""
        for user in self.users[name]:
            if user.name in self.home:
                continue
            state = self._snapshot()
            try:
                self._follow(kernel, user)
            except Cannot:
                self._restore(state)

    def _follow(self, kernel: Building, user: Op) -> None:
        fine = kernel.relation.fine if kernel.relation else None
        if user.kind in REDUCTIONS:
            if (
                not self.scatter
                or user.kind != "sum"
                or user.over not in (kernel.rows, fine)
                or user.result.domain in (kernel.rows, NONE)
            ):
                raise Cannot
            self._scatter(kernel, user)
            return
        if is_product(user, self.variables) or user.kind in ("join", "pick") or user.over not in (kernel.rows, fine):
            raise Cannot
        level = "row" if user.over == kernel.rows else "inner"
        if level == "inner" and not self._shrinks(user, fine):
            raise Cannot
        self._place(kernel, user, level, 1)
        self._push(kernel, user.name)

    def _shrinks(self, op: Op, fine: Domain | None) -> bool:
        """Whether a value by edge is small, or ends up in sums: else it would be written for every edge."""
        if len(op.result.shape) == 0 or math.prod(op.result.shape) <= CHEAP:
            return True
        users = self.users[op.name]
        return (
            self.scatter
            and op.name not in self.program.outputs
            and bool(users)
            and all(
                (user.kind == "sum" and user.over == fine)
                or (user.over == fine and self._soft(user) and self._shrinks(user, fine))
                for user in users
            )
        )

    def _soft(self, op: Op) -> bool:
        return op.kind not in REDUCTIONS and op.kind not in ("join", "pick") and not is_product(op, self.variables)

    def _scatter(self, kernel: Building, op: Op) -> None:
        level = "row" if op.over == kernel.rows else "inner"
        start = self.prepared.start.get(op.name)
        if start is not None:
            self.materialize(start)
        source = self._access(kernel, op.operands[0], op.over, level, 1)
        kernel.add(op, level, 1, (source,), scatter=True)
        self.home[op.name] = kernel
        self.memory.add(op.name)

    def _reduction(self, op: Op) -> None:
        relation = schemes.relation(op.result.domain, op.over, op.by)
        if relation is None:
            if op.kind != "sum":
                raise UnsupportedError(
                    f"{op.location or op.name}: {op.kind} over {op.over} into {op.result.domain} has no kernel; reduce "
                    "in two steps, or use sum."
                )
            kernel = self._open(op.over, None)
            kernel.section = 1
            self._scatter(kernel, op)
            self._close(kernel)
            return
        start = self.prepared.start.get(op.name)
        if self._joins(op, relation, start):
            return
        kernel = self._open(op.result.domain, relation)
        self._reduce(kernel, op, start)
        self._close(kernel)

    def _joins(self, op: Op, relation: Relation, start: str | None) -> bool:
        for at in range(len(self.steps) - 1, max(-1, len(self.steps) - 1 - _TRIES), -1):
            kernel = self.steps[at]
            if not isinstance(kernel, Building) or kernel.product is not None or kernel.rows != op.result.domain:
                continue
            if kernel.relation not in (relation, None):
                continue
            if self._attempt(kernel, at, lambda k: self._reduce(k, op, start), relation):
                return True
        return False

    def _attempt(
        self, kernel: Building, at: int, action: Callable[[Building], None], relation: Relation | None = None
    ) -> bool:
        """Adds to a finished kernel, if it then still reads only what kernels before it have made."""
        state = self._snapshot()
        kernel.limit = at
        kernel.relation = kernel.relation or relation
        self.building.append(kernel)
        try:
            action(kernel)
        except Cannot:
            self._restore(state)
            return False
        self.building.remove(kernel)
        kernel.limit = None
        return True

    def _reduce(self, kernel: Building, op: Op, start: str | None) -> None:
        section = kernel.section
        source = self._access(kernel, op.operands[0], op.over, "inner", section)
        kernel.add(op, "inner", section, (source,))
        if start is not None:
            total = replace(op, kind="add", result=op.result, operands=(), over=op.result.domain, by="", attrs=())
            begin = self._access(kernel, Operand(start), op.result.domain, "row", section)
            kernel.add(total, "row", section, (Access(op.name, local=True), begin), after=op.name)
        self.home[op.name] = kernel

    def _rowwise(self, op: Op) -> None:
        """A kernel for an operator that nothing else computes; or a place in the one that computes what it reads."""
        over = op.result.domain if op.kind == "count" else op.over
        if op.kind == "constant":  # in a kernel that runs on every graph
            own = self._open(NONE, None)
            self._place(own, op, "row", 0)
            self._close(own)
            return
        for at in range(len(self.steps) - 1, max(-1, len(self.steps) - 1 - _TRIES), -1):
            kernel = self.steps[at]
            if not isinstance(kernel, Building) or not any(name in kernel.placed for name in op.reads):
                continue
            fine = kernel.relation.fine if kernel.relation else None
            if over not in (kernel.rows, fine):
                continue
            if self._attempt(kernel, at, lambda k: self._place(k, op, k.mapped(over) or "row", k.section)):
                return
        own = self._open(over, None)
        self._place(own, op, "row", 0)
        self._close(own)

    def _place(self, kernel: Building, op: Op, level: str, section: int) -> None:
        if op.kind == "count":
            relation = schemes.relation(op.result.domain, op.over, op.by)
            if relation is None:
                raise UnsupportedError(f"'{op.name}': graphs have no list of {op.over} by {op.result.domain} to count.")
            op = replace(op, kind="rows", attrs=(("pointers", relation.pointers),), over=op.result.domain)
        sources = tuple(self._access(kernel, operand, op.over, level, section) for operand in op.operands)
        kernel.add(op, level, section, sources)
        self.home.setdefault(op.name, kernel)
