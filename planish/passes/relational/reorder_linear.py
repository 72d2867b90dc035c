"""Multiplies weights with each other first, where that is less work: (x W) v becomes x (W v).

Linear operator reordering of Hector (arXiv:2301.06284, section 3.2). The product of weights is computed once for each
type; rows are then multiplied once instead of twice. Cost in multiplications, with R rows of the first product, Q of
the second and T types, for W: i x m and v: m x o::

    before   R i m + Q m o          (R i m only if nothing else needs x W)
    after    weights T i m o + Q i o

Products of weights count `weights` times: they are many small ones, and there is no row of data that pays for tiles.
The rows are those after compact materialization, so that both passes do not gain the same thing twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from planish.ir.relational.domains import EDGE, EDGE_TYPE, NODE_TYPE, NONE, PAIRS, TYPES, Domain, compose
from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.ops import full_end
from planish.ir.relational.statistics import Statistics
from planish.passes.base import Decline
from planish.passes.relational.base import Notes, Outcome, RelationalPass, Rewriter
from planish.passes.relational.moving import all_dependences, needed_rows

#: Chains of products are reordered pair by pair.
_ROUNDS = 8
_VIEWS = frozenset(("reshape", "slice"))


@dataclass(frozen=True)
class ReorderLinear(RelationalPass):
    """Reassociates products of features with two weights.

    Attributes:
        compact: count rows as compact materialization would leave them; else as they are.
        weights: what a multiplication among weights costs, in multiplications of rows.
        force: also where it does not pay (to measure what the rule is worth).
    """

    name = "reorder"

    compact: bool = True
    weights: float = 3.0
    force: bool = False

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes = Notes(self.name)
        for _ in range(_ROUNDS):
            before, notes.declined = notes.fired, []
            program = self._round(program, rows, notes)
            if notes.fired == before:
                break
        return notes.outcome(program)

    def _round(self, program: Program, rows: Statistics, notes: Notes) -> Program:
        rewriter = Rewriter(program)
        atoms = all_dependences(program.ops, rewriter.old)
        users = program.users()
        for op in map(rewriter.current, program.ops):
            try:
                value = self._reordered(rewriter, op, users, atoms, rows)
            except Decline as decline:
                notes.decline(op.name, decline.reason)
                value = None
            if value is None:
                rewriter.keep(op)
            else:
                rewriter.replace(op, value)
                notes.fired += 1
        return rewriter.finish()

    def _reordered(
        self,
        rewriter: Rewriter,
        op: Op,
        users: Mapping[str, list[Op]],
        atoms: Mapping[str, frozenset[str]],
        rows: Statistics,
    ) -> Operand | None:
        found = _match(rewriter, op)
        if found is None:
            return None
        rewriter.location = op.location
        inner = found.inner
        place = _product_domain(rewriter, found, op, rows)
        dropped = _only_for(found.chain, op, users)
        first, second = (self._rows(o, atoms, rows) for o in (inner, op))
        i, m = rewriter.known[inner.operands[1].name].shape
        o = math.prod(op.result.shape)
        wide = o * rewriter.known[found.value.name].shape[-1]
        before = (first * i * m if dropped else 0) + second * wide
        types = rows.rows(place)
        after = self.weights * types * i * wide + second * i * o
        if after >= before and not self.force:
            needed = "" if dropped else f", and '{inner.name}' is needed elsewhere"
            raise Decline(f"{after:.3g} multiplications for {before:.3g}: {types} products of weights{needed}")
        return _write(rewriter, found, op, place)

    def _rows(self, op: Op, atoms: Mapping[str, frozenset[str]], rows: Statistics) -> int:
        if self.compact and op.name in atoms:
            return needed_rows(atoms[op.name], rows)
        return rows.rows(op.over)


@dataclass(frozen=True)
class _Match:
    """(view(x W + b)) v.

    Attributes:
        inner: x W.
        chain: what lies between, first to last: `inner` itself, then views and the addition of b.
        x: as the outer operator's loop reads it.
        w, weight: W and v, the same.
        value: what v is applied to.
        bias: b and how many views come before it, or None.
    """

    inner: Op
    chain: tuple[Op, ...]
    x: Operand
    w: Operand
    weight: Operand
    value: Operand
    bias: tuple[Operand, int] | None


def _match(rewriter: Rewriter, op: Op) -> _Match | None:
    if op.kind not in ("linear", "dot") or op.over in TYPES:
        return None
    orders = [op.operands] if op.kind == "linear" else [op.operands, op.operands[::-1]]
    for value, weight in orders:
        if rewriter.known[weight.name].domain not in TYPES:
            continue
        if op.kind == "dot" and len(rewriter.known[weight.name].shape) > len(rewriter.known[value.name].shape):
            continue  # v has axes of its own in front
        found = _chain(rewriter, op, value, weight)
        if found is not None:
            return found
    return None


def _chain(rewriter: Rewriter, op: Op, value: Operand, weight: Operand) -> _Match | None:
    chain: list[Op] = []
    bias: tuple[Operand, int] | None = None
    middle = rewriter.known[value.name].domain
    inner = rewriter.define(value)
    while inner is not None and inner.over == middle and inner.kind != "linear":
        if inner.kind in _VIEWS:
            step = inner.operands[0]
        elif inner.kind == "add" and bias is None:
            names = [o for o in inner.operands if rewriter.known[o.name].domain in TYPES]
            rest = [o for o in inner.operands if rewriter.known[o.name].domain not in TYPES]
            if len(names) != 1 or rewriter.known[names[0].name].shape != inner.result.shape:
                return None
            bias, step = (names[0], len(chain)), rest[0]
        else:
            return None
        chain.append(inner)
        if step.end or rewriter.known[step.name].domain != middle:
            return None
        inner = rewriter.define(step)
    if (
        inner is None
        or inner.kind != "linear"
        or inner.over != middle
        or inner.over in TYPES
        or inner.attr("transpose")
    ):
        return None
    x, w = inner.operands
    if rewriter.known[w.name].domain not in TYPES or len(rewriter.known[w.name].shape) != 2:
        return None
    if len(rewriter.known[x.name].shape) != 1:
        return None

    def outside(operand: Operand) -> Operand:
        domain = rewriter.known[operand.name].domain
        own = full_end(middle, domain, operand.end)
        return Operand(operand.name, compose(op.over, middle, full_end(op.over, middle, value.end), domain, own))

    steps = (inner, *reversed(chain))
    if bias is not None:
        bias = (outside(bias[0]), len(chain) - bias[1])
    return _Match(inner, steps, outside(x), outside(w), weight, value, bias)


def _product_domain(rewriter: Rewriter, found: _Match, op: Op, rows: Statistics) -> Domain:
    """The types that the product of weights is by; raises Decline where the graph does not have them."""
    operands = [found.w, found.weight, *([found.bias[0]] if found.bias else [])]
    places = {
        (rewriter.known[o.name].domain, full_end(op.over, rewriter.known[o.name].domain, o.end)) for o in operands
    }
    places = {(domain, end) for domain, end in places if domain != NONE}
    if not places:
        return NONE
    if len(places) == 1:
        return next(iter(places))[0]
    if op.over not in (EDGE, *PAIRS):
        raise Decline("weights are by different types")
    if any(domain == NODE_TYPE for domain, _ in places) and not rows.canonical:
        raise Decline("an edge type joins nodes of several types, so a weight by node type is not one by edge type")
    return EDGE_TYPE


def _only_for(chain: tuple[Op, ...], op: Op, users: Mapping[str, list[Op]]) -> bool:
    """Whether nothing but `op` needs what lies between."""
    known = {step.name for step in chain} | {op.name}
    return all(step.name in users and all(user.name in known for user in users[step.name]) for step in chain)


def _write(rewriter: Rewriter, found: _Match, op: Op, place: Domain) -> Operand:
    """x P, with P the product of weights over `place`, and the same of the bias."""

    def at(operand: Operand) -> Operand:
        """A weight as a loop over `place` reads it."""
        domain = rewriter.known[operand.name].domain
        return Operand(operand.name, operand.end if place == EDGE_TYPE and domain == NODE_TYPE else "")

    def applied(value: Operand, lead: tuple[int, ...], start: int) -> Operand:
        """The views from step `start` on, and the second weight."""
        for step in found.chain[start:]:
            if step.kind == "reshape":
                value = rewriter.emit("reshape", value, over=place, shape=(*lead, *step.result.shape))
            elif step.kind == "slice":
                cut = {name: step.attr(name) for name in ("start", "stop")}
                value = rewriter.emit("slice", value, over=place, axis=step.attr("axis") + len(lead), **cut)
        options = {"transpose": True} if op.attr("transpose") else {}
        return rewriter.emit(op.kind, value, at(found.weight), over=place, **options)

    def flat(value: Operand, lead: tuple[int, ...], size: int) -> Operand:
        return rewriter.emit("reshape", value, over=place, shape=(*lead, size))

    i = rewriter.known[found.w.name].shape[0]
    size = math.prod(op.result.shape)
    own = (
        rewriter.emit("copy", at(found.w), over=place) if rewriter.known[found.w.name].domain != place else at(found.w)
    )
    product = flat(applied(own, (i,), 1), (i,), size)
    weights = [found.w, found.weight, *([found.bias[0]] if found.bias else [])]
    end = next((o.end for o in weights if rewriter.known[o.name].domain == place), "")
    value = rewriter.emit("linear", found.x, Operand(product.name, end), over=op.over)
    if found.bias is not None:
        bias, step = found.bias
        spread = rewriter.emit("copy", at(bias), over=place) if rewriter.known[bias.name].domain != place else at(bias)
        moved = flat(applied(spread, (), step + 1), (), size)
        value = rewriter.emit("add", value, Operand(moved.name, end), over=op.over)
    return rewriter.emit("reshape", value, over=op.over, shape=op.result.shape, name=op.name)
