"""Sums what edges bring before it is multiplied with a weight, not after: one product for each pair, not for each edge.

A sum over edges of ``c_e (x_src W_type)`` is linear in x, and all edges of a (destination, edge type) have the same W:
``sum_e c_e (x_src W_type) = sum over pairs of (sum_{e in pair} c_e x_src) W_type``. As compact materialization it
replaces rows of products by edge with rows by pair, here those of the side that is summed into, also where factors
differ from edge to edge (attention), which compaction by itself can not. The same for a dot with what is at the other
end, ``<x_src W_type, y_dst> = <x_src, y_dst W_type'>``: the product is on the side with fewer pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, PAIRS, SRC_PAIR, TYPES, Domain
from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.ops import full_end
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.base import Notes, Outcome, RelationalPass, Rewriter
from planish.passes.relational.moving import end_at

_PAIR = {"src": SRC_PAIR, "dst": DST_PAIR}
_OTHER = {"src": "dst", "dst": "src"}


@dataclass(frozen=True)
class AggregateFirst(RelationalPass):
    """Moves typed products behind the sums over edges that read them, and across dots.

    Attributes:
        margin: how many times as many pairs the side that is summed into may have as the other.
    """

    name = "aggregate-first"

    margin: float = 1.1

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes, rewriter = Notes(self.name), Rewriter(program)
        users = program.users()
        for op in map(rewriter.current, program.ops):
            value = None
            if op.kind in ("sum", "mean") and op.over == EDGE:
                value = self._sum(rewriter, op, users, rows, notes)
            elif op.kind == "dot" and op.over == EDGE:
                value = self._dot(rewriter, op, users, rows, notes)
            if value is None:
                rewriter.keep(op)
            else:
                rewriter.replace(op, value)
                notes.fired += 1
        return notes.outcome(rewriter.finish())

    def _pays(self, pair: Domain, product: Op, rows: Statistics, notes: Notes) -> bool:
        """Whether the rows of `pair` are not more than those that the product would have after compaction."""
        other = min(rows.rows(EDGE), rows.rows(DST_PAIR if pair == SRC_PAIR else SRC_PAIR))
        if rows.rows(pair) <= self.margin * other:
            return True
        notes.decline(product.name, f"{rows.rows(pair)} pairs on this side, {other} on the other")
        return False

    def _sum(
        self, rewriter: Rewriter, op: Op, users: dict[str, list[Op]], rows: Statistics, notes: Notes
    ) -> Operand | None:
        if op.result.domain == NODE:
            pair, end = _PAIR[op.by], op.by
        elif op.result.domain in PAIRS:
            pair = op.result.domain
            end = "src" if pair == SRC_PAIR else "dst"
        else:
            return None
        if op.kind == "mean" and op.result.domain == NODE:
            return None
        found = _chain(rewriter, op.operands[0], users, end)
        if found is None or not self._pays(pair, found.product, rows, notes):
            return None
        x, weight = found.product.operands
        shape = rewriter.known[x.name].shape
        heads = len(rewriter.known[weight.name].shape) == 3
        rewriter.location = op.location
        value = x
        per_pair: list[tuple[str, Operand]] = []
        for kind, factor in found.factors:
            known = rewriter.known[factor.name]
            at_pair = end_at(pair, factor, rewriter.known, rows)
            if at_pair is not None:
                per_pair.append((kind, Operand(factor.name, at_pair)))
                continue
            wide = (*shape[:-2], shape[-2], 1) if heads and math.prod(known.shape) > 1 else (1,)
            shaped = factor
            if known.shape != wide:
                shaped = rewriter.emit("reshape", factor, over=EDGE, shape=wide)
            value = rewriter.emit(kind, value, shaped, over=EDGE)
        total = rewriter.emit(op.kind, value, over=EDGE, domain=pair)
        made = rewriter.emit("linear", total, Operand(weight.name), over=pair, **dict(found.product.attrs))
        for kind, factor in per_pair:
            wide = (rewriter.known[made.name].shape[-2], 1) if heads and _many(rewriter, factor) else (1,)
            if rewriter.known[factor.name].shape not in ((), wide):
                factor = (
                    rewriter.emit("reshape", factor, over=rewriter.known[factor.name].domain, shape=wide)
                    if not (factor.end)
                    else rewriter.emit("reshape", factor, over=pair, shape=wide)
                )
            made = rewriter.emit(kind, made, factor, over=pair)
        if rewriter.known[made.name].shape != op.result.shape:
            made = rewriter.emit("reshape", made, over=pair, shape=op.result.shape)
        if op.result.domain == NODE:
            made = rewriter.emit("sum", made, over=pair, domain=NODE, by=end, name=op.name)
        return made

    def _dot(
        self, rewriter: Rewriter, op: Op, users: dict[str, list[Op]], rows: Statistics, notes: Notes
    ) -> Operand | None:
        for this, that in (op.operands, op.operands[::-1]):
            found = _chain(rewriter, this, users, "")
            if found is None or found.factors or found.views or rewriter.known[this.name].domain != EDGE:
                continue
            x, weight = found.product.operands
            other = rewriter.known[that.name]
            side = full_end(EDGE, rewriter.known[x.name].domain, x.end)
            if other.domain != NODE or side not in _PAIR or that.end != _OTHER[side]:
                continue
            if rewriter.known[x.name].domain != NODE or other.shape != found.product.result.shape:
                continue
            pair = _PAIR[that.end]
            if rows.rows(pair) * self.margin >= min(rows.rows(_PAIR[side]), rows.rows(EDGE)):
                notes.decline(op.name, f"{rows.rows(pair)} pairs on the other side, {rows.rows(_PAIR[side])} on this")
                continue
            attrs = {} if found.product.attr("transpose") else {"transpose": True}
            moved = rewriter.emit("linear", that, Operand(weight.name), over=pair, **attrs)
            return rewriter.emit("dot", x, moved, over=EDGE, name=op.name)
        return None


def _many(rewriter: Rewriter, operand: Operand) -> bool:
    return math.prod(rewriter.known[operand.name].shape) > 1


@dataclass(frozen=True)
class _Chain:
    """A typed product of what is at the other end, times factors.

    Attributes:
        product: ``x W``, over edges or pairs.
        factors: what it is multiplied with or divided by, each a number (or one for each head).
        views: there are reshapes in between.
    """

    product: Op
    factors: list[tuple[str, Operand]]
    views: bool


def _chain(rewriter: Rewriter, value: Operand, users: dict[str, list[Op]], end: str) -> _Chain | None:
    factors: list[tuple[str, Operand]] = []
    views = False
    operand = value
    while True:
        op = rewriter.define(operand)
        if op is None or op.over != EDGE or not _alone(rewriter, op, users):
            return None
        if op.kind == "linear":
            break
        if op.kind == "reshape":
            views, operand = True, op.operands[0]
            continue
        step = _factor(rewriter, op)
        if step is None:
            return None
        factor, operand = step
        factors.append((op.kind, factor))
    x, weight = op.operands
    known = rewriter.known[weight.name]
    heads = len(known.shape) == 3
    shape = rewriter.known[x.name].shape
    if known.domain != EDGE_TYPE or len(shape) != (2 if heads else 1):
        return None
    if end and full_end(EDGE, rewriter.known[x.name].domain, x.end) == end:
        return None  # it is the same for all edges of the pair
    if op.result.shape[-1] < 4:
        return None
    count = op.result.shape[0] if heads else 1
    for _, factor in factors:
        shape = rewriter.known[factor.name].shape
        if math.prod(shape) not in (1, count) or (math.prod(shape) > 1 and shape not in ((count, 1), (1, count, 1))):
            return None
    return _Chain(op, factors[::-1], views)


def _alone(rewriter: Rewriter, op: Op, users: dict[str, list[Op]]) -> bool:
    """Whether nothing else reads a value, but products with weights, which can be reordered."""
    return sum(not _reorderable(rewriter, op.name, user, users) for user in users.get(op.name, [])) <= 1


def _reorderable(rewriter: Rewriter, name: str, user: Op, users: dict[str, list[Op]]) -> bool:
    if user.kind == "reshape":
        return all(_reorderable(rewriter, user.name, other, users) for other in users[user.name])
    if user.kind not in ("dot", "linear"):
        return False
    others = [rewriter.old[o.name].domain for o in user.operands if o.name != name and o.name in rewriter.old]
    return len(others) == 1 and others[0] in TYPES


def _factor(rewriter: Rewriter, op: Op) -> tuple[Operand, Operand] | None:
    """(factor, the rest) of a product with a number, or of a quotient."""
    if op.kind not in ("mul", "div"):
        return None
    a, b = op.operands
    wide = math.prod(op.result.shape)

    def small(operand: Operand) -> bool:
        shape = rewriter.known[operand.name].shape
        return math.prod(shape) < wide and (not shape or shape[-1] == 1)

    def full(operand: Operand) -> bool:
        return math.prod(rewriter.known[operand.name].shape) == wide

    if small(b) and full(a):
        return b, a
    if op.kind == "mul" and small(a) and full(b):
        return a, b
    return None
