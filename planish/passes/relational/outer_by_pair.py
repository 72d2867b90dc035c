"""Accumulates one factor of a weight's gradient over edges before the product with the other.

The gradient of a weight by type is ``sum_e x_e' y_e`` over the edges of a type. Where x is equal on all edges of a
(source, type) or (destination, type) pair, that is ``sum over pairs of x' (sum_{e in pair} y_e)``: a product for each
pair. Cost, in multiplications, with a number read counting as `traffic` of them, for U pairs, E edges, x of i and y
of o numbers::

    before   E i o + traffic E (i + o)
    after    U i o + traffic (E o + U i)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planish.ir.relational.domains import EDGE, PAIRS, Domain, compose, ends
from planish.ir.relational.inter import Op, Operand, Program
from planish.ir.relational.ops import full_end
from planish.ir.relational.statistics import Statistics
from planish.passes.base import Decline
from planish.passes.relational.base import Notes, Outcome, RelationalPass, Rewriter
from planish.passes.relational.moving import allowed, end_at


@dataclass(frozen=True)
class OuterByPair(RelationalPass):
    """Moves outer products from edges to pairs.

    Attributes:
        traffic: what reading one number costs, in multiplications.
    """

    name = "outer-by-pair"

    traffic: float = 8.0

    def apply(self, program: Program, rows: Statistics) -> Outcome:
        notes, rewriter = Notes(self.name), Rewriter(program)
        for op in map(rewriter.current, program.ops):
            value = None
            if op.kind == "outer" and op.over == EDGE:
                try:
                    value = self._outer(rewriter, op, rows)
                except Decline as decline:
                    notes.decline(op.name, decline.reason)
            if value is None:
                rewriter.keep(op)
            else:
                rewriter.replace(op, value)
                notes.fired += 1
        return notes.outcome(rewriter.finish())

    def _outer(self, rewriter: Rewriter, op: Op, rows: Statistics) -> Operand:
        sizes = [math.prod(rewriter.known[o.name].shape) for o in op.operands]
        each = sizes[0] * op.result.shape[-1]
        choices = []
        for pair in PAIRS:
            at = [end_at(pair, o, rewriter.known, rows) for o in op.operands]
            for fixed, moving in ((0, 1), (1, 0)):
                if at[fixed] is not None and at[moving] is None and _leads(pair, op, rows):
                    pairs = rows.rows(pair)
                    cost = pairs * each + self.traffic * (rows.edges * sizes[moving] + pairs * sizes[fixed])
                    choices.append((cost, pair, fixed, moving, at[fixed] or ""))
        if not choices:
            raise Decline("both factors vary between edges of a pair, or neither does")
        cost, pair, fixed, moving, end = min(choices, key=lambda choice: choice[0])
        before = rows.edges * each + self.traffic * rows.edges * sum(sizes)
        if cost >= before:
            raise Decline(f"{cost:.3g} steps for {before:.3g}")
        rewriter.location = op.location
        total = rewriter.emit("sum", op.operands[moving], over=EDGE, domain=pair)
        kept = Operand(op.operands[fixed].name, end)
        both = (kept, total) if fixed == 0 else (total, kept)
        return rewriter.emit(
            "outer", *both, over=pair, domain=op.result.domain, by=op.by, name=op.name, **dict(op.attrs)
        )


def _leads(pair: Domain, op: Op, rows: Statistics) -> bool:
    """Whether pairs lead to the rows of the result as edges do."""
    domain = op.result.domain
    own = full_end(EDGE, domain, op.by)
    return any(
        compose(EDGE, pair, "", domain, end) == own and allowed(pair, domain, end, rows) for end in ends(pair, domain)
    )
